"""Gated feed-forward activations (Shazeer 2020, "GLU Variants Improve Transformer") on a packed gate and up input."""

from __future__ import annotations

from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from megatronish.ops import third_party
from megatronish.ops.dispatch import OpsBackend, check_floating
from megatronish.ops.extension import FusedSwiGLU, run

Gelu = Literal["none", "tanh"]


class _SwiGLU(torch.autograd.Function):
    """Saves only the packed input: the backward pass recomputes the activation."""

    @staticmethod
    def forward(ctx: Any, gate_up: Tensor) -> Tensor:
        ctx.save_for_backward(gate_up)
        gate, up = gate_up.chunk(2, dim=-1)
        return F.silu(gate) * up

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (gate_up,) = ctx.saved_tensors
        gate, up = gate_up.chunk(2, dim=-1)
        return torch.cat((torch.ops.aten.silu_backward(grad * up, gate), grad * F.silu(gate)), dim=-1)


class _GeGLU(torch.autograd.Function):
    """The same with GELU, in its erf form ("none") or its tanh approximation ("tanh")."""

    @staticmethod
    def forward(ctx: Any, gate_up: Tensor, form: Gelu) -> Tensor:
        ctx.save_for_backward(gate_up)
        ctx.form = form
        gate, up = gate_up.chunk(2, dim=-1)
        return F.gelu(gate, approximate=form) * up

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (gate_up,) = ctx.saved_tensors
        gate, up = gate_up.chunk(2, dim=-1)
        grad_gate = torch.ops.aten.gelu_backward(grad * up, gate, approximate=ctx.form)
        return torch.cat((grad_gate, grad * F.gelu(gate, approximate=ctx.form)), dim=-1), None


def swiglu(gate_up: Tensor, *, backend: OpsBackend = "reference") -> Tensor:
    """silu(gate) * up for gate_up [..., 2F], the gate in the first half; returns [..., F].

    Raises ValueError if the last dim is odd or the dtype is not a floating one.
    """
    _check("swiglu", gate_up)
    result: Tensor
    if backend == "fused":
        result = run(FusedSwiGLU, gate_up)
    elif backend == "liger" and third_party.liger_takes(gate_up):
        result = third_party.liger_swiglu(gate_up)
    else:
        result = _SwiGLU.apply(gate_up)
    return result


def geglu(gate_up: Tensor, *, form: Gelu = "none") -> Tensor:
    """gelu(gate) * up for gate_up [..., 2F], the gate in the first half; returns [..., F]. Plain torch with every backend.

    form: "none" for the erf form, "tanh" for the approximation (Hendrycks and Gimpel 2016). Raises ValueError if the last dim
    is odd or the dtype is not a floating-point one.
    """
    _check("geglu", gate_up)
    result: Tensor = _GeGLU.apply(gate_up, form)
    return result


def _check(name: str, gate_up: Tensor) -> None:
    check_floating(name, "gate_up", gate_up)
    if gate_up.shape[-1] % 2 != 0:
        raise ValueError(
            f"{name}: the last dim of gate_up holds gate and up, so it must be even; got {gate_up.shape[-1]}"
        )
