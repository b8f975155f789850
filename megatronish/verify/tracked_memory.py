"""Bytes of weights, gradients and optimizer state on a rank, by formula from the layout."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from megatronish.config.run import RunConfig
from megatronish.model.accounting import layer_costs
from megatronish.model.transformer import Transformer
from megatronish.ops.dtypes import DTYPES
from megatronish.parallel.layers import part_of
from megatronish.parallel.mesh import ParallelMesh
from megatronish.parallel.pipeline import balanced_stages

# Flat tensors, and under ZeRO-3 all tensors, are padded to equal parts and aligned addresses.
PADDING_BYTES = 16


@dataclass(frozen=True)
class RankBytes:
    """Bytes that a rank holds between micro batches. optimizer: moments, and master weights where they are a copy."""

    weights: int
    gradients: int
    optimizer: int

    @property
    def total(self) -> int:
        """The sum of all three."""
        return self.weights + self.gradients + self.optimizer


def expected_bytes(config: RunConfig, mesh: ParallelMesh) -> RankBytes:
    """The formula, for AdamW. n numbers of the model are on this rank's stage and tensor-parallel rank; s ranks share them.

    weights n item (ZeRO-3: / s); gradients 4 n in fp32, in bf16 sums of 4 n and with ZeRO 1 the 2 n that are added to
    them (ZeRO 2 and 3: 4 n / s); optimizer 8 n of moments and 4 n of master weights, / s, but for fp32 ZeRO-0, where the
    weights are their own master.
    """
    stage, share = config.deepspeed.zero_optimization.stage, mesh.data.size
    n, fp32 = rank_numbers(config, mesh), config.deepspeed.dtype == "fp32"
    divided = math.ceil(n / share)
    return RankBytes(
        weights=DTYPES[config.deepspeed.dtype].itemsize * (divided if stage == 3 else n),
        gradients=4 * divided if stage >= 2 else (4 * n if fp32 else 6 * n),
        optimizer=8 * n if stage == 0 else 12 * divided,
    )


def slack(config: RunConfig, mesh: ParallelMesh) -> RankBytes:
    """The difference from the formula that is allowed: padding, and under ZeRO-2 the full gradients of the two tensors in which
    the rank's part begins and ends."""
    numbers = _numbers(config, mesh)
    padding = PADDING_BYTES * (len(numbers) + 4 * mesh.data.size)
    full = 2 * 4 * max(numbers.values()) if config.deepspeed.zero_optimization.stage == 2 else 0
    return RankBytes(padding, padding + full, padding)


def rank_numbers(config: RunConfig, mesh: ParallelMesh) -> int:
    """The number of the model's parameters on a rank."""
    return sum(_numbers(config, mesh).values())


def _numbers(config: RunConfig, mesh: ParallelMesh) -> dict[str, int]:
    """The size of the rank's part of each tensor: embeddings are divided by rows of the vocabulary, matrices and their inner
    biases evenly; norms, outer biases and, with fewer key/value heads than ranks, key/value rows are not divided."""
    model, tensor = config.megatronish.model, mesh.tp.size
    held = {}
    for name, shape in _shapes(config, mesh).items():
        numbers = math.prod(shape)
        if name in ("embedding.weight", "head.weight"):
            first, last = part_of(model.vocab_size, tensor, mesh.tp.rank)
            numbers = (last - first) * model.hidden_size
        elif ".qkv." in name and model.resolved_kv_heads < tensor:
            heads = model.num_attention_heads
            queries = numbers * heads // (heads + 2 * model.resolved_kv_heads)
            numbers = queries // tensor + numbers - queries
        elif any(part in name for part in (".qkv.", ".up.", ".out.weight", ".down.weight")):
            numbers //= tensor
        held[name] = numbers
    return held


def _shapes(config: RunConfig, mesh: ParallelMesh) -> dict[str, tuple[int, ...]]:
    """The shapes of the full tensors of the rank's stage."""
    ours = config.megatronish
    stage = balanced_stages(layer_costs(ours.model, ours.parallel.pipeline_balance), mesh.pp.size)[mesh.pp.rank]
    with torch.device("meta"):
        return {n: tuple(p.shape) for n, p in Transformer(ours.model, seed=None, stage=stage).named_parameters()}
