"""The CUDA kernels against float64, and against themselves: error, strides, in place, the same bits again.

The bars are those of tests/ops/test_fused.py.
"""

import pytest
import torch
from torch import Tensor

from megatronish.ops import reference
from megatronish.ops.cross_entropy import token_losses
from megatronish.ops.extension import EXTENSION
from megatronish.ops.qk_norm_rope import qk_norm_rope
from megatronish.ops.rms_norm import add_rms_norm, rms_norm
from megatronish.ops.rope import rope, rope_qkv_
from megatronish.ops.swiglu import swiglu

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA GPU"),
    pytest.mark.skipif(not EXTENSION.cuda, reason=EXTENSION.cuda_problem or "built"),
]
BARS = {torch.float64: 1e-14, torch.float32: 3e-7, torch.bfloat16: 1.75e-3, torch.float16: 2.2e-4}
WEIGHT_BARS = {torch.float64: 1e-14, torch.float32: 1e-6, torch.bfloat16: 2.2e-3, torch.float16: 2.7e-4}
WIDTHS = [3, 7, 63, 100, 1023, 1024, 2048, 4096, 4097, 8192, 16384, 40000]


def _random(*shape: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    generator = torch.Generator("cuda").manual_seed(seed)
    return torch.randn(shape, generator=generator, device="cuda").to(dtype)


def _leaf(x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    return x.detach().to(dtype or x.dtype).requires_grad_()


def _error(x: Tensor, exact: Tensor) -> float:
    return ((x.double() - exact).norm() / exact.norm()).item()


@pytest.mark.parametrize("dtype", BARS, ids=str)
@pytest.mark.parametrize("width", WIDTHS)
def test_norms(width: int, dtype: torch.dtype) -> None:
    rows = max(20_000 // width, 35)
    x, residual, weight = (
        _leaf(_random(*shape, dtype=dtype, seed=seed))
        for seed, shape in enumerate([(rows, width), (rows, width), (width,)])
    )
    y, total = add_rms_norm(x, residual, weight, 1e-5, backend="fused")
    assert torch.equal(total, x + residual)
    assert torch.equal(y, rms_norm(total, weight, 1e-5, backend="fused"))
    wide, wide_weight = _leaf(total, torch.float64), _leaf(weight, torch.float64)
    exact = reference.rms_norm(wide, wide_weight, 1e-5)
    dy = _random(rows, width, dtype=dtype, seed=3)
    dx, dw = torch.autograd.grad(y, (x, weight), dy, retain_graph=True)
    exact_dx, exact_dw = torch.autograd.grad(exact, (wide, wide_weight), dy.double())
    assert _error(y, exact) < BARS[dtype]
    assert _error(dx, exact_dx) < BARS[dtype]
    assert _error(dw, exact_dw) < WEIGHT_BARS[dtype] * (1 if width > 50 else 3)
    again = torch.autograd.grad(y, (x, weight), dy, retain_graph=True)
    assert torch.equal(again[0], dx) and torch.equal(again[1], dw)
    dtotal = _random(rows, width, dtype=dtype, seed=4)
    (both,) = torch.autograd.grad((y, total), x, (dy, dtotal))
    assert _error(both, exact_dx + dtotal.double()) < BARS[dtype]


@pytest.mark.parametrize("dtype", BARS, ids=str)
@pytest.mark.parametrize("width", WIDTHS)
def test_swiglu(width: int, dtype: torch.dtype) -> None:
    gate_up = _leaf(3 * _random(max(20_000 // width, 5), 2 * width, dtype=dtype))
    wide = _leaf(gate_up, torch.float64)
    y, exact = swiglu(gate_up, backend="fused"), reference.swiglu(wide)
    dy = _random(*y.shape, dtype=dtype, seed=1)
    (grad,), (exact_grad,) = torch.autograd.grad(y, gate_up, dy), torch.autograd.grad(exact, wide, dy.double())
    assert _error(y, exact) < BARS[dtype]
    assert _error(grad, exact_grad) < BARS[dtype]


@pytest.mark.parametrize("dtype", BARS, ids=str)
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize(("head_dim", "half"), [(8, 4), (12, 4), (64, 32), (80, 16), (80, 20), (6, 3), (128, 64)])
def test_rope(head_dim: int, half: int, interleaved: bool, dtype: torch.dtype) -> None:
    angles = torch.outer(torch.arange(80.0), 0.9 ** torch.arange(half))
    cos, sin = angles.cos().cuda(), angles.sin().cuda()
    q_heads, kv_heads = 3 + 2000 // head_dim, 2
    positions = torch.randint(80, (2, 7), device="cuda")
    packed = _random(2, 7, q_heads + 2 * kv_heads, head_dim, dtype=dtype)
    for where in ({"offset": 5}, {"positions": positions}):
        leaf = _leaf(packed)
        apart = leaf[:, :, : q_heads + kv_heads]  # strided
        y = rope(apart, cos, sin, **where, interleaved=interleaved, backend="fused")
        wide = _leaf(apart, torch.float64)
        exact = reference.rope(wide, cos.double(), sin.double(), **where, interleaved=interleaved)
        assert _error(y, exact) < BARS[dtype]
        dy = _random(*y.shape, dtype=dtype, seed=1)
        (dx,), (exact_dx,) = torch.autograd.grad(y, leaf, dy), torch.autograd.grad(exact, wide, dy.double())
        assert _error(dx[:, :, : q_heads + kv_heads], exact_dx) < BARS[dtype]
        q, k, v = rope_qkv_(packed.clone(), kv_heads, cos, sin, **where, interleaved=interleaved, backend="fused")
        assert torch.equal(torch.cat((q, k), dim=2), y)
        assert torch.equal(v, packed[:, :, q_heads + kv_heads :])


@pytest.mark.parametrize("dtype", BARS, ids=str)
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("heads", [(1, 6, 2, 2), (2, 3, 1, 1), (1, 3, 0, 2)])
@pytest.mark.parametrize(
    ("head_dim", "half"), [(64, 32), (80, 40), (96, 48), (128, 64), (256, 128), (128, 16), (80, 10), (67, 16), (6, 3)]
)
def test_qk_norm_rope(
    head_dim: int, half: int, heads: tuple[int, int, int, int], interleaved: bool, dtype: torch.dtype
) -> None:
    angles = torch.outer(torch.arange(80.0), 0.9 ** torch.arange(half))
    cos, sin = angles.cos().cuda(), angles.sin().cuda()
    packed = _leaf(_random(3, 50, heads[0] * sum(heads[1:]), head_dim, dtype=dtype))
    weights = [_leaf(_random(head_dim, dtype=dtype, seed=seed) + 1) for seed in (1, 2)]
    wide = [_leaf(x, torch.float64) for x in (packed, *weights)]
    options = {"heads": heads, "eps": 0.1, "interleaved": interleaved}
    for where in ({"offset": 5}, {"positions": torch.randint(80, (3, 50), device="cuda")}):
        ours = qk_norm_rope(packed, *weights, cos, sin, **options, **where, backend="fused")
        exact = reference.qk_norm_rope(*wide, cos.double(), sin.double(), **options, **where)
        grads = [_random(*y.shape, dtype=dtype, seed=5 + i) for i, y in enumerate(exact)]
        found = torch.autograd.grad(ours, (packed, *weights), grads, retain_graph=True)
        wanted = torch.autograd.grad(exact, wide, [g.double() for g in grads])
        for y, e in zip(ours, exact, strict=True):
            assert e.numel() == 0 or _error(y, e) < BARS[dtype]
        assert _error(found[0], wanted[0]) < BARS[dtype]
        for dw, e in zip(found[1:], wanted[1:], strict=True):
            assert e.norm() == 0 or _error(dw, e) < WEIGHT_BARS[dtype] * (1 if head_dim > 50 else 3)
        again = torch.autograd.grad(ours, (packed, *weights), grads)
        assert all(torch.equal(a, b) for a, b in zip(found, again, strict=True))


@pytest.mark.parametrize("dtype", BARS, ids=str)
@pytest.mark.parametrize("vocabulary", [1, 3, 7, 63, 1000, 4097, 32768, 50257])
def test_cross_entropy(vocabulary: int, dtype: torch.dtype) -> None:
    """Odd vocabularies begin every row at another place within 128 bits."""
    leaf = _leaf(4 * _random(37, vocabulary, dtype=dtype))
    labels = torch.randint(vocabulary, (37,), device="cuda")
    labels[3] = -100
    wide = _leaf(leaf, torch.float64)
    losses, exact = token_losses(leaf, labels, backend="fused"), reference.token_losses(wide, labels)
    torch.testing.assert_close(losses.double(), exact, rtol=1e-6, atol=1e-5 if dtype != torch.float64 else 1e-13)
    grad = _random(37, dtype=losses.dtype, seed=1)
    (ours,), (theirs,) = torch.autograd.grad(losses, leaf, grad), torch.autograd.grad(exact, wide, grad.double())
    unit = torch.finfo(dtype).eps
    # Exponents of up to some 40, of which each rounding is a relative error; one rounding at the store.
    rtol = unit / 2 + 40 * torch.finfo(losses.dtype).eps
    torch.testing.assert_close(ours.double(), theirs, rtol=rtol, atol=4 * torch.finfo(losses.dtype).eps + 6e-8 * unit)
    assert not ours[3].any()


def test_a_label_outside_the_vocabulary_gives_nan_for_its_token_only() -> None:
    losses = token_losses(torch.zeros(3, 8, device="cuda"), torch.tensor([0, 8, -1], device="cuda"), backend="fused")
    assert losses[0].isfinite() and losses[1:].isnan().all()


def test_a_position_outside_the_tables_gives_nan_for_its_token_only() -> None:
    cos, sin = torch.ones(10, 4, device="cuda"), torch.zeros(10, 4, device="cuda")
    x = _random(1, 3, 2, 8, dtype=torch.bfloat16)
    y = rope(x, cos, sin, torch.tensor([[0, 10, -1]], device="cuda"), backend="fused")
    assert torch.equal(y[:, 0], x[:, 0])
    assert y[:, 1:].isnan().all()


def test_no_tokens() -> None:
    x, weight = torch.zeros(0, 64, device="cuda", requires_grad=True), torch.ones(64, device="cuda", requires_grad=True)
    rms_norm(x, weight, 1e-5, backend="fused").sum().backward()
    assert torch.equal(weight.grad, torch.zeros_like(weight))
    assert swiglu(x, backend="fused").shape == (0, 32)
