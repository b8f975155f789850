"""One transformer block; each form's `compute` is its equation.

The residual stream between blocks is the sum of two tensors, `x + branch` [b, s, hidden]: a block returns the output of its last
branch without adding it to x, because the next norm adds it in the same fused kernel (see `model.norm`). branch is None where
there is nothing to add.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Literal, cast, get_args

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from megatronish.config.model import ModelConfig
from megatronish.model.attention import AttentionInputs, SelfAttention
from megatronish.model.mlp import MLP
from megatronish.model.norm import build_norm
from megatronish.ops.dispatch import Backends
from megatronish.parallel.layers import TensorParallel

Recompute = Literal["none", "full", "selective"]
Stream = tuple[Tensor, Tensor | None]  # x, branch
# Operators whose outputs selective recomputation keeps, by the start of their names.
_EXPENSIVE = (
    "aten.mm.",
    "aten.addmm.",
    "mkldnn._linear_pointwise",
    "aten._scaled_dot_product_",
    "megatronish.causal_attention_fwd",
    "flash_attn",
    "vllm_flash_attn",
)


class Block(nn.Module):
    """Attention and feed-forward around a residual stream; see `build_block` for the four forms.

    recompute: "full" keeps only the block's input for the backward pass; "selective" keeps the outputs of matrix
    products and fused attention and computes the cheap operations between them again (Korthikanti et al. 2022).
    """

    def __init__(self, config: ModelConfig, layer: int, backends: Backends, tp: TensorParallel) -> None:
        super().__init__()
        self.recompute: Recompute = "none"
        self.attention_norm = build_norm(config, config.hidden_size, backends.ops, tp)
        self.attention = SelfAttention(config, layer, backends, tp)
        self.mlp_norm: nn.Module = nn.Identity()
        if config.has_mlp_norm:
            self.mlp_norm = build_norm(config, config.hidden_size, backends.ops, tp)
        self.shared_norm = config.parallel_block_shared_norm
        self.mlp = MLP(config, backends.ops, tp)
        self.dropout = nn.Dropout(config.residual_dropout) if config.residual_dropout > 0 else nn.Identity()

    def compute(self, x: Tensor, branch: Tensor | None, inputs: AttentionInputs) -> Stream:
        """The block's equation, of the residual stream x + branch [b, s, hidden]."""
        raise NotImplementedError

    def forward(self, x: Tensor, branch: Tensor | None, inputs: AttentionInputs) -> Stream:
        """`compute`, with intermediate results kept or recomputed according to `recompute`."""
        if self.recompute == "none" or not torch.is_grad_enabled():
            return self.compute(x, branch, inputs)
        if branch is not None:
            x, branch = x + branch, None  # one tensor to keep instead of two
        if self.recompute == "full":
            return checkpoint(self.compute, x, branch, inputs, use_reentrant=False)
        inputs = replace(inputs, in_place=False)  # the recomputation needs the projections as they are
        return checkpoint(self.compute, x, branch, inputs, use_reentrant=False, context_fn=_selective_contexts)


class PreNormBlock(Block):
    """h = x + attention(norm(x)); h + mlp(norm(h))."""

    def compute(self, x: Tensor, branch: Tensor | None, inputs: AttentionInputs) -> Stream:
        x, normed = self.attention_norm(x, branch)  # x = x + branch; normed = norm(x)
        h, normed = self.mlp_norm(
            x, self.dropout(self.attention(normed, inputs))
        )  # h = x + attention; normed = norm(h)
        return h, self.dropout(self.mlp(normed))


class PostNormBlock(Block):
    """h = norm(x + attention(x)); norm(h + mlp(h)) (Vaswani et al. 2017)."""

    def compute(self, x: Tensor, branch: Tensor | None, inputs: AttentionInputs) -> Stream:
        assert branch is None, "a post-norm block leaves nothing to add"
        _, h = self.attention_norm(x, self.dropout(self.attention(x, inputs)))
        _, y = self.mlp_norm(h, self.dropout(self.mlp(h)))
        return y, None


class ParallelPreNormBlock(Block):
    """x + attention(norm(x)) + mlp(norm'(x)); norm' is norm itself when the norm is shared (Wang 2021, GPT-J)."""

    def compute(self, x: Tensor, branch: Tensor | None, inputs: AttentionInputs) -> Stream:
        x, normed = self.attention_norm(x, branch)
        mlp_normed = normed if self.shared_norm else self.mlp_norm(x)[1]
        return x, self.dropout(self.attention(normed, inputs)) + self.dropout(self.mlp(mlp_normed))


class ParallelPostNormBlock(Block):
    """norm(x + attention(x) + mlp(x))."""

    def compute(self, x: Tensor, branch: Tensor | None, inputs: AttentionInputs) -> Stream:
        assert branch is None, "a post-norm block leaves nothing to add"
        _, y = self.attention_norm(x, self.dropout(self.attention(x, inputs)) + self.dropout(self.mlp(x)))
        return y, None


def build_block(config: ModelConfig, layer: int, backends: Backends, tp: TensorParallel) -> Block:
    """Block number `layer` in the form that norm_position and parallel_block name."""
    form: type[Block]
    if config.parallel_block:
        form = ParallelPreNormBlock if config.norm_position == "pre" else ParallelPostNormBlock
    else:
        form = PreNormBlock if config.norm_position == "pre" else PostNormBlock
    return form(config, layer, backends, tp)


def check_recompute(mode: str) -> Recompute:
    """`mode` if it is a valid one; raises ValueError otherwise."""
    if mode not in get_args(Recompute):
        raise ValueError(f"unknown activation checkpointing {mode!r}: choose none, full or selective")
    return cast(Recompute, mode)


def _selective_contexts() -> Any:
    return create_selective_checkpoint_contexts(_keep_expensive)


def _keep_expensive(_context: object, operator: object, *_args: object, **_kwargs: object) -> CheckpointPolicy:
    """Keep the outputs of linear layers and fused attention kernels, but not of bmm (explicit attention scores)."""
    if str(operator).startswith(_EXPENSIVE):
        return CheckpointPolicy.MUST_SAVE
    return CheckpointPolicy.PREFER_RECOMPUTE
