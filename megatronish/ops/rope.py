"""Rotary position embedding (Su et al. 2021, RoFormer) of queries and keys."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from megatronish.ops import third_party
from megatronish.ops.dispatch import OpsBackend, check_floating
from megatronish.ops.extension import FusedRope, FusedRopeQKV, run


class _Rope(torch.autograd.Function):
    """A rotation is orthogonal, so its backward pass is the rotation by the negative angle: nothing of x is saved."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
        ctx.save_for_backward(cos, sin)
        ctx.interleaved = interleaved
        return _rotate(x, cos, sin, interleaved)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        cos, sin = ctx.saved_tensors
        return _rotate(grad, cos, -sin, ctx.interleaved), None, None, None


def _rotate(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    """x [b, s, h, d], cos and sin [b or 1, s, 1, rotary / 2]."""
    half = cos.shape[-1]
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    if interleaved:
        a, b = x[..., 0 : 2 * half : 2], x[..., 1 : 2 * half : 2]
        out_a, out_b = out[..., 0 : 2 * half : 2], out[..., 1 : 2 * half : 2]
    else:
        a, b = x[..., :half], x[..., half : 2 * half]
        out_a, out_b = out[..., :half], out[..., half : 2 * half]
    # cos and sin are fp32, so a product with bf16 is an fp32 tensor: the sum is rounded once, at the store.
    out_a.copy_((a * cos).sub_(b * sin))
    out_b.copy_((b * cos).add_(a * sin))
    if x.shape[-1] > 2 * half:
        out[..., 2 * half :].copy_(x[..., 2 * half :])
    return out


def rope(
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor | None = None,
    *,
    offset: int = 0,
    interleaved: bool = False,
    backend: OpsBackend = "reference",
) -> Tensor:
    """Rotate the leading channels of x [b, s, h, d] by the angle of each token's position; returns a new tensor.

    cos, sin: tables [max_positions, rotary / 2] in fp32 (or wider); channels from `rotary` on are copied.
    positions: int [b, s] (int32 saves a conversion); without it token i has position offset + i. interleaved: pairs are
    neighbouring channels (2i, 2i + 1) instead of (i, i + rotary / 2).
    Raises ValueError for tables that are too narrow, too wide or too short.
    """
    check_rotation("rope", x, cos, sin, positions, offset)
    result: Tensor
    if backend == "fused":
        result = run(FusedRope, x, cos, sin, _int32(positions), offset, interleaved)
    elif backend == "liger" and not interleaved and third_party.liger_takes(x):
        other = x.new_zeros(x.shape[0], x.shape[1], 1, x.shape[3])  # Liger's kernel rotates two tensors at a time
        result, _ = third_party.liger_rope(x, other, *_angles(x, cos, sin, positions, offset))
    elif backend == "apex" and positions is None and not interleaved and third_party.apex_takes(x, x):
        cos, sin = _angles(x, cos, sin, None, offset)
        result = third_party.apex_rope(x, cos[0], sin[0])
    else:
        cos, sin = (table.unsqueeze(2) for table in _angles(x, cos, sin, positions, offset))
        result = _Rope.apply(x, cos, sin, interleaved)
    return result


def _angles(x: Tensor, cos: Tensor, sin: Tensor, positions: Tensor | None, offset: int) -> tuple[Tensor, Tensor]:
    """The rows of the tables for each token of x [b, s, h, d]: [b or 1, s, rotary / 2]."""
    if positions is not None:
        return cos[positions], sin[positions]
    part = slice(offset, offset + x.shape[1])
    return cos[part].unsqueeze(0), sin[part].unsqueeze(0)


def rope_qkv_(
    qkv: Tensor,
    kv_heads: int,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor | None = None,
    *,
    offset: int = 0,
    interleaved: bool = False,
    backend: OpsBackend = "reference",
) -> tuple[Tensor, Tensor, Tensor]:
    """Rotated q [b, s, h, d], rotated k and v [b, s, kv_heads, d] of a packed qkv [b, s, h + 2 * kv_heads, d].

    The heads are in the order q, k, v. qkv may be overwritten: the fused kernel rotates it in place and returns views of it.
    The other arguments are those of `rope`. Raises ValueError for arguments that `rope` rejects, for a leaf that requires a
    gradient, and for heads that do not add up.
    """
    check_rotation("rope_qkv_", qkv, cos, sin, positions, offset)
    q_heads = qkv.shape[2] - 2 * kv_heads
    if q_heads < 0 or kv_heads < 0:
        raise ValueError(f"rope_qkv_: qkv has {qkv.shape[2]} heads, expected at least twice the {kv_heads} kv_heads")
    if qkv.is_leaf and qkv.requires_grad and torch.is_grad_enabled():
        raise ValueError(
            "rope_qkv_: qkv is a leaf that requires a gradient, which cannot be changed in place: clone it"
        )
    if backend == "fused" and qkv.is_contiguous():
        if positions is None:
            cos, sin = cos[offset:], sin[offset:]
        q, k, v = run(FusedRopeQKV, qkv, cos, sin, _int32(positions), (q_heads, kv_heads), interleaved)
        return q, k, v
    q, k, v = qkv.split((q_heads, kv_heads, kv_heads), dim=2)
    if backend == "liger" and not interleaved and q_heads > 0 and kv_heads > 0 and third_party.liger_takes(qkv):
        return *third_party.liger_rope(q, k, *_angles(qkv, cos, sin, positions, offset)), v
    q = rope(q, cos, sin, positions, offset=offset, interleaved=interleaved, backend=backend)
    return q, rope(k, cos, sin, positions, offset=offset, interleaved=interleaved, backend=backend), v


def _int32(positions: Tensor | None) -> Tensor | None:
    return None if positions is None else positions.to(torch.int32)


def check_rotation(name: str, x: Tensor, cos: Tensor, sin: Tensor, positions: Tensor | None, offset: int) -> None:
    """Raise ValueError, for operator `name`, unless these tables and positions rotate x [b, s, h, d]."""
    check_floating(name, "x", x)
    if x.ndim != 4:
        raise ValueError(f"{name}: x has shape {tuple(x.shape)}, expected [batch, seq, heads, head_dim]")
    b, s, _, d = x.shape
    if cos.shape != sin.shape or cos.ndim != 2 or 2 * cos.shape[1] > d:
        raise ValueError(
            f"{name}: cos {tuple(cos.shape)} and sin {tuple(sin.shape)} must both be [positions, rotary / 2] with rotary "
            f"at most head_dim {d}"
        )
    wide = (torch.float32, torch.float64) if x.dtype == torch.float64 else (torch.float32,)
    if cos.dtype not in wide or sin.dtype != cos.dtype:
        raise ValueError(f"{name}: cos is {cos.dtype} and sin {sin.dtype}, expected torch.float32 tables")
    if positions is None:
        if offset < 0 or offset + s > cos.shape[0]:
            raise ValueError(
                f"{name}: positions {offset} to {offset + s - 1} do not fit tables of {cos.shape[0]} positions"
            )
    elif positions.shape != (b, s):
        raise ValueError(f"{name}: positions have shape {tuple(positions.shape)}, expected ({b}, {s})")
