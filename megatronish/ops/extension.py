"""The operators of csrc/ in torch: importing this module registers them as `torch.ops.megatronish.*`.

Registering operators is the only side effect of importing this package. Where the libraries are not built, nothing is
registered and EXTENSION holds the reason.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatronish.ops.fakes import FAKES

BUILD_HINT = "run `python setup.py build_ext --inplace` in the source folder (it needs a C++ compiler)"


@dataclass(frozen=True)
class Extension:
    """Which libraries were loaded; a problem is empty where there is none."""

    cpu: bool
    cuda: bool
    cpu_problem: str
    cuda_problem: str


def _load() -> Extension:
    folder = Path(__file__).resolve().parents[1]
    cpu_problem = _load_library(folder / "_C.so")
    if not cpu_problem:
        for fake in FAKES:
            torch.library.register_fake(f"megatronish::{fake.__name__}", fake)
    if cpu_problem:
        cuda_problem = cpu_problem
    elif torch.version.cuda is None:
        cuda_problem = "this torch has no CUDA"
    else:
        cuda_problem = _load_library(folder / "_C_cuda.so")
    return Extension(not cpu_problem, not cuda_problem, cpu_problem, cuda_problem)


def _load_library(path: Path) -> str:
    """Load one operator library; the reason why not, or ""."""
    if not path.is_file():
        return f"{path.name} is not built: {BUILD_HINT}"
    try:
        torch.ops.load_library(str(path))
    except OSError as error:
        return f"{path.name} does not load ({error}): {BUILD_HINT} again"
    return ""


class _NoContext:
    """The autograd context of a forward pass without gradients."""

    def save_for_backward(self, *_tensors: Tensor | None) -> None:
        """Save nothing."""

    def set_materialize_grads(self, _value: bool) -> None:
        """No gradients are computed."""


def run(function: type[torch.autograd.Function], *arguments: Any) -> Any:
    """`function.apply`, or without gradients its forward pass alone: autograd takes longer than the kernel for one token."""
    if torch.is_grad_enabled() or torch.compiler.is_compiling():
        return function.apply(*arguments)
    return function.forward(_NoContext(), *arguments)


class FusedRMSNorm(torch.autograd.Function):
    """Saves x, the weight and rstd."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor | None, eps: float, offset: float) -> Tensor:
        y, rstd = torch.ops.megatronish.rms_norm_fwd(x, weight, eps, offset)
        ctx.save_for_backward(x, weight, rstd)
        ctx.offset = offset
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, rstd = ctx.saved_tensors
        need_dw = ctx.needs_input_grad[1]
        dx, dw = torch.ops.megatronish.rms_norm_bwd(dy, None, x, weight, rstd, ctx.offset, need_dw)
        return dx, dw if need_dw else None, None, None


class FusedRMSNormThrough(torch.autograd.Function):
    """norm(x) and x itself, whose gradient is added in the kernel as that of the sum in FusedAddRMSNorm is."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor | None, eps: float, offset: float) -> tuple[Tensor, Tensor]:
        y, rstd = torch.ops.megatronish.rms_norm_fwd(x, weight, eps, offset)
        ctx.save_for_backward(x, weight, rstd)
        ctx.offset = offset
        ctx.set_materialize_grads(False)
        return y, x.view_as(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor | None, dx: Tensor | None) -> tuple[Tensor | None, ...]:
        x, weight, rstd = ctx.saved_tensors
        if dy is None:
            return dx, None, None, None
        need_dw = ctx.needs_input_grad[1]
        dx, dw = torch.ops.megatronish.rms_norm_bwd(dy, dx, x, weight, rstd, ctx.offset, need_dw)
        return dx, dw if need_dw else None, None, None


class FusedAddRMSNorm(torch.autograd.Function):
    """norm(x + residual) and the sum; saves the sum, the weight and rstd."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, residual: Tensor, weight: Tensor | None, eps: float, offset: float
    ) -> tuple[Tensor, Tensor]:
        y, total, rstd = torch.ops.megatronish.add_rms_norm_fwd(x, residual, weight, eps, offset)
        ctx.save_for_backward(total, weight, rstd)
        ctx.offset = offset
        ctx.set_materialize_grads(False)  # the sum returned by the final norm has no gradient
        return y, total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor | None, dtotal: Tensor | None) -> tuple[Tensor | None, ...]:
        total, weight, rstd = ctx.saved_tensors
        if dy is None:
            return dtotal, dtotal, None, None, None
        need_dw = ctx.needs_input_grad[2]
        dx, dw = torch.ops.megatronish.rms_norm_bwd(dy, dtotal, total, weight, rstd, ctx.offset, need_dw)
        return dx, dx, dw if need_dw else None, None, None


class FusedSwiGLU(torch.autograd.Function):
    """Saves only the packed input."""

    @staticmethod
    def forward(ctx: Any, gate_up: Tensor) -> Tensor:
        ctx.save_for_backward(gate_up)
        y: Tensor = torch.ops.megatronish.swiglu_fwd(gate_up)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> Tensor:
        dgate_up: Tensor = torch.ops.megatronish.swiglu_bwd(dy, ctx.saved_tensors[0], False)[0]
        return dgate_up


class FusedRope(torch.autograd.Function):
    """Saves nothing of x: the gradient of a rotation is the inverse rotation."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, cos: Tensor, sin: Tensor, positions: Tensor | None, offset: int, interleaved: bool
    ) -> Tensor:
        ctx.save_for_backward(cos, sin, positions)
        ctx.offset, ctx.interleaved = offset, interleaved
        y: Tensor = torch.ops.megatronish.rope(x, cos, sin, positions, offset, interleaved, False)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        cos, sin, positions = ctx.saved_tensors
        dx = torch.ops.megatronish.rope(dy, cos, sin, positions, ctx.offset, ctx.interleaved, True)
        return dx, None, None, None, None, None


class FusedRopeQKV(torch.autograd.Function):
    """Rotates the q and k heads of a packed projection in place and returns q, k and v as views of it."""

    @staticmethod
    def forward(
        ctx: Any,
        qkv: Tensor,
        cos: Tensor,
        sin: Tensor,
        positions: Tensor | None,
        heads: tuple[int, int],
        interleaved: bool,
    ) -> tuple[Tensor, ...]:
        ctx.save_for_backward(cos, sin, positions)
        ctx.interleaved = interleaved
        packed = qkv.detach()
        torch.ops.megatronish.rope_qkv_(
            packed, cos, sin, positions, 1, heads[0], heads[1], heads[1], interleaved, False
        )
        torch.autograd.graph.increment_version(packed)  # shares storage with qkv: saved copies of qkv are invalid now
        return packed.split((heads[0], heads[1], heads[1]), dim=2)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dq: Tensor, dk: Tensor, dv: Tensor) -> tuple[Tensor | None, ...]:
        cos, sin, positions = ctx.saved_tensors
        dqkv = torch.ops.megatronish.rope_qkv_bwd(dq, dk, dv, cos, sin, positions, 1, ctx.interleaved)
        return dqkv, None, None, None, None, None


class FusedQKNormRope(torch.autograd.Function):
    """Saves the packed projection, of which v is a view, and rstd per head; heads: groups, and q, k, v heads of each."""

    @staticmethod
    def forward(
        ctx: Any,
        qkv: Tensor,
        q_weight: Tensor,
        k_weight: Tensor,
        cos: Tensor,
        sin: Tensor,
        positions: Tensor | None,
        offset: int,
        heads: tuple[int, int, int, int],
        eps: float,
        w_offset: float,
        interleaved: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        q, k, rstd = torch.ops.megatronish.qk_norm_rope_fwd(
            qkv, q_weight, k_weight, cos, sin, positions, offset, heads, eps, w_offset, interleaved
        )
        ctx.save_for_backward(qkv, q_weight, k_weight, cos, sin, positions, rstd)
        ctx.offset, ctx.heads, ctx.w_offset, ctx.interleaved = offset, heads, w_offset, interleaved
        groups, q_heads, k_heads, _ = heads
        grouped = qkv.detach().unflatten(2, (groups, qkv.shape[2] // groups))
        return q, k, grouped[:, :, :, q_heads + k_heads :].flatten(2, 3)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dq: Tensor, dk: Tensor, dv: Tensor) -> tuple[Tensor | None, ...]:
        qkv, q_weight, k_weight, cos, sin, positions, rstd = ctx.saved_tensors
        need_dw = ctx.needs_input_grad[1] or ctx.needs_input_grad[2]
        dqkv, dq_weight, dk_weight = torch.ops.megatronish.qk_norm_rope_bwd(
            dq, dk, dv, qkv, q_weight, k_weight, cos, sin, positions, rstd,
            ctx.offset, ctx.heads, ctx.w_offset, ctx.interleaved, need_dw,
        )  # fmt: skip
        grads: tuple[Tensor | None, ...] = (dq_weight, dk_weight) if need_dw else (None, None)
        return dqkv, *grads, *(None,) * 8


EXTENSION = _load()
