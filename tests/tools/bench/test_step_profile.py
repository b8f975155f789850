"""Time is booked on the module that spends it, in the forward and in the backward pass."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.profiler import record_function

from tools.bench.step_profile import KINDS, OPTIMIZER_SCOPE, profile_steps


class _Sorting(torch.autograd.Function):
    """The identity; its backward pass sorts a million numbers, some hundred times the work of all else here."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x * 1

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        torch.rand(1_000_000).sort()
        return grad


class _Layer(nn.Module):
    def __init__(self, sorting: bool) -> None:
        super().__init__()
        self.sorting = sorting

    def forward(self, x: Tensor) -> Tensor:
        return _Sorting.apply(x) if self.sorting else x * 2


class SomeNorm(_Layer):
    pass


class SomeMLP(_Layer):
    pass


@pytest.mark.parametrize("slow", ["norm + residual", "swiglu", "optimizer"])
def test_kinds(slow: str) -> None:
    model = nn.Sequential(SomeNorm(slow == "norm + residual"), nn.Linear(8, 8), SomeMLP(slow == "swiglu"))

    def step() -> None:
        model(torch.randn(4, 8, requires_grad=True)).sum().backward()
        with record_function(OPTIMIZER_SCOPE):
            if slow == "optimizer":
                torch.rand(1_000_000).sort()

    step()
    found = profile_steps(model, step, 3, compiled=False)
    assert tuple(found) == KINDS
    assert found[slow] > 0.7 * sum(found.values())
    assert found["matmul"] > 0 and found["attention"] == 0
    assert not model[0]._forward_hooks and not model[0]._forward_pre_hooks  # left as it was
