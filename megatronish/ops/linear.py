"""Linear layers: torch's, and on CPUs in fp32 oneDNN's product in place of MKL's, where it is the faster one."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

# Fewer rows (decoding, say) are no product of matrices worth the choice.
MIN_ROWS = 64


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x [..., in] weight[out, in]^T + bias [out] -> [..., out].

    torch takes MKL for fp32 products on CPUs and oneDNN for bf16 ones. On the AMD CPUs measured, oneDNN is 1.1 to 1.7 times
    as fast in fp32, forward and for the gradient of x (docs/benchmarks.md); the gradient of the weight is level. What is
    compiled keeps torch's: inductor takes this operator with constant weights only.
    """
    if not torch.compiler.is_compiling() and _onednn_pays(x, weight):
        result: Tensor = _OneDNNLinear.apply(x, weight, bias)
        return result
    return F.linear(x, weight, bias)


def _onednn_pays(x: Tensor, weight: Tensor) -> bool:
    return (
        x.device.type == "cpu"
        and x.dtype == weight.dtype == torch.float32
        and torch.is_grad_enabled()
        and (x.requires_grad or weight.requires_grad)
        and x.numel() >= MIN_ROWS * x.shape[-1]
        and not torch.is_autocast_enabled("cpu")
        and torch.backends.mkldnn.is_available()
        and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    )


def _product(a: Tensor, b: Tensor, bias: Tensor | None) -> Tensor:
    """a [n, k] b[m, k]^T + bias [m]; b may lie transposed."""
    result: Tensor = torch.ops.mkldnn._linear_pointwise(a, b, bias, "none", [], "")
    return result


class _OneDNNLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return _product(x.flatten(0, -2), weight, bias).view(*x.shape[:-1], weight.shape[0])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        grad = grad.flatten(0, -2)
        need_x, need_weight, need_bias = ctx.needs_input_grad
        dx = _product(grad, weight.t(), None).view(x.shape) if need_x else None
        dweight = grad.t() @ x.flatten(0, -2) if need_weight else None
        return dx, dweight, grad.sum(0) if need_bias else None
