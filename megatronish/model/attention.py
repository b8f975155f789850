"""Grouped-query self-attention with rotary positions.

Shapes: b batch, s sequence, h query heads, g key/value heads, d head_dim.
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from megatronish.config.model import ModelConfig
from megatronish.model.kv_cache import KVCache
from megatronish.model.norm import RMSNorm, build_norm
from megatronish.model.sharded_layers import build_qkv, build_row, local_heads
from megatronish.ops.attention import attention
from megatronish.ops.dispatch import Backends
from megatronish.ops.qk_norm_rope import qk_norm_rope
from megatronish.ops.rope import rope, rope_qkv_
from megatronish.parallel.layers import TensorParallel
from megatronish.parallel.mesh import Axis
from megatronish.parallel.rng import fork_rng_per_rank
from megatronish.parallel.sequence import heads_to_ranks, sequence_to_ranks


@dataclass(frozen=True)
class AttentionInputs:
    """What the attention of every block needs in addition to the hidden states; built once per forward pass."""

    cos: Tensor  # [positions, rotary / 2] fp32
    sin: Tensor
    positions: Tensor | None = None  # [b, s] int32; None: offset, offset + 1, ...
    offset: int = 0
    cu_seqlens: Tensor | None = None  # int32 [documents + 1]
    max_seqlen: int | None = None
    masks: dict[int | None, Tensor] | None = None  # by window; only those that the backend needs
    cache: KVCache | None = None
    in_place: bool = True  # whether rope may overwrite the packed projection
    sp: Axis = field(
        default_factory=Axis
    )  # ranks that shard the sequence; cu_seqlens and masks are of the full sequence


class SelfAttention(nn.Module):
    """out(softmax(rope(q) rope(k)^T / sqrt(d)) v) with q, k, v from one packed projection: rows [q heads; k; v]."""

    def __init__(self, config: ModelConfig, layer: int, backends: Backends, tp: TensorParallel) -> None:
        super().__init__()
        self.heads, self.kv_heads = local_heads(config, tp)
        self.head_dim = config.resolved_head_dim
        self.layer = layer
        self.tp = tp
        self.window = config.layer_window(layer)
        self.backends = backends
        self.dropout = config.attention_dropout
        self.interleaved = config.rope_interleaved
        self.rotates = config.rotary_dim > 0
        self.qkv = build_qkv(config, tp)
        width = config.num_attention_heads * self.head_dim
        self.out = build_row(width, config.hidden_size, config.attention_out_bias, tp)
        self.q_norm = build_norm(config, self.head_dim, backends.ops, tp, of_heads=True) if config.qk_norm else None
        self.k_norm = build_norm(config, self.head_dim, backends.ops, tp, of_heads=True) if config.qk_norm else None

    def forward(self, x: Tensor, inputs: AttentionInputs) -> Tensor:
        """x [b, s, hidden], or the rank's chunk of the sequence -> the same shape."""
        qkv = self.qkv(x)
        b, s, _ = qkv.shape  # the full sequence, where x is a chunk of it
        qkv = qkv.view(b, s, self.heads + 2 * self.kv_heads, self.head_dim)
        q_bshd, k_bsgd, v_bsgd = self._normed_and_rotated(qkv, inputs)
        if inputs.cache is not None:
            out_bshd = inputs.cache.attend(self.layer, q_bshd, k_bsgd, v_bsgd, self.window, self.backends.attention)
        else:
            out_bshd = self._attend(q_bshd, k_bsgd, v_bsgd, inputs)
        y: Tensor = self.out(out_bshd.flatten(2))
        return y

    def _normed_and_rotated(self, qkv: Tensor, inputs: AttentionInputs) -> tuple[Tensor, Tensor, Tensor]:
        """qkv [b, s, h + 2g, d] -> rope(norm(q)), rope(norm(k)), v, by one fused operator where there is one."""
        angles: Any = {
            "cos": inputs.cos,
            "sin": inputs.sin,
            "positions": inputs.positions,
            "offset": inputs.offset,
            "interleaved": self.interleaved,
            "backend": self.backends.ops,
        }
        if self.rotates and self.q_norm is None and inputs.in_place:
            return rope_qkv_(qkv, self.kv_heads, **angles)
        if self.rotates and isinstance(self.q_norm, RMSNorm) and isinstance(self.k_norm, RMSNorm):
            heads = (1, self.heads, self.kv_heads, self.kv_heads)
            scales = self.q_norm.scale, self.k_norm.scale
            return qk_norm_rope(qkv, *scales, heads=heads, eps=self.q_norm.eps, **angles)
        q_bshd, k_bsgd, v_bsgd = qkv.split((self.heads, self.kv_heads, self.kv_heads), dim=2)
        if self.q_norm is not None and self.k_norm is not None:
            (_, q_bshd), (_, k_bsgd) = self.q_norm(q_bshd), self.k_norm(k_bsgd)
        if self.rotates:
            q_bshd, k_bsgd = rope(q_bshd, **angles), rope(k_bsgd, **angles)
        return q_bshd, k_bsgd, v_bsgd

    def _attend(self, q_bshd: Tensor, k_bsgd: Tensor, v_bsgd: Tensor, inputs: AttentionInputs) -> Tensor:
        """softmax(q k^T / sqrt(d)) v [b, s, h, d]; with a sharded sequence, all-to-alls before and after it (Ulysses)."""
        if inputs.sp.group is not None:
            q_bshd, k_bsgd, v_bsgd = heads_to_ranks((q_bshd, k_bsgd, v_bsgd), inputs.sp.group)
        dropout = self.dropout if self.training else 0.0
        # Tensor-parallel ranks hold different heads, so their dropout masks differ.
        with fork_rng_per_rank(self.tp.rank, q_bshd.device) if dropout and self.tp.size > 1 else nullcontext():
            out_bshd = attention(
                q_bshd,
                k_bsgd,
                v_bsgd,
                backend=self.backends.attention,
                window=self.window,
                cu_seqlens=inputs.cu_seqlens,
                max_seqlen=inputs.max_seqlen,
                dropout_p=dropout,
                mask=None if inputs.masks is None else inputs.masks.get(self.window),
            )
        return out_bshd if inputs.sp.group is None else sequence_to_ranks(out_bshd, inputs.sp.group)
