"""One transformer block; each form's `compute` is its equation."""

from __future__ import annotations

from typing import Any, Literal, cast, get_args

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from megatronish.config.model import ModelConfig
from megatronish.model.attention import AttentionInputs, SelfAttention
from megatronish.model.mlp import MLP
from megatronish.model.norm import build_norm
from megatronish.ops.dispatch import AttentionBackend

Recompute = Literal["none", "full", "selective"]


class Block(nn.Module):
    """Attention and feed-forward around a residual stream; see `build_block` for the four forms.

    recompute: "full" keeps only the block's input for the backward pass; "selective" keeps the outputs of matrix
    products and fused attention and computes the cheap operations between them again (Korthikanti et al. 2022).
    """

    def __init__(self, config: ModelConfig, layer: int, backend: AttentionBackend) -> None:
        super().__init__()
        self.recompute: Recompute = "none"
        self.attention_norm = build_norm(config, config.hidden_size)
        self.attention = SelfAttention(config, layer, backend)
        self.mlp_norm = build_norm(config, config.hidden_size) if config.has_mlp_norm else nn.Identity()
        self.shared_norm = config.parallel_block_shared_norm
        self.mlp = MLP(config)
        self.dropout = nn.Dropout(config.residual_dropout) if config.residual_dropout > 0 else nn.Identity()

    def compute(self, x: Tensor, inputs: AttentionInputs) -> Tensor:
        """The block's equation: x [b, s, hidden] -> [b, s, hidden]."""
        raise NotImplementedError

    def forward(self, x: Tensor, inputs: AttentionInputs) -> Tensor:
        """`compute`, with its intermediate results kept or recomputed as `recompute` says."""
        if self.recompute == "none" or not torch.is_grad_enabled():
            return self.compute(x, inputs)
        if self.recompute == "full":
            return checkpoint(self.compute, x, inputs, use_reentrant=False)
        return checkpoint(self.compute, x, inputs, use_reentrant=False, context_fn=_selective_contexts)


class PreNormBlock(Block):
    """h = x + attention(norm(x)); h + mlp(norm(h))."""

    def compute(self, x: Tensor, inputs: AttentionInputs) -> Tensor:
        x = x + self.dropout(self.attention(self.attention_norm(x), inputs))
        return x + self.dropout(self.mlp(self.mlp_norm(x)))


class PostNormBlock(Block):
    """h = norm(x + attention(x)); norm(h + mlp(h)) (Vaswani et al. 2017)."""

    def compute(self, x: Tensor, inputs: AttentionInputs) -> Tensor:
        x = self.attention_norm(x + self.dropout(self.attention(x, inputs)))
        return self.mlp_norm(x + self.dropout(self.mlp(x)))


class ParallelPreNormBlock(Block):
    """x + attention(norm(x)) + mlp(norm'(x)); norm' is norm itself when the norm is shared (Wang 2021, GPT-J)."""

    def compute(self, x: Tensor, inputs: AttentionInputs) -> Tensor:
        attention_input = self.attention_norm(x)
        mlp_input = attention_input if self.shared_norm else self.mlp_norm(x)
        return x + self.dropout(self.attention(attention_input, inputs)) + self.dropout(self.mlp(mlp_input))


class ParallelPostNormBlock(Block):
    """norm(x + attention(x) + mlp(x))."""

    def compute(self, x: Tensor, inputs: AttentionInputs) -> Tensor:
        branches = self.dropout(self.attention(x, inputs)) + self.dropout(self.mlp(x))
        return self.attention_norm(x + branches)


def build_block(config: ModelConfig, layer: int, backend: AttentionBackend) -> Block:
    """Block number `layer` in the form that norm_position and parallel_block name."""
    form: type[Block]
    if config.parallel_block:
        form = ParallelPreNormBlock if config.norm_position == "pre" else ParallelPostNormBlock
    else:
        form = PreNormBlock if config.norm_position == "pre" else PostNormBlock
    return form(config, layer, backend)


def check_recompute(mode: str) -> Recompute:
    """`mode` itself; raises ValueError if it is none of the three."""
    if mode not in get_args(Recompute):
        raise ValueError(f"unknown activation checkpointing {mode!r}: choose none, full or selective")
    return cast(Recompute, mode)


def _selective_contexts() -> Any:
    return create_selective_checkpoint_contexts(_keep_expensive)


def _keep_expensive(_context: object, operator: object, *_args: object, **_kwargs: object) -> CheckpointPolicy:
    """Keep the outputs of linear layers and fused attention kernels; bmm (explicit scores) is not among them."""
    name = str(operator)
    if name.startswith(("aten.mm.", "aten.addmm.", "aten._scaled_dot_product_", "flash_attn", "vllm_flash_attn")):
        return CheckpointPolicy.MUST_SAVE
    return CheckpointPolicy.PREFER_RECOMPUTE
