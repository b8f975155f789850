"""The operators that are timed: their inputs, their exact result, and the implementations that torch alone gives.

Sizes are rows (tokens) x width (the hidden size; F for SwiGLU). A new operator is one entry of `operators`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from megatronish.ops import reference
from megatronish.ops.cross_entropy import cross_entropy
from megatronish.ops.qk_norm_rope import qk_norm_rope
from megatronish.ops.rms_norm import add_rms_norm, rms_norm
from megatronish.ops.rope import rope, rope_qkv_
from megatronish.ops.swiglu import swiglu

HEAD_DIM = 128
QUERIES_PER_KV_HEAD = 4
EPS = 1e-5
# Directions: "fwd", "bwd", forward then backward, and the same with host time included.
STEP, HOST = "step", "fwd+bwd"

Function = Callable[..., Any]  # (differentiable inputs, constants) -> a tensor or several


@dataclass(frozen=True)
class Operator:
    """One operator. All its implementations take the same arguments: the differentiable inputs, then the constants.

    shapes: of the differentiable inputs, by (rows, width). moved: elements that must be read or written at least once in
    the forward and the backward pass, in units of rows x width; weights and tables are left out.
    exact: as `reference`, given the dtype whose roundings are part of the operator (see add_rms_norm).
    """

    shapes: Callable[[int, int], list[tuple[int, ...]]]
    moved: tuple[float, float]
    fused: Function
    reference: Function
    others: Mapping[str, Function]
    constants: Callable[[int, int, torch.device], tuple[Any, ...]] = lambda rows, width, device: ()
    exact: Callable[..., Any] | None = None
    in_place: bool = False  # the fused kernel overwrites its input
    weight_gradient: bool = False  # the backward pass adds up rows, hence has larger errors
    one_backward: bool = False  # the backward pass uses its input up, so it is timed with a forward pass in front

    @property
    def directions(self) -> tuple[str, ...]:
        """What is timed with the host's time left out."""
        return ("fwd", STEP) if self.one_backward else ("fwd", "bwd")

    def moved_in(self, direction: str) -> float:
        """`moved` for one direction, HOST included."""
        return {"fwd": self.moved[0], "bwd": self.moved[1]}.get(direction, sum(self.moved))

    def exact_result(self, dtype: torch.dtype, *arguments: Any) -> Any:
        """The result for float64 `arguments` that hold values of `dtype`."""
        return self.reference(*arguments) if self.exact is None else self.exact(dtype, *arguments)


def operators() -> dict[str, Operator]:
    """Every operator by name."""
    return {
        "rms_norm": Operator(
            shapes=lambda rows, width: [(rows, width), (width,)],
            moved=(2, 3),
            fused=partial(rms_norm, eps=EPS, backend="fused"),
            reference=partial(reference.rms_norm, eps=EPS),
            others={"eager": eager_rms_norm, "F.rms_norm": lambda x, w: F.rms_norm(x, w.shape, w, EPS)},
            weight_gradient=True,
        ),
        "add_rms_norm": Operator(
            shapes=lambda rows, width: [(rows, width), (rows, width), (width,)],
            moved=(4, 4),
            fused=partial(add_rms_norm, eps=EPS, backend="fused"),
            reference=reference_add_rms_norm,
            others={"eager": eager_add_rms_norm},
            exact=exact_add_rms_norm,
            weight_gradient=True,
        ),
        "swiglu": Operator(
            shapes=lambda rows, width: [(rows, 2 * width)],
            moved=(3, 5),
            fused=partial(swiglu, backend="fused"),
            reference=reference.swiglu,
            others={"eager": eager_swiglu},
        ),
        "rope": Operator(
            shapes=lambda rows, width: [(1, rows, width // HEAD_DIM, HEAD_DIM)],
            moved=(2, 2),
            fused=partial(rope, backend="fused"),
            reference=reference.rope,
            others={"eager": eager_rope},
            constants=rotary_tables,
        ),
        "rope_qkv_": Operator(
            shapes=lambda rows, width: [(1, rows, width // HEAD_DIM + 2 * kv_heads_of(width), HEAD_DIM)],
            # Forward the queries and keys, not the values: 1 + 1 / 4 of the width for four queries a key. Backward the three
            # gradients, and the packed one that they are brought together in.
            moved=(2 + 2 / QUERIES_PER_KV_HEAD, 2 + 4 / QUERIES_PER_KV_HEAD),
            fused=fused_rope_qkv,
            reference=partial(separate_rope_qkv, reference.rope),
            others={"eager": partial(separate_rope_qkv, eager_rope)},
            constants=lambda rows, width, device: (*rotary_tables(rows, width, device), kv_heads_of(width)),
            in_place=True,
        ),
        "qk_norm_rope": Operator(
            shapes=lambda rows, width: [
                (1, rows, width // HEAD_DIM + 2 * kv_heads_of(width), HEAD_DIM),
                (HEAD_DIM,),
                (HEAD_DIM,),
            ],
            # Backward: the gradients of q and k, the projection, and its full gradient, into which that of v is copied.
            moved=(2 + 2 / QUERIES_PER_KV_HEAD, 3 + 5 / QUERIES_PER_KV_HEAD),
            fused=fused_qk_norm_rope,
            reference=partial(separate_qk_norm_rope, partial(reference.rms_norm, eps=EPS), reference.rope),
            others={"eager": partial(separate_qk_norm_rope, eager_rms_norm, eager_rope)},
            constants=lambda rows, width, device: (*rotary_tables(rows, width, device), kv_heads_of(width)),
            weight_gradient=True,
        ),
        "cross_entropy": Operator(
            shapes=lambda rows, width: [vocabulary_shape(rows, width)],
            moved=(1, 2),
            fused=fused_cross_entropy,
            reference=reference.cross_entropy,
            others={"eager": eager_cross_entropy},
            constants=lambda rows, width, device: (some_labels(*vocabulary_shape(rows, width), device),),
            in_place=True,
            one_backward=True,
        ),
    }


def rotary_tables(rows: int, width: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """cos and sin [rows, HEAD_DIM / 2] in fp32, as the model has them."""
    frequencies = 1e4 ** -torch.linspace(0, 1, HEAD_DIM // 2 + 1).double()[:-1]
    angles = torch.outer(torch.arange(rows, dtype=torch.float64), frequencies)
    return angles.cos().to(device, torch.float32), angles.sin().to(device, torch.float32)


def kv_heads_of(width: int) -> int:
    """Key heads for width / HEAD_DIM query heads."""
    return max(1, width // HEAD_DIM // QUERIES_PER_KV_HEAD)


def vocabulary_shape(rows: int, width: int) -> tuple[int, int]:
    """Logits of as many elements as rows x width, over a vocabulary of 8 times the width: 32,768 for 4,096."""
    return max(1, rows // 8), 8 * width


def some_labels(tokens: int, vocabulary: int, device: torch.device) -> Tensor:
    """The same random labels each time."""
    return torch.randint(vocabulary, (tokens,), generator=torch.Generator().manual_seed(7)).to(device)


def eager_rms_norm(x: Tensor, w: Tensor) -> Tensor:
    """The composition that most models are written in: fp32 inside, the weight in the model's dtype."""
    wide = x.float()
    return w * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + EPS)).to(x.dtype)


def eager_add_rms_norm(x: Tensor, residual: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
    """A sum, then `eager_rms_norm`."""
    total = x + residual
    return eager_rms_norm(total, w), total


def reference_add_rms_norm(x: Tensor, residual: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
    """A sum in x's dtype, then the reference norm."""
    total = x + residual
    return reference.rms_norm(total, w, EPS), total


def exact_add_rms_norm(dtype: torch.dtype, x: Tensor, residual: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
    """float64, but the sum is rounded to `dtype` before the norm: that rounding belongs to the operator."""
    total = x + residual
    total = total + (total.to(dtype).double() - total).detach()  # rounded in value, the identity in the gradient
    return reference.rms_norm(total, w, EPS), total


def eager_swiglu(gate_up: Tensor) -> Tensor:
    """silu(gate) * up in the dtype of the input."""
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up


def eager_rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x cos + rotate_half(x) sin, with tables of the full width in the model's dtype."""
    c, s = (torch.cat((t, t), dim=-1).to(x.dtype)[None, :, None] for t in (cos, sin))
    a, b = x.chunk(2, dim=-1)
    return x * c + torch.cat((-b, a), dim=-1) * s


def separate_rope_qkv(rotate: Function, qkv: Tensor, cos: Tensor, sin: Tensor, kv_heads: int) -> tuple[Tensor, ...]:
    """q and k cut out of the packed projection and rotated by `rotate` into new tensors; v is a view."""
    q, k, v = qkv.split((qkv.shape[2] - 2 * kv_heads, kv_heads, kv_heads), dim=2)
    return rotate(q, cos, sin), rotate(k, cos, sin), v


def fused_rope_qkv(qkv: Tensor, cos: Tensor, sin: Tensor, kv_heads: int) -> tuple[Tensor, ...]:
    """In place. A leaf that asks for a gradient cannot be changed in place, so it is copied where autograd records."""
    packed = qkv.clone() if qkv.requires_grad and torch.is_grad_enabled() else qkv
    return rope_qkv_(packed, kv_heads, cos, sin, backend="fused")


def separate_qk_norm_rope(
    norm: Function, rotate: Function, qkv: Tensor, w_q: Tensor, w_k: Tensor, cos: Tensor, sin: Tensor, kv_heads: int
) -> tuple[Tensor, ...]:
    """q and k cut out, normalised by `norm` and rotated by `rotate`, each step into a new tensor; v is a view."""
    q, k, v = qkv.split((qkv.shape[2] - 2 * kv_heads, kv_heads, kv_heads), dim=2)
    return rotate(norm(q, w_q), cos, sin), rotate(norm(k, w_k), cos, sin), v


def fused_qk_norm_rope(
    qkv: Tensor, w_q: Tensor, w_k: Tensor, cos: Tensor, sin: Tensor, kv_heads: int
) -> tuple[Tensor, ...]:
    """In one pass."""
    heads = (1, qkv.shape[2] - 2 * kv_heads, kv_heads, kv_heads)
    return qk_norm_rope(qkv, w_q, w_k, cos, sin, heads=heads, eps=EPS, backend="fused")


def eager_cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """F.cross_entropy of logits in fp32, as most models have it."""
    return F.cross_entropy(logits.float(), labels, reduction="sum")


def fused_cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """The gradient is written over the logits, which in a model are an intermediate result: a view stands for one here."""
    return cross_entropy(logits.view_as(logits), labels, backend="fused")
