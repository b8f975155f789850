"""Fake implementations of the operators of csrc/, for torch.compile and the meta device: one function per operator."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def wide(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def rms_norm_fwd(x: Tensor, w: Tensor | None, eps: float, w_offset: float) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty((*x.shape[:-1], 1), dtype=wide(x))


def add_rms_norm_fwd(
    x: Tensor, residual: Tensor, w: Tensor | None, eps: float, w_offset: float
) -> tuple[Tensor, Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty(x.shape), x.new_empty((*x.shape[:-1], 1), dtype=wide(x))


def rms_norm_bwd(
    dy: Tensor, dres: Tensor | None, x: Tensor, w: Tensor | None, rstd: Tensor, w_offset: float, need_dw: bool
) -> tuple[Tensor, Tensor]:
    dw = x.new_empty(0) if w is None else w.new_empty(w.shape if need_dw else 0)
    return x.new_empty(x.shape), dw


def swiglu_fwd(gate_up: Tensor) -> Tensor:
    return gate_up.new_empty((*gate_up.shape[:-1], gate_up.shape[-1] // 2))


def swiglu_bwd(dy: Tensor, gate_up: Tensor, recompute_y: bool) -> tuple[Tensor, Tensor]:
    return gate_up.new_empty(gate_up.shape), gate_up.new_empty(dy.shape if recompute_y else 0)


def rope(
    x: Tensor, cos: Tensor, sin: Tensor, positions: Tensor | None, offset: int, interleaved: bool, inverse: bool
) -> Tensor:
    return x.new_empty(x.shape)


def rope_qkv_(qkv: Tensor, *_: Any) -> None:
    return None


def rope_qkv_bwd(dq: Tensor, dk: Tensor, dv: Tensor, *_: Any) -> Tensor:
    b, s, heads, d = dq.shape
    return dq.new_empty(b, s, heads + dk.shape[2] + dv.shape[2], d)


def qk_norm_rope_fwd(
    qkv: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor | None,
    offset: int,
    heads: list[int],
    *_: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    b, s, d = qkv.shape[0], qkv.shape[1], qkv.shape[3]
    groups, q_heads, k_heads = heads[:3]
    q, k = qkv.new_empty(b, s, groups * q_heads, d), qkv.new_empty(b, s, groups * k_heads, d)
    return q, k, qkv.new_empty(b, s, groups * (q_heads + k_heads), dtype=wide(qkv))


def qk_norm_rope_bwd(
    dq: Tensor,
    dk: Tensor,
    dv: Tensor,
    qkv: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor | None,
    rstd: Tensor,
    offset: int,
    heads: list[int],
    w_offset: float,
    interleaved: bool,
    need_dw: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    size = q_weight.shape[0] if need_dw else 0
    return qkv.new_empty(qkv.shape), q_weight.new_empty(size), k_weight.new_empty(size)


def cross_entropy_fwd(logits: Tensor, target: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    max_, sum_, target_logit = (logits.new_empty(logits.shape[0], dtype=wide(logits)) for _ in range(3))
    return max_, sum_, target_logit


def cross_entropy_bwd_(logits: Tensor, *_: Any) -> None:
    return None


FAKES: tuple[Callable[..., Any], ...] = (
    rms_norm_fwd,
    add_rms_norm_fwd,
    rms_norm_bwd,
    swiglu_fwd,
    swiglu_bwd,
    rope,
    rope_qkv_,
    rope_qkv_bwd,
    qk_norm_rope_fwd,
    qk_norm_rope_bwd,
    cross_entropy_fwd,
    cross_entropy_bwd_,
)
