"""Fitting a run into memory without changing what it computes: before the first step, and as the out-of-memory fallback."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import psutil
import torch
from torch import Tensor, nn

from megatronish.config.model import ModelConfig
from megatronish.config.run import BatchPlan
from megatronish.errors import UserError
from megatronish.ops.dtypes import DTYPES

GIB = 1 << 30
MODES = ("none", "selective", "full")  # of activation checkpointing, by falling memory and rising work
# Work that recomputation adds to a step, as a share of it: cheap operations alone, or the forward pass.
RECOMPUTED = {"selective": 0.05, "full": 1 / 3}
RIDGE = {"cuda": 300.0, "cpu": 20.0}  # FLOPs in the time of reading a byte from memory: H100 bf16; AVX-512 cores
CPU_SHARE = 0.4  # of host memory, for the activations of all ranks


def activation_bytes_per_token(model: ModelConfig, dtype: str, checkpointing: str) -> int:
    """Rough bytes of activations kept for backward per token of a micro batch, logits included.

    Counts the inputs of each matrix product, norm and activation of a block (Korthikanti et al. 2022, table 1, without
    attention scores, which fused attention does not keep), or one block input under full checkpointing.
    """
    size = DTYPES[dtype].itemsize
    block = 8 * model.hidden_size + 4 * model.ffn_hidden_size
    kept = {"none": block, "selective": block // 2, "full": model.hidden_size}[checkpointing]
    logits = model.vocab_size * (size + 2 * 4)
    return model.num_layers * kept * size + block * size + logits


def fit_micro_batch(plan: BatchPlan, bytes_per_sample: int, budget_bytes: float) -> BatchPlan:
    """The same samples per step in micro batches that fit the budget: a smaller micro batch, more accumulation."""
    micro = plan.micro
    while micro > 1 and micro * bytes_per_sample > budget_bytes:
        micro = max(part for part in range(1, micro) if plan.micro % part == 0)
    return replace(plan, micro=micro, accumulation=plan.accumulation * (plan.micro // micro))


def fit_to_host(plan: BatchPlan, model: ModelConfig, dtype: str, checkpointing: str, local_ranks: int) -> BatchPlan:
    """`fit_micro_batch` for CPU ranks. Depends only on the installed memory, so that a resumed run gets the same plan."""
    budget = CPU_SHARE * psutil.virtual_memory().total / local_ranks
    return fit_micro_batch(plan, activation_bytes_per_token(model, dtype, checkpointing) * model.seq_length, budget)


class OutOfMemory(UserError):
    """A micro batch needs more memory than there is, or than train.memory_budget allows."""


class ActivationBudget:
    """A context manager that counts the bytes a forward pass saves for its backward pass, each storage once.

    limit: bytes, beyond which the forward pass raises OutOfMemory; None: only count. `used`: bytes of the last pass,
    without the module's weights and without what a checkpointed block recomputes.
    """

    def __init__(self, module: nn.Module, limit: float | None) -> None:
        self._limit, self.used = limit, 0
        self._own = {p.untyped_storage().data_ptr() for p in module.parameters()}
        self._seen: set[int] = set()
        self._hooks: Any = None

    def __enter__(self) -> ActivationBudget:
        self.used = 0
        self._seen.clear()
        self._hooks = torch.autograd.graph.saved_tensors_hooks(self._pack, lambda tensor: tensor)
        self._hooks.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self._hooks.__exit__(*error)

    def _pack(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        address = storage.data_ptr()
        if address not in self._own and address not in self._seen:
            self._seen.add(address)
            self.used += storage.nbytes()
            if self._limit is not None and self.used > self._limit:
                raise OutOfMemory(f"activations of {self.used / GIB:.3g} GiB are more than train.memory_budget allows")
        return tensor


def out_of_memory_fallback(
    plan: BatchPlan, mode: str, seq_length: int, dtype: str, device: str
) -> tuple[BatchPlan, str] | None:
    """The next (plan, activation checkpointing) to try when a micro batch does not fit; None when nothing is left.

    Either half the micro batch and twice the accumulation, which keeps the samples per step, or more recomputation,
    whichever costs less. A micro batch reads the weights three times (forward, backward, accumulation) for 6 FLOPs per
    weight and token, so one of T tokens spends bytes * ridge / (2 T) of its time on reading them, and half of one twice
    that share.
    """
    at = MODES.index(mode)
    further = MODES[at + 1] if at + 1 < len(MODES) else None
    if plan.micro > 1:
        half = max(part for part in range(1, plan.micro) if plan.micro % part == 0)
        parts = plan.micro // half
        halved = replace(plan, micro=half, accumulation=plan.accumulation * parts)
        cost = (parts - 1) * DTYPES[dtype].itemsize * RIDGE[device] / (2 * plan.micro * seq_length)
        if further is None or cost <= RECOMPUTED[further]:
            return halved, mode
    return None if further is None else (plan, further)


def fits_in_memory(module: nn.Module, batch: dict[str, Any], budget: ActivationBudget) -> bool:
    """Dry run: whether a forward and backward pass over `batch` fits. Keeps no gradient and does not communicate."""
    parameters = [p for p in module.parameters() if p.requires_grad]
    try:
        with budget:
            loss = module(batch)
        torch.autograd.grad(loss, parameters, allow_unused=True)
    except (OutOfMemory, torch.OutOfMemoryError):
        return False
    return True


def longest_batch(micro: int, seq_length: int, vocabulary: int, where: torch.device) -> dict[str, Any]:
    """The largest possible micro batch: every row is full and a single document."""
    tokens = torch.arange(micro * seq_length, device=where).view(micro, seq_length) % vocabulary
    return {"tokens": tokens, "labels": tokens}


def shortest_batch(batch: dict[str, Any], length: int = 8) -> dict[str, Any]:
    """The first `length` tokens of the first row: almost no memory, and every weight is used."""
    return {key: batch[key][:1, :length] for key in ("tokens", "labels")}


def describe_fallback(message: str, plan: BatchPlan, mode: str) -> str:
    """A line for the user about what was changed."""
    return (
        f"{message}: continuing with micro batch {plan.micro}, accumulation {plan.accumulation}, activation checkpointing "
        f"{mode}; the samples per step stay the same"
    )
