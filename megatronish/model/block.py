"""One transformer block; each form's `compute` is its equation."""

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
# The residual stream between blocks is the sum of two tensors (of one, where the second is None): the next norm adds them
# up while it reads them.
Stream = tuple[Tensor, Tensor | None]
# What selective recomputation keeps, by the start of the operator's name.
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

    def compute(self, x: Tensor, residual: Tensor | None, inputs: AttentionInputs) -> Stream:
        """The block's equation, for the stream x + residual [b, s, hidden]."""
        raise NotImplementedError

    def forward(self, x: Tensor, residual: Tensor | None, inputs: AttentionInputs) -> Stream:
        """`compute`, with its intermediate results kept or recomputed as `recompute` says."""
        if self.recompute == "none" or not torch.is_grad_enabled():
            return self.compute(x, residual, inputs)
        if residual is not None:
            x, residual = x + residual, None  # one tensor to keep instead of two
        if self.recompute == "full":
            return checkpoint(self.compute, x, residual, inputs, use_reentrant=False)
        inputs = replace(inputs, in_place=False)  # the projections are kept as they are, for the second pass
        return checkpoint(self.compute, x, residual, inputs, use_reentrant=False, context_fn=_selective_contexts)


class PreNormBlock(Block):
    """h = x + attention(norm(x)); h + mlp(norm(h))."""

    def compute(self, x: Tensor, residual: Tensor | None, inputs: AttentionInputs) -> Stream:
        y, x = self.attention_norm(x, residual)
        y, x = self.mlp_norm(self.dropout(self.attention(y, inputs)), x)
        return self.dropout(self.mlp(y)), x


class PostNormBlock(Block):
    """h = norm(x + attention(x)); norm(h + mlp(h)) (Vaswani et al. 2017)."""

    def compute(self, x: Tensor, residual: Tensor | None, inputs: AttentionInputs) -> Stream:
        assert residual is None, "a post-norm block hands on one tensor"
        x, _ = self.attention_norm(self.dropout(self.attention(x, inputs)), x)
        x, _ = self.mlp_norm(self.dropout(self.mlp(x)), x)
        return x, None


class ParallelPreNormBlock(Block):
    """x + attention(norm(x)) + mlp(norm'(x)); norm' is norm itself when the norm is shared (Wang 2021, GPT-J)."""

    def compute(self, x: Tensor, residual: Tensor | None, inputs: AttentionInputs) -> Stream:
        y, x = self.attention_norm(x, residual)
        z = y if self.shared_norm else self.mlp_norm(x)[0]
        return self.dropout(self.attention(y, inputs)) + self.dropout(self.mlp(z)), x


class ParallelPostNormBlock(Block):
    """norm(x + attention(x) + mlp(x))."""

    def compute(self, x: Tensor, residual: Tensor | None, inputs: AttentionInputs) -> Stream:
        assert residual is None, "a post-norm block hands on one tensor"
        branches = self.dropout(self.attention(x, inputs)) + self.dropout(self.mlp(x))
        return self.attention_norm(branches, x)[0], None


def build_block(config: ModelConfig, layer: int, backends: Backends, tp: TensorParallel) -> Block:
    """Block number `layer` in the form that norm_position and parallel_block name."""
    form: type[Block]
    if config.parallel_block:
        form = ParallelPreNormBlock if config.norm_position == "pre" else ParallelPostNormBlock
    else:
        form = PreNormBlock if config.norm_position == "pre" else PostNormBlock
    return form(config, layer, backends, tp)


def check_recompute(mode: str) -> Recompute:
    """`mode` itself; raises ValueError if it is none of the three."""
    if mode not in get_args(Recompute):
        raise ValueError(f"unknown activation checkpointing {mode!r}: choose none, full or selective")
    return cast(Recompute, mode)


def _selective_contexts() -> Any:
    return create_selective_checkpoint_contexts(_keep_expensive)


def _keep_expensive(_context: object, operator: object, *_args: object, **_kwargs: object) -> CheckpointPolicy:
    """Keep the outputs of linear layers and fused attention kernels; bmm (explicit scores) is not among them."""
    if str(operator).startswith(_EXPENSIVE):
        return CheckpointPolicy.MUST_SAVE
    return CheckpointPolicy.PREFER_RECOMPUTE
