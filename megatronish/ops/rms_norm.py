"""RMSNorm (Zhang and Sennrich 2019): x / sqrt(mean(x^2) + eps) * weight."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class _RMSNorm(torch.autograd.Function):
    """fp32 arithmetic with one rounding at each store; keeps x and one number a row for the backward pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        wide = x.float() if x.dtype != torch.float64 else x
        rstd = torch.rsqrt(wide.square().mean(dim=-1, keepdim=True).add_(eps))
        ctx.save_for_backward(x, weight, rstd)
        return (wide * rstd).mul_(weight).to(x.dtype)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        x, weight, rstd = ctx.saved_tensors
        wide = x.float() if x.dtype != torch.float64 else x
        grad = grad.to(wide.dtype)
        normed = wide * rstd
        product = grad * normed
        grad_weight = product.flatten(0, -2).sum(dim=0)
        # d/dx of x * rstd(x): rstd * (g w - normed * mean(g w normed)); the mean is a matrix-vector product.
        mean = (product @ weight.to(wide.dtype)).div_(x.shape[-1]).unsqueeze(-1)
        grad_x = (grad * weight).sub_(normed.mul_(mean)).mul_(rstd)
        return grad_x.to(x.dtype), grad_weight.to(weight.dtype), None


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Normalise the last dim of x [..., n] by its root mean square and scale by weight [n]; result in x's dtype.

    Raises ValueError if weight does not have one element per channel.
    """
    if weight.shape != x.shape[-1:]:
        raise ValueError(
            f"rms_norm: weight has shape {tuple(weight.shape)}, expected ({x.shape[-1]},), the last dim of x"
        )
    result: Tensor = _RMSNorm.apply(x, weight, eps)
    return result
