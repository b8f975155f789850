"""RMSNorm, SwiGLU, GeGLU and RoPE against the reference and against finite differences.

Bars: relative L2 error against float64 of the same rounded inputs. One fp32 rounding is 6e-8 and a chain of a few stays
under 3e-7 (1e-6 for weight gradients, a long sum); one bf16 rounding has an rms of 1.65e-3, one fp16 rounding 2.1e-4.
SwiGLU and GeGLU are not fused here: in half precision they round each of two or three steps.
"""

from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor

from megatronish.ops import reference
from megatronish.ops.rms_norm import rms_norm
from megatronish.ops.rope import rope
from megatronish.ops.swiglu import geglu, swiglu

ONE_ROUNDING = {torch.float32: 3e-7, torch.bfloat16: 1.8e-3, torch.float16: 2.2e-4}
TABLES = tuple(f(torch.outer(torch.arange(40.0), 0.7 ** torch.arange(4.0))) for f in (torch.cos, torch.sin))
POSITIONS = torch.tensor([[3, 0, 1, 2, 9, 39], [0, 1, 0, 1, 0, 1]])
OPS: dict[str, tuple[Callable[..., Tensor], Callable[..., Tensor], list[tuple[int, ...]], float]] = {
    "rms_norm": (
        lambda x, w: rms_norm(x, w, 1e-5),
        lambda x, w: reference.rms_norm(x, w, 1e-5),
        [(2, 60, 64), (64,)],
        1,
    ),
    "swiglu": (swiglu, reference.swiglu, [(2, 60, 64)], 2),
    "geglu": (geglu, reference.geglu, [(2, 60, 64)], 2),
    "geglu_tanh": (partial(geglu, form="tanh"), partial(reference.geglu, form="tanh"), [(2, 60, 64)], 2),
}
for _interleaved in (False, True):
    for _kind, _where in (("positions", {"positions": POSITIONS}), ("offset", {"offset": 5})):
        for _width in (8, 12):  # all of the head, and part of it
            _options = {"interleaved": _interleaved, **_where}
            OPS[f"rope_{_kind}_{_width}_{'pairs' if _interleaved else 'halves'}"] = (
                lambda x, o=_options: rope(x, *TABLES, **o),
                lambda x, o=_options: reference.rope(x, *TABLES, **o),
                [(2, 6, 50, _width)],
                1,
            )


def _inputs(name: str, dtype: torch.dtype, small: bool = False) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    inputs = [torch.randn(shape, generator=generator).to(dtype) for shape in OPS[name][2]]
    if small:  # fewer heads for RoPE, fewer tokens for the others
        inputs[0] = inputs[0][:, :, :2] if inputs[0].ndim == 4 else inputs[0][:, :2]
    return [x.contiguous().requires_grad_() for x in inputs]


@pytest.mark.parametrize("dtype", ONE_ROUNDING, ids=str)
@pytest.mark.parametrize("name", OPS)
def test_error_against_float64(name: str, dtype: torch.dtype) -> None:
    op, exact_op, _, roundings = OPS[name]
    inputs = _inputs(name, dtype)
    wide = [x.detach().double().requires_grad_() for x in inputs]
    y, exact = op(*inputs), exact_op(*wide)
    assert y.dtype == dtype
    grad = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    ours = torch.autograd.grad(y, inputs, grad)
    theirs = torch.autograd.grad(exact, wide, grad.double())
    bar = ONE_ROUNDING[dtype] * roundings
    assert _error(y, exact) < bar
    for x, a, e in zip(inputs, ours, theirs, strict=True):
        assert a.dtype == dtype
        assert _error(a, e) < (max(bar, 1e-6) if x.ndim == 1 else bar * min(roundings, 1.5))


@pytest.mark.parametrize("name", OPS)
def test_gradcheck(name: str) -> None:
    assert torch.autograd.gradcheck(OPS[name][0], _inputs(name, torch.float64, small=True))


@pytest.mark.parametrize("name", OPS)
def test_strided_inputs_and_gradients(name: str) -> None:
    op = OPS[name][0]
    inputs = _inputs(name, torch.float32)
    strided = [torch.stack((x, -x), dim=-1).detach()[..., 0].requires_grad_() for x in inputs]
    assert not strided[0].is_contiguous()
    # Vectorised and scalar exp and erf differ in the last bit.
    torch.testing.assert_close(op(*strided), op(*inputs), rtol=1e-6, atol=1e-6)
    ours = torch.autograd.grad(op(*strided).sum(), strided)  # a gradient of stride 0
    theirs = torch.autograd.grad(op(*inputs), inputs, torch.ones_like(op(*inputs)))
    for a, e in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, e, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", OPS)
def test_second_derivatives_are_refused(name: str) -> None:
    inputs = _inputs(name, torch.float32)
    (first, *_) = torch.autograd.grad(OPS[name][0](*inputs).square().sum(), inputs, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        first.sum().backward()


def test_no_tokens() -> None:
    weight = torch.ones(8, requires_grad=True)
    rms_norm(torch.zeros(0, 8), weight, 1e-5).sum().backward()
    assert torch.equal(weight.grad, torch.zeros(8))
    assert swiglu(torch.zeros(0, 8)).shape == (0, 4)


def test_rope_leaves_the_rest_and_the_input_alone() -> None:
    x = torch.randn(1, 6, 2, 12)
    before = x.clone()
    y = rope(x, *TABLES)
    assert torch.equal(x, before)
    assert torch.equal(y[..., 8:], x[..., 8:])
    assert torch.equal(y[:, 0], x[:, 0])  # position 0 turns by nothing
    torch.testing.assert_close(y.norm(dim=-1), x.norm(dim=-1))


def test_rope_scores_depend_on_distance_alone() -> None:
    q, k = torch.randn(2, 1, 1, 1, 8, dtype=torch.float64).unbind(0)
    tables = tuple(t.double() for t in TABLES)
    scores = [(rope(q, *tables, offset=i + 7) * rope(k, *tables, offset=i)).sum().item() for i in range(20)]
    assert max(scores) - min(scores) < 1e-5  # TABLES are fp32
    assert abs(scores[0] - (rope(q, *tables, offset=3) * rope(k, *tables)).sum().item()) > 1e-3


def test_messages() -> None:
    x = torch.randn(2, 6, 3, 8)
    with pytest.raises(ValueError, match=r"rms_norm: weight has shape \(4,\), expected \(8,\)"):
        rms_norm(x, torch.ones(4), 1e-5)
    with pytest.raises(ValueError, match="swiglu: .* must be even; got 7"):
        swiglu(x[..., :7])
    with pytest.raises(ValueError, match="geglu: .* must be even; got 7"):
        geglu(x[..., :7])
    with pytest.raises(ValueError, match="positions 36 to 41 do not fit tables of 40 positions"):
        rope(x, *TABLES, offset=36)
    with pytest.raises(ValueError, match=r"positions have shape \(2, 5\), expected \(2, 6\)"):
        rope(x, *TABLES, POSITIONS[:, :5])
    with pytest.raises(ValueError, match="rotary at most head_dim 6"):
        rope(x[..., :6], *TABLES)


def _error(x: Tensor, exact: Tensor) -> float:
    return ((x.double() - exact).norm() / exact.norm()).item()
