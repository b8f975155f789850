"""QK-norm with RoPE in one pass, at every instruction-set level: error, layouts, strides, threads, extremes.

The bars are those of test_fused.py: fp32 3e-7, and 1e-6 for a sum over tokens; 16 bits one rounding at the store.
"""

import pytest
import torch
from torch import Tensor

from megatronish.ops import reference
from megatronish.ops.extension import EXTENSION
from megatronish.ops.qk_norm_rope import MAX_FUSED_HEAD_DIM, qk_norm_rope

pytestmark = pytest.mark.skipif(not EXTENSION.cpu, reason=EXTENSION.cpu_problem or "built")

BARS = {torch.float64: 1e-14, torch.float32: 3e-7, torch.bfloat16: 1.75e-3, torch.float16: 2.2e-4}
WEIGHT_BARS = {torch.float64: 1e-14, torch.float32: 1e-6, torch.bfloat16: 2.2e-3, torch.float16: 2.7e-4}
# head_dim, rotary / 2: the usual sizes, parts of a head, and widths that no vector fits.
SIZES = [(64, 32), (80, 40), (96, 48), (128, 64), (256, 128), (80, 10), (67, 16), (7, 3), (2, 1), (9, 0), (1024, 300)]
LAYOUTS = [(1, 6, 2, 2), (2, 3, 1, 1), (1, 3, 0, 2)]  # [q; k; v], Megatron's groups, no k


def _random(*shape: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def _tables(half: int, rows: int = 80) -> tuple[Tensor, Tensor]:
    angles = torch.outer(torch.arange(rows).double(), 0.9 ** torch.arange(half).double())
    return angles.cos().float(), angles.sin().float()


def _inputs(heads: tuple[int, int, int, int], head_dim: int, dtype: torch.dtype, tokens: int = 40) -> list[Tensor]:
    packed = _random(2, tokens // 2, heads[0] * sum(heads[1:]), head_dim, dtype=dtype)
    return [packed, *(_random(head_dim, dtype=dtype, seed=seed) + 1 for seed in (1, 2))]


def _run(inputs: list[Tensor], grads: list[Tensor] | None, **options: object) -> list[Tensor]:
    """q, k and v; with grads also the gradients of the packed projection and of both weights."""
    leaves = [x.detach().requires_grad_() for x in inputs]
    outputs = qk_norm_rope(*leaves, *options.pop("tables"), options.pop("positions", None), **options)
    if grads is None:
        return [y.detach() for y in outputs]
    return [y.detach() for y in outputs] + list(torch.autograd.grad(outputs, leaves, grads))


def _error(x: Tensor, exact: Tensor) -> float:
    return ((x.double() - exact).norm() / exact.norm()).item()


@pytest.mark.parametrize("dtype", BARS, ids=str)
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize(("head_dim", "half"), SIZES)
def test_error_against_float64(level: str, head_dim: int, half: int, interleaved: bool, dtype: torch.dtype) -> None:
    heads = LAYOUTS[0]
    inputs = _inputs(heads, head_dim, dtype, tokens=max(6000 // (head_dim * 8), 3) * 2)
    batch, length = inputs[0].shape[:2]
    tables = _tables(half, 3 + length)
    positions = torch.randint(3 + length, (batch, length), generator=torch.Generator().manual_seed(3))
    for where in ({"offset": 3}, {"positions": positions}):
        # eps 0.1: no narrow head that happens to be small outweighs all others in the norm of the error.
        options = {"heads": heads, "eps": 0.1, "interleaved": interleaved, **where}
        wide = [x.detach().double().requires_grad_() for x in inputs]
        exact = reference.qk_norm_rope(*wide, *(t.double() for t in tables), **options)
        grads = [_random(*y.shape, dtype=dtype, seed=9 + i) for i, y in enumerate(exact)]
        exact_grads = torch.autograd.grad(exact, wide, [g.double() for g in grads])
        ours = _run(inputs, grads, tables=tables, backend="fused", **options)
        assert torch.equal(ours[2], inputs[0][:, :, 8:])  # v
        assert torch.equal(ours[3][:, :, 8:], grads[2])
        for i in (0, 1):
            assert _error(ours[i], exact[i]) < BARS[dtype]
        assert _error(ours[3], exact_grads[0]) < BARS[dtype]
        for i in (1, 2):
            # head_dim numbers: the fewer, the further their norm of error may stray from its mean.
            assert _error(ours[3 + i], exact_grads[i]) < WEIGHT_BARS[dtype] * (1 if head_dim > 50 else 3)


@pytest.mark.parametrize("heads", LAYOUTS)
@pytest.mark.parametrize("weight_dtype", [torch.bfloat16, torch.float32])
def test_layouts_and_weight_dtypes(level: str, weight_dtype: torch.dtype, heads: tuple[int, int, int, int]) -> None:
    tables, inputs = _tables(16), _inputs(heads, 40, torch.bfloat16)
    inputs[1:] = [w.to(weight_dtype) for w in inputs[1:]]
    options = {"heads": heads, "eps": 1e-6, "tables": tables}
    shapes = [y.shape for y in _run(inputs, None, **options)]
    grads = [_random(*shape, dtype=torch.bfloat16, seed=9 + i) for i, shape in enumerate(shapes)]
    ours = _run(inputs, grads, backend="fused", **options)
    wide = _run(
        [x.double() for x in inputs], [g.double() for g in grads], **options | {"tables": [t.double() for t in tables]}
    )
    assert [x.dtype for x in ours] == [torch.bfloat16] * 4 + [weight_dtype] * 2
    for a, e in zip(ours, wide, strict=True):
        assert a.shape == e.shape
        # 2.5e-3: a weight gradient of 40 numbers, each rounded once, may stray from the mean of its error.
        assert e.numel() == 0 or e.norm() == 0 or _error(a, e) < 2.5e-3


def test_a_weight_offset_and_gradients_of_the_projection_alone(level: str) -> None:
    cos, sin = _tables(8)
    qkv, w, _ = _inputs((1, 2, 1, 1), 24, torch.bfloat16)
    ops, shape = torch.ops.megatronish, (None, 0, [1, 2, 1, 1])
    shifted = ops.qk_norm_rope_fwd(qkv, w.float() + 1.0, w.float() + 1.0, cos, sin, *shape, 1e-6, 0.0, False)
    q, k, rstd = ops.qk_norm_rope_fwd(qkv, w, w, cos, sin, *shape, 1e-6, 1.0, False)
    assert all(torch.equal(a, b) for a, b in zip((q, k, rstd), shifted, strict=True))
    backward = (*(qkv[:, :, part] for part in (slice(0, 2), slice(2, 3), slice(3, 4))), qkv)
    full = ops.qk_norm_rope_bwd(*backward, w, w, cos, sin, None, rstd, 0, [1, 2, 1, 1], 1.0, False, True)
    alone = ops.qk_norm_rope_bwd(*backward, w, w, cos, sin, None, rstd, 0, [1, 2, 1, 1], 1.0, False, False)
    assert torch.equal(full[0], alone[0]) and alone[1].numel() == alone[2].numel() == 0


@pytest.mark.parametrize("dtype", BARS, ids=str)
def test_strides_alignment_and_expanded_gradients_change_nothing(level: str, dtype: torch.dtype) -> None:
    heads = (1, 3, 1, 1)
    inputs = _inputs(heads, 34, dtype)
    packed = inputs[0]
    options = {"heads": heads, "eps": 1e-6, "tables": _tables(12), "backend": "fused"}
    ones = [torch.ones_like(y) for y in _run(inputs, None, **options)]
    expected = _run(inputs, ones, **options)
    buffer = torch.empty(packed.numel() + 1, dtype=dtype)
    wider = torch.cat((packed, packed), dim=2)[:, :, :5]  # heads side by side, tokens further apart
    others = [
        torch.stack((packed, -packed), dim=-1)[..., 0],
        packed.transpose(0, 2).contiguous().transpose(0, 2),
        buffer[1:].view(packed.shape).copy_(packed),
        wider,
    ]
    assert not wider.is_contiguous() and others[2].data_ptr() % 16 != 0
    for other in others:
        for grads in (ones, [torch.ones((), dtype=dtype).expand_as(g) for g in ones]):
            ours = _run([other, *inputs[1:]], grads, **options)
            assert all(torch.equal(a, b) for a, b in zip(ours, expected, strict=True))
    # Gradients in the layout that attention returns, heads before tokens.
    scattered = [_random(*y.shape, dtype=dtype, seed=5 + i) for i, y in enumerate(ones)]
    moved = [g.transpose(1, 2).contiguous().transpose(1, 2) for g in scattered]
    ours = [_run(inputs, g, **options) for g in (scattered, moved)]
    assert all(torch.equal(a, b) for a, b in zip(*ours, strict=True))


def test_the_same_bits_at_any_number_of_threads(level: str) -> None:
    heads, threads = (1, 6, 2, 2), torch.get_num_threads()
    inputs = _inputs(heads, 64, torch.float32, tokens=280)
    options = {"heads": heads, "eps": 1e-6, "tables": _tables(32, 140), "backend": "fused"}
    grads = [_random(*y.shape, dtype=torch.float32, seed=i) for i, y in enumerate(_run(inputs, None, **options))]
    try:
        runs = []
        for number in (1, 2, 3, 2):
            torch.set_num_threads(number)
            runs.append(_run(inputs, grads, **options))
    finally:
        torch.set_num_threads(threads)
    for run in runs[1:]:
        assert all(torch.equal(first, later) for first, later in zip(runs[0], run, strict=True))


@pytest.mark.parametrize("value", [0.0, 1e-30, 1e15, 1e30, float("inf"), float("nan")])
@pytest.mark.parametrize("interleaved", [False, True])
def test_extreme_values_go_the_way_of_the_reference(level: str, interleaved: bool, value: float) -> None:
    heads = (1, 2, 1, 1)
    inputs = _inputs(heads, 38, torch.bfloat16)
    inputs[0][0, 0, 0, 2] = value
    inputs[0][1, 3] = value
    options = {"heads": heads, "eps": 1e-6, "tables": _tables(16), "interleaved": interleaved}
    for ours, theirs in zip(_run(inputs, None, backend="fused", **options), _exact(inputs, options), strict=True):
        tolerance = 2 * torch.finfo(torch.bfloat16).eps
        torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance, equal_nan=True)


def _exact(inputs: list[Tensor], options: dict[str, object]) -> tuple[Tensor, ...]:
    rest = {name: value for name, value in options.items() if name != "tables"}
    return reference.qk_norm_rope(*inputs, *options["tables"], **rest)


@pytest.mark.parametrize("shape", [(0, 4), (2, 0), (1, 1)])
def test_no_tokens_and_one(level: str, shape: tuple[int, int]) -> None:
    heads = (1, 2, 1, 1)
    inputs = [_random(*shape, 4, 16, dtype=torch.float32), *_inputs(heads, 16, torch.float32)[1:]]
    options = {"heads": heads, "eps": 1e-6, "tables": _tables(8)}
    leaves = [x.clone().requires_grad_() for x in inputs]
    exact = _exact(leaves, options)
    grads = [torch.ones_like(y) for y in exact]
    ours = _run(inputs, grads, backend="fused", **options)
    for a, b in zip(ours, [*exact, *torch.autograd.grad(exact, leaves, grads)], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_v_is_a_view_and_nothing_is_changed() -> None:
    (packed, *weights), heads = _inputs((1, 2, 1, 1), 16, torch.float32), (1, 2, 1, 1)
    before = packed.clone()
    _, _, v = qk_norm_rope(packed, *weights, *_tables(8), heads=heads, eps=1e-6, backend="fused")
    assert torch.equal(packed, before)
    assert v.untyped_storage().data_ptr() == packed.untyped_storage().data_ptr()


def test_a_head_wider_than_the_kernel_takes_goes_to_the_composition() -> None:
    heads, width = (1, 1, 1, 1), MAX_FUSED_HEAD_DIM + 2
    inputs = _inputs(heads, width, torch.float32)
    options = {"heads": heads, "eps": 1e-6, "tables": _tables(20)}
    for ours, theirs in zip(_run(inputs, None, backend="fused", **options), _exact(inputs, options), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
    with pytest.raises(RuntimeError, match="qkv: expected head_dim of at most 1024, got 1026"):
        torch.ops.megatronish.qk_norm_rope_fwd(*inputs, *_tables(20), None, 0, list(heads), 1e-6, 0.0, False)
