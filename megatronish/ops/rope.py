"""Rotary position embedding (Su et al. 2021, RoFormer) of queries and keys."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class _Rope(torch.autograd.Function):
    """A rotation is orthogonal, so its backward pass is the rotation by the negative angle: nothing of x is kept."""

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
) -> Tensor:
    """Rotate the leading channels of x [b, s, h, d] by the angle of each token's position; returns a new tensor.

    cos, sin: tables [max_positions, rotary / 2] in fp32 (or wider); channels from `rotary` on pass through.
    positions: int [b, s]; without it token i sits at offset + i. interleaved: pairs are neighbouring channels
    (2i, 2i + 1) instead of (i, i + rotary / 2).
    Raises ValueError for tables that are too narrow, too wide or too short.
    """
    b, s, _, d = x.shape
    if cos.shape != sin.shape or cos.ndim != 2 or 2 * cos.shape[1] > d:
        raise ValueError(
            f"rope: cos {tuple(cos.shape)} and sin {tuple(sin.shape)} must both be [positions, rotary / 2] with rotary "
            f"at most head_dim {d}"
        )
    if positions is None:
        if offset + s > cos.shape[0]:
            raise ValueError(
                f"rope: positions {offset} to {offset + s - 1} do not fit tables of {cos.shape[0]} positions"
            )
        cos, sin = cos[offset : offset + s].view(1, s, 1, -1), sin[offset : offset + s].view(1, s, 1, -1)
    else:
        if positions.shape != (b, s):
            raise ValueError(f"rope: positions have shape {tuple(positions.shape)}, expected ({b}, {s})")
        cos, sin = cos[positions].unsqueeze(2), sin[positions].unsqueeze(2)
    result: Tensor = _Rope.apply(x, cos, sin, interleaved)
    return result
