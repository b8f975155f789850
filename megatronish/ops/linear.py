"""Linear layers: torch's, and on CPUs what is faster: oneDNN's product in place of MKL's in fp32, our kernel for skinny GEMMs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatronish.ops.extension import EXTENSION

# oneDNN is selected from this number of rows up.
MIN_ROWS = 64
# Skinny GEMMs: up to this number of rows per sequence (decode, short prompts) the kernel of csrc/cpu/linear_rows.cpp reads the
# weights once, at memory bandwidth; for longer prompts torch's products are faster in bf16 (in fp32 both are equal up to 512).
FEW_ROWS = 64
_FEW_ROWS_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x [..., in] weight[out, in]^T + bias [out] -> [..., out].

    torch takes MKL for fp32 products on CPUs and oneDNN for bf16 ones. On the AMD CPUs measured, oneDNN is 1.1 to 1.7 times
    as fast in fp32, forward and for the gradient of x (docs/benchmarks.md); the gradient of the weight is equally fast. Compiled
    code uses torch's: inductor accepts this operator with constant weights only. Without gradients sequences of up to
    FEW_ROWS rows use our kernel, whatever their number: no row's result depends on the others.
    """
    if not torch.is_grad_enabled() and few_rows(x) and x.dtype == weight.dtype and weight.is_contiguous():
        return rows_product(torch.ops.megatronish.linear_rows, x, weight, bias=bias)
    if not torch.compiler.is_compiling() and _onednn_pays(x, weight):
        result: Tensor = _OneDNNLinear.apply(x, weight, bias)
        return result
    return F.linear(x, weight, bias)


def few_rows(x: Tensor) -> bool:
    """Whether x [..., rows of a sequence, in] is for the kernels of csrc/cpu/linear_rows.cpp."""
    return (
        not torch.compiler.is_exporting()  # a graph for other programs keeps torch's operators, and no length of ours
        and x.device.type == "cpu"
        and (x.ndim == 1 or x.shape[-2] <= FEW_ROWS)
        and x.dtype in _FEW_ROWS_DTYPES
        and not torch.is_grad_enabled()
        and EXTENSION.cpu
        and not torch.is_autocast_enabled("cpu")
    )


def rows_product(operator: Callable[..., Tensor], x: Tensor, *weights: Tensor, bias: Tensor | None) -> Tensor:
    """`operator` of x [..., in] taken as rows -> [..., out]."""
    return operator(x.reshape(-1, x.shape[-1]), *weights, bias).view(*x.shape[:-1], weights[0].shape[0])


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
    """a [n, k] b[m, k]^T + bias [m]; b may be transposed."""
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


def _register_fakes() -> None:
    """Shapes and dtypes of the results, for torch.compile and the meta device."""

    def linear_rows(x: Tensor, weight: Tensor, *_: object) -> Tensor:
        return x.new_empty(x.shape[0], weight.shape[0])

    for name in ("linear_rows", "linear_rows_int8", "linear_rows_int4"):
        torch.library.register_fake(f"megatronish::{name}", linear_rows)


if EXTENSION.cpu:
    _register_fakes()
