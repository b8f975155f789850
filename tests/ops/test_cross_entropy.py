"""Cross-entropy against the reference; and that it never widens the whole of the logits."""

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from megatronish.ops import cross_entropy as module
from megatronish.ops import reference
from megatronish.ops.cross_entropy import cross_entropy


@pytest.fixture(params=[1, 100, 1 << 20], ids=["row_by_row", "slabs", "whole"], autouse=True)
def _slab(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_SLAB_ELEMENTS_CPU", request.param)


# The gradient is rounded once: half a unit in the last place of bf16 and fp16; fp32 goes through exp and a difference.
@pytest.mark.parametrize(("dtype", "bar"), [(torch.float32, 5e-7), (torch.bfloat16, 2**-8), (torch.float16, 2**-11)])
def test_loss_and_gradient(dtype: torch.dtype, bar: float) -> None:
    generator = torch.Generator().manual_seed(0)
    logits = (4 * torch.randn(3, 7, 31, generator=generator)).to(dtype).requires_grad_()
    labels = torch.randint(31, (3, 7), generator=generator)
    labels[0, 2], labels[2, 6] = -100, -100
    wide = logits.detach().double().requires_grad_()
    loss, exact = cross_entropy(logits, labels), F.cross_entropy(wide.flatten(0, 1), labels.flatten(), reduction="sum")
    assert loss.dtype == torch.float32 and loss.ndim == 0
    assert loss.item() == pytest.approx(exact.item(), rel=5e-7)  # fp32 sums whatever the logits are
    assert reference.cross_entropy(logits, labels).item() == pytest.approx(exact.item(), rel=5e-7)
    (0.37 * loss).backward()
    (0.37 * exact).backward()
    assert logits.grad.dtype == dtype
    assert ((logits.grad.double() - wide.grad).norm() / wide.grad.norm()).item() < bar
    assert not logits.grad[0, 2].any() and not logits.grad[2, 6].any()


def test_gradcheck() -> None:
    logits = torch.randn(5, 9, dtype=torch.float64, requires_grad=True)
    labels = torch.tensor([0, 8, -100, 3, 3])
    assert torch.autograd.gradcheck(lambda x: cross_entropy(x, labels), (logits,))


def test_extreme_logits() -> None:
    logits = torch.tensor([[3e4, -3e4, 0.0], [-3e4, 3e4, 0.0]], requires_grad=True)
    loss = cross_entropy(logits, torch.tensor([0, 0]))
    assert loss.item() == 6e4
    loss.backward()
    assert torch.equal(logits.grad, torch.tensor([[0.0, 0.0, 0.0], [-1.0, 1.0, 0.0]]))


def test_nothing_labelled() -> None:
    logits = torch.randn(2, 5, requires_grad=True)
    loss = cross_entropy(logits, torch.full((2,), -100))
    loss.backward()
    assert loss.item() == 0.0 and not logits.grad.any()


class _LargestWide(TorchDispatchMode):
    """Largest fp32 tensor that any operator makes."""

    largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        out = func(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor) and out.dtype == torch.float32:
            self.largest = max(self.largest, out.numel())
        return out


def test_bf16_logits_are_never_widened_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_SLAB_ELEMENTS_CPU", 1000)
    logits = torch.randn(64, 100, dtype=torch.bfloat16, requires_grad=True)
    with _LargestWide() as watch:
        cross_entropy(logits, torch.zeros(64, dtype=torch.long)).backward()
    assert 0 < watch.largest <= 1000


def test_messages() -> None:
    with pytest.raises(ValueError, match=r"labels have shape \(2, 4\), expected \(2, 5\)"):
        cross_entropy(torch.randn(2, 5, 3), torch.zeros(2, 4, dtype=torch.long))
