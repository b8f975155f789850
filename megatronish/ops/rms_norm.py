"""RMSNorm (Zhang and Sennrich 2019): x / sqrt(mean(x^2) + eps) * weight, with or without a preceding residual sum."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from megatronish.ops import third_party
from megatronish.ops.dispatch import OpsBackend, check_floating
from megatronish.ops.extension import FusedAddRMSNorm, FusedRMSNorm, FusedRMSNormThrough, run


class _RMSNorm(torch.autograd.Function):
    """fp32 arithmetic with one rounding at each store; saves x and rstd for the backward pass."""

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


def rms_norm(x: Tensor, weight: Tensor, eps: float, *, backend: OpsBackend = "reference") -> Tensor:
    """Normalise the last dim of x [..., n] by its root mean square and scale by weight [n]; result in x's dtype.

    weight: in x's dtype or fp32. Raises ValueError for another dtype, or if weight does not have one element per channel.
    """
    _check("rms_norm", x, weight)
    result: Tensor
    if backend == "fused":
        result = run(FusedRMSNorm, x, weight, eps, 0.0)
    elif backend == "liger" and third_party.liger_takes(x):
        result = third_party.liger_rms_norm(x, weight, eps)
    elif backend in ("apex", "apex_rms_norm") and third_party.apex_takes(x, weight):
        result = third_party.apex_rms_norm(x, weight, eps)
    else:
        result = _RMSNorm.apply(x, weight, eps)
    return result


def add_rms_norm(
    x: Tensor, residual: Tensor | None, weight: Tensor, eps: float, *, backend: OpsBackend = "reference"
) -> tuple[Tensor, Tensor]:
    """rms_norm(x + residual) and x + residual, the sum rounded to x's dtype before the norm; see `rms_norm`.

    Without a residual, rms_norm(x) and x: the fused kernel then rounds the gradient of x like that of the sum, so that
    computing the sum beforehand gives the same bits. Raises ValueError also if x and residual differ in shape or dtype.
    """
    _check("add_rms_norm", x, weight)
    if residual is None:
        if backend != "fused":
            return rms_norm(x, weight, eps, backend=backend), x
        y, total = run(FusedRMSNormThrough, x, weight, eps, 0.0)
        return y, total
    if residual.shape != x.shape or residual.dtype != x.dtype:
        raise ValueError(
            f"add_rms_norm: residual is {residual.dtype} of shape {tuple(residual.shape)}, expected {x.dtype} of shape "
            f"{tuple(x.shape)}, as x"
        )
    if backend == "fused":
        y, total = run(FusedAddRMSNorm, x, residual, weight, eps, 0.0)
        return y, total
    if backend == "liger" and third_party.liger_takes(x):
        return third_party.liger_add_rms_norm(x, residual, weight, eps)
    total = x + residual
    return rms_norm(total, weight, eps, backend=backend), total


def _check(name: str, x: Tensor, weight: Tensor) -> None:
    check_floating(name, "x", x)
    if weight.shape != x.shape[-1:]:
        raise ValueError(
            f"{name}: weight has shape {tuple(weight.shape)}, expected ({x.shape[-1]},), the last dim of x"
        )
    if weight.dtype not in (x.dtype, torch.float32):
        raise ValueError(f"{name}: weight is {weight.dtype}, expected {x.dtype}, the dtype of x, or torch.float32")
    if weight.device != x.device:
        raise ValueError(f"{name}: weight is on {weight.device}, expected {x.device}, the device of x")
