"""ops.linear against torch's linear in float64, on both of its paths."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from megatronish.ops import linear as module
from megatronish.ops.linear import linear


def _run(function: object, *inputs: Tensor | None) -> list[Tensor]:
    leaves = [None if x is None else x.detach().clone().requires_grad_() for x in inputs]
    out = function(*leaves)  # type: ignore[operator]
    # Numbers that every dtype has, for the same question to be asked in each.
    grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(9)).bfloat16().to(out.dtype)
    return [out, *torch.autograd.grad(out, [x for x in leaves if x is not None], grad)]


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", [(64, 48), (2, 33, 48), (3, 2, 16, 1), (1, 63, 48)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_equals_torch(dtype: torch.dtype, shape: tuple[int, ...], bias: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    x, weight = (
        torch.randn(shape, generator=generator).to(dtype),
        torch.randn(80, shape[-1], generator=generator).to(dtype),
    )
    b = torch.randn(80, generator=generator).to(dtype) if bias else None
    ours, exact = (
        _run(linear, x, weight, b),
        _run(F.linear, x.double(), weight.double(), None if b is None else b.double()),
    )
    assert len(ours) == 3 + bias
    for mine, right in zip(ours, exact, strict=True):
        assert mine.shape == right.shape and mine.dtype == dtype
        error = ((mine.double() - right).norm() / right.norm()).item()
        # fp32: sums of at most 96 products, 6e-8 a rounding. bf16: one rounding at the store, rms 1.65e-3.
        assert error < (1e-6 if dtype == torch.float32 else 1.8e-3)


def test_which_path_is_taken() -> None:
    x, weight = torch.randn(64, 8), torch.randn(4, 8, requires_grad=True)
    onednn = torch.backends.mkldnn.is_available()
    assert module._onednn_pays(x, weight) == onednn
    assert ("OneDNN" in type(linear(x, weight).grad_fn).__name__) == onednn
    assert not module._onednn_pays(x[:63], weight)
    assert not module._onednn_pays(x.bfloat16(), weight.bfloat16())
    assert not module._onednn_pays(x, weight.detach())  # nothing to train
    with torch.no_grad():
        assert not module._onednn_pays(x, weight)
    with torch.autocast("cpu", torch.bfloat16):
        assert linear(x, weight).dtype == torch.bfloat16


def test_frozen_weight_and_compiled() -> None:
    x, weight = torch.randn(64, 8, requires_grad=True), torch.randn(4, 8)
    (dx,) = torch.autograd.grad(linear(x, weight).sum(), x)
    torch.testing.assert_close(dx, weight.sum(0).expand(64, 8), rtol=1e-6, atol=1e-6)
    weight.requires_grad_()
    eager = _run(linear, x, weight)
    compiled = _run(torch.compile(linear, fullgraph=True), x, weight)
    for a, b in zip(eager, compiled, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)
