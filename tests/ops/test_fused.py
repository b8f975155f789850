"""The kernels of csrc/ on the CPU, at every instruction-set level: error against float64, shapes, strides, extremes.

Bars: relative L2 error against float64 of the same rounded inputs. fp32: a chain of roundings of 6e-8 each stays under 3e-7,
a weight gradient (a sum over rows) under 1e-6. bf16 and fp16: fp32 arithmetic and one rounding at the store, whose rms is
1.65e-3 and 2.07e-4; 5% above that is room for chance, with some 20,000 numbers in each norm.
"""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from megatronish.ops import reference
from megatronish.ops.extension import EXTENSION
from megatronish.ops.rms_norm import add_rms_norm, rms_norm
from megatronish.ops.rope import rope, rope_qkv_
from megatronish.ops.swiglu import swiglu

pytestmark = pytest.mark.skipif(not EXTENSION.cpu, reason=EXTENSION.cpu_problem or "built")

BARS = {torch.float64: 1e-14, torch.float32: 3e-7, torch.bfloat16: 1.75e-3, torch.float16: 2.2e-4}
WEIGHT_BARS = {torch.float64: 1e-14, torch.float32: 1e-6, torch.bfloat16: 2.2e-3, torch.float16: 2.7e-4}
DTYPES = list(BARS)
WIDTHS = [1, 3, 7, 63, 100, 1023, 4097]


def _random(*shape: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def _leaf(x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    return x.detach().to(dtype or x.dtype).requires_grad_()


def _error(x: Tensor, exact: Tensor) -> float:
    return ((x.double() - exact).norm() / exact.norm()).item()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", WIDTHS)
def test_rms_norm(level: str, width: int, dtype: torch.dtype) -> None:
    rows = max(20_000 // width, 35)  # 35 rows: partitions of unequal size, and blocks of 4 rows with some left over
    x, weight = _leaf(_random(rows, width, dtype=dtype)), _leaf(_random(width, dtype=dtype, seed=1) + 1)
    wide_x, wide_weight = _leaf(x, torch.float64), _leaf(weight, torch.float64)
    y, exact = rms_norm(x, weight, 1e-5, backend="fused"), reference.rms_norm(wide_x, wide_weight, 1e-5)
    dy = _random(rows, width, dtype=dtype, seed=2)
    dx, dw = torch.autograd.grad(y, (x, weight), dy)
    exact_dx, exact_dw = torch.autograd.grad(exact, (wide_x, wide_weight), dy.double())
    assert (y.dtype, dx.dtype, dw.dtype) == (dtype, dtype, dtype)
    if width > 1:
        assert _error(y, exact) < BARS[dtype]
        assert _error(dx, exact_dx) < BARS[dtype]
        # The weight gradient has `width` numbers: the fewer, the further their norm of error may stray from its mean.
        assert _error(dw, exact_dw) < WEIGHT_BARS[dtype] * (1 if width > 50 else 3)
    else:
        # y is the sign of x times the weight, after four roundings of fp32 and that of the store. dx is what is left of two
        # numbers that cancel, of the size of dy * weight / x: a few roundings of those are all that can be asked.
        unit = torch.finfo(dtype).eps
        wide_unit = torch.finfo(torch.float64 if dtype == torch.float64 else torch.float32).eps
        torch.testing.assert_close(y.double(), exact, rtol=unit / 2 + 2 * wide_unit, atol=0)
        size = (dy.double() * wide_weight / wide_x).detach().abs()
        bound = 8 * wide_unit * size + unit * exact_dx.abs() + torch.finfo(dtype).smallest_normal * unit
        assert ((dx.double() - exact_dx).abs() <= bound).all()
        assert _error(dw, exact_dw) < max(unit, WEIGHT_BARS[dtype])  # a single number


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", WIDTHS)
def test_add_rms_norm_is_a_sum_and_a_norm(level: str, width: int, dtype: torch.dtype) -> None:
    rows = 40
    x, residual = (_leaf(_random(rows, width, dtype=dtype, seed=seed)) for seed in (0, 1))
    weight = _leaf(_random(width, dtype=dtype, seed=2))
    y, total = add_rms_norm(x, residual, weight, 1e-5, backend="fused")
    assert torch.equal(total, x + residual)
    assert torch.equal(y, rms_norm(total, weight, 1e-5, backend="fused"))
    dy, dtotal = (_random(rows, width, dtype=dtype, seed=seed) for seed in (3, 4))
    dx, dres, dw = torch.autograd.grad((y, total), (x, residual, weight), (dy, dtotal), retain_graph=True)
    assert torch.equal(dx, dres)
    ours = _leaf(total)
    norm_dx, norm_dw = torch.autograd.grad(rms_norm(ours, weight, 1e-5, backend="fused"), (ours, weight), dy)
    assert torch.equal(dw, norm_dw)
    # One rounding of the sum, against one of each part.
    unit = torch.finfo(dtype).eps
    bound = 0.51 * unit * ((norm_dx + dtotal).abs() + norm_dx.abs()).double() + torch.finfo(dtype).smallest_normal
    assert ((dx.double() - (norm_dx.double() + dtotal.double())).abs() <= bound).all()
    (alone,) = torch.autograd.grad(total, x, dtotal, retain_graph=True)  # the norm has no gradient
    assert torch.equal(alone, dtotal)
    (norm_alone,) = torch.autograd.grad(y, x, dy)  # the sum has none
    assert torch.equal(norm_alone, norm_dx)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", WIDTHS)
def test_swiglu(level: str, width: int, dtype: torch.dtype) -> None:
    rows = max(20_000 // width, 5)
    gate_up = _leaf(3 * _random(rows, 2 * width, dtype=dtype))
    wide = _leaf(gate_up, torch.float64)
    y, exact = swiglu(gate_up, backend="fused"), reference.swiglu(wide)
    dy = _random(rows, width, dtype=dtype, seed=1)
    (grad,) = torch.autograd.grad(y, gate_up, dy)
    (exact_grad,) = torch.autograd.grad(exact, wide, dy.double())
    assert _error(y, exact) < BARS[dtype]
    assert _error(grad, exact_grad) < BARS[dtype]
    again = torch.ops.megatronish.swiglu_bwd(dy, gate_up.detach(), True)
    assert torch.equal(again[0], grad)
    assert _error(again[1], exact) < BARS[dtype]


def _tables(half: int, rows: int = 80) -> tuple[Tensor, Tensor]:
    angles = torch.outer(torch.arange(rows).double(), 0.9 ** torch.arange(half).double())
    return angles.cos().float(), angles.sin().float()


ROTATIONS = [(8, 4), (12, 4), (64, 32), (80, 20), (6, 3), (2, 1), (640, 300), (9, 0)]  # head_dim, rotary / 2


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize(("head_dim", "half"), ROTATIONS)
def test_rope(level: str, head_dim: int, half: int, interleaved: bool, dtype: torch.dtype) -> None:
    cos, sin = _tables(half)
    heads = 3 + 2000 // head_dim
    x = _leaf(_random(2, 7, heads, head_dim, dtype=dtype))
    wide = _leaf(x, torch.float64)
    for where in ({"offset": 5}, {"positions": torch.randint(80, (2, 7), generator=torch.Generator().manual_seed(3))}):
        y = rope(x, cos, sin, **where, interleaved=interleaved, backend="fused")
        exact = reference.rope(wide, cos.double(), sin.double(), **where, interleaved=interleaved)
        assert _error(y, exact) < BARS[dtype]
        assert torch.equal(y[..., 2 * half :], x[..., 2 * half :])
        dy = _random(2, 7, heads, head_dim, dtype=dtype, seed=1)
        (dx,), (exact_dx,) = torch.autograd.grad(y, x, dy), torch.autograd.grad(exact, wide, dy.double())
        assert _error(dx, exact_dx) < BARS[dtype]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("offset", [0, 5])
def test_rope_qkv_rotates_q_and_k_in_place(level: str, offset: int, interleaved: bool, dtype: torch.dtype) -> None:
    cos, sin = _tables(10)
    options = {"offset": offset, "interleaved": interleaved}
    leaf = _leaf(_random(2, 7, 4 + 2 + 2, 24, dtype=dtype))
    packed = leaf * 1
    q, k, v = rope_qkv_(packed, 2, cos, sin, **options, backend="fused")
    assert {part.untyped_storage().data_ptr() for part in (q, k, v)} == {packed.untyped_storage().data_ptr()}
    apart = _leaf(leaf)
    expected = [
        *(rope(part, cos, sin, **options, backend="fused") for part in (apart[:, :, :4], apart[:, :, 4:6])),
        apart[:, :, 6:],
    ]
    grads = [_random(*part.shape, dtype=dtype, seed=seed) for seed, part in enumerate(expected)]
    for ours, theirs in zip((q, k, v), expected, strict=True):
        assert torch.equal(ours, theirs)
    ours, theirs = torch.autograd.grad((q, k, v), leaf, grads), torch.autograd.grad(expected, apart, grads)
    assert torch.equal(ours[0], theirs[0])


@pytest.mark.parametrize("interleaved", [False, True])
def test_rope_qkv_in_groups(level: str, interleaved: bool) -> None:
    """Megatron's layout: each key/value head follows the query heads that read it."""
    cos, sin = _tables(8)
    positions = torch.arange(14, dtype=torch.int32).view(2, 7)
    packed = _random(2, 7, 3 * (2 + 1 + 1), 16, dtype=torch.float32)
    rotated = torch.ops.megatronish.rope(packed, cos, sin, positions, 0, interleaved, False)
    expected = packed.clone().unflatten(2, (3, 4))
    expected[:, :, :, :3] = rotated.unflatten(2, (3, 4))[:, :, :, :3]
    torch.ops.megatronish.rope_qkv_(packed, cos, sin, positions, 3, 2, 1, 1, interleaved, False)
    assert torch.equal(packed, expected.flatten(2, 3))
    back = packed.clone()
    torch.ops.megatronish.rope_qkv_(back, cos, sin, positions, 3, 2, 1, 1, interleaved, True)
    torch.testing.assert_close(back, _random(2, 7, 12, 16, dtype=torch.float32), rtol=0, atol=2e-6)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("interleaved", [False, True])
def test_rope_qkv_backward_takes_gradients_of_any_strides(level: str, interleaved: bool, dtype: torch.dtype) -> None:
    """Of attention: heads before tokens, channels apart, or one number for all; in groups as in Megatron's layout."""
    cos, sin = _tables(8)
    positions = torch.arange(14, dtype=torch.int32).view(2, 7).flip(1).contiguous()
    dq, dk, dv = (_random(2, 7, heads, 24, dtype=dtype, seed=heads) for heads in (6, 3, 2 * 3))
    grouped = [part.unflatten(2, (3, part.shape[2] // 3)) for part in (dq, dk, dv)]
    rotate = torch.ops.megatronish.rope
    expected = torch.cat(
        [rotate(part.flatten(2, 3), cos, sin, positions, 0, interleaved, True).view_as(part) for part in grouped[:2]]
        + [grouped[2]],
        dim=3,
    ).flatten(2, 3)
    backward = torch.ops.megatronish.rope_qkv_bwd
    heads_first = [part.transpose(1, 2).contiguous().transpose(1, 2) for part in (dq, dk, dv)]
    apart = [torch.stack((part, part), dim=-1)[..., 0] for part in (dq, dk, dv)]
    for parts in ((dq, dk, dv), heads_first, apart):
        assert torch.equal(backward(*parts, cos, sin, positions, 3, interleaved), expected)
    one = torch.ones((), dtype=dtype)
    same = backward(one.expand_as(dq), one.expand_as(dk), one.expand_as(dv), cos, sin, positions, 3, interleaved)
    full = [torch.ones_like(part) for part in (dq, dk, dv)]
    assert torch.equal(same, backward(*full, cos, sin, positions, 3, interleaved))
    empty = backward(dq[:, :0], dk[:, :0], dv[:, :0], cos, sin, None, 3, interleaved)
    assert empty.shape == (2, 0, 15, 24)


def _run_all(x: Tensor, weight: Tensor, call: Callable[[Tensor], Tensor] = lambda y: y) -> list[Tensor]:
    """Every operator forward on x [b, s, h, d] and backward from `call(output)`."""
    cos, sin = _tables(x.shape[-1] // 2)
    outputs = [
        rms_norm(x, weight, 1e-5, backend="fused"),
        *add_rms_norm(x, x.flip(0), weight, 1e-5, backend="fused"),
        swiglu(x, backend="fused"),
        rope(x, cos, sin, backend="fused"),
        rope(x, cos, sin, interleaved=True, backend="fused"),
    ]
    options = {"allow_unused": True, "retain_graph": True}  # two outputs share a node
    gradients = [g for y in outputs for g in torch.autograd.grad(call(y).sum(), (x, weight), **options)]
    return [t.detach() for t in (*outputs, *(g for g in gradients if g is not None))]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_strides_alignment_and_expanded_gradients_change_nothing(level: str, dtype: torch.dtype) -> None:
    x = _random(3, 5, 4, 34, dtype=dtype)
    weight = _leaf(_random(34, dtype=dtype, seed=1))
    expected = _run_all(_leaf(x), weight, lambda y: y * torch.ones_like(y))
    strided = torch.stack((x, -x), dim=-1)[..., 0]
    transposed = x.transpose(0, 2).contiguous().transpose(0, 2)
    buffer = torch.empty(x.numel() + 1, dtype=dtype)
    misaligned = buffer[1:].view(x.shape).copy_(x)  # element size off any vector's boundary
    assert not strided.is_contiguous() and not transposed.is_contiguous()
    assert misaligned.data_ptr() % 16 != 0
    for other in (x, strided, transposed, misaligned):
        for ours, theirs in zip(_run_all(other.detach().requires_grad_(), weight), expected, strict=True):
            assert torch.equal(ours, theirs)


@pytest.mark.parametrize("shape", [(0, 4, 2, 8), (2, 0, 2, 8), (1, 1, 1, 8)], ids=str)
def test_no_tokens_and_one(level: str, shape: tuple[int, ...]) -> None:
    x, weight = _leaf(_random(*shape, dtype=torch.float32)), _leaf(torch.ones(8))
    results = _run_all(x, weight)
    wide = _run_all(_leaf(x, torch.float64), _leaf(weight, torch.float64))
    for ours, theirs in zip(results, wide, strict=True):
        torch.testing.assert_close(ours.double(), theirs, rtol=1e-5, atol=1e-6)
    if x.numel() == 0:
        rms_norm(x, weight, 1e-5, backend="fused").sum().backward()
        assert torch.equal(weight.grad, torch.zeros(8))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("value", [0.0, 1e-30, -1e-30, 1e15, 1e30, -1e30, float("inf"), float("-inf"), float("nan")])
def test_extreme_values_go_the_way_of_the_reference(level: str, value: float, dtype: torch.dtype) -> None:
    cos, sin = _tables(16)
    x = _random(2, 3, 2, 38, dtype=dtype)
    x[0, 0, 0, 2] = value
    x[1] = value
    weight = torch.ones(38, dtype=dtype)
    pairs = [
        (rms_norm(x, weight, 1e-5, backend="fused"), reference.rms_norm(x, weight, 1e-5)),
        (swiglu(x, backend="fused"), reference.swiglu(x)),
        (rope(x, cos, sin, backend="fused"), reference.rope(x, cos, sin)),
        (rope(x, cos, sin, interleaved=True, backend="fused"), reference.rope(x, cos, sin, interleaved=True)),
    ]
    for ours, theirs in pairs:
        tolerance = 2 * torch.finfo(dtype).eps
        torch.testing.assert_close(ours, theirs, rtol=max(tolerance, 1e-5), atol=tolerance, equal_nan=True)


def test_weight_offset_and_missing_weight(level: str) -> None:
    x, weight = _random(20, 40, dtype=torch.bfloat16), _random(40, dtype=torch.bfloat16, seed=1)
    ops = torch.ops.megatronish
    # The offset is added in fp32: 1 + weight in bf16 would round.
    shifted = ops.rms_norm_fwd(x, weight.float() + 1.0, 1e-5, 0.0)[0]
    assert torch.equal(ops.rms_norm_fwd(x, weight, 1e-5, 1.0)[0], shifted)
    assert torch.equal(ops.rms_norm_fwd(x, None, 1e-5, 0.0)[0], ops.rms_norm_fwd(x, torch.ones(40), 1e-5, 0.0)[0])
    rstd = ops.rms_norm_fwd(x, weight, 1e-5, 1.0)[1]
    dy = _random(20, 40, dtype=torch.bfloat16, seed=2)
    ours = ops.rms_norm_bwd(dy, None, x, weight, rstd, 1.0, True)
    theirs = ops.rms_norm_bwd(dy, None, x, weight.float() + 1.0, rstd, 0.0, True)
    assert torch.equal(ours[0], theirs[0])
    assert torch.equal(ours[1], theirs[1].bfloat16())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_same_bits_at_any_number_of_threads(level: str, dtype: torch.dtype) -> None:
    x, weight = _leaf(_random(4, 70, 4, 256, dtype=dtype)), _leaf(_random(256, dtype=dtype, seed=1))
    threads = torch.get_num_threads()
    try:
        runs = []
        for number in (1, 2, 3, 2):
            torch.set_num_threads(number)
            runs.append(_run_all(x, weight, torch.square))
    finally:
        torch.set_num_threads(threads)
    for run in runs[1:]:
        assert all(torch.equal(first, later) for first, later in zip(runs[0], run, strict=True))


def test_half_precision_conversions_are_torch_s(level: str) -> None:
    """Every fp16 and bf16 number survives a rotation by nothing, and fp32 sums round as torch rounds them."""
    for dtype in (torch.bfloat16, torch.float16):
        every = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16).view(dtype)
        every = every[every.isfinite()]
        every = every[: every.numel() // 16 * 16].view(1, 1, -1, 16)
        if dtype == torch.bfloat16:  # the AVX-512 instruction takes subnormals for zeros
            every = every.where(every.abs() >= torch.finfo(dtype).smallest_normal, 0.0)
        still = rope(every, torch.ones(1, 8), torch.zeros(1, 8), backend="fused")
        assert torch.equal(still, every)
        a, b = _random(64, 1000, dtype=dtype), 3 * _random(64, 1000, dtype=dtype, seed=1)
        total = add_rms_norm(a, b, torch.ones(1000, dtype=dtype), 1e-5, backend="fused")[1]
        assert torch.equal(total, a + b)
