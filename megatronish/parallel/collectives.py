"""Communication between ranks that gradients flow through; every function takes its group.

The operators are torch's functional collectives: they return new tensors (a checkpointed or compiled block may keep or
replay them), and a result may be waited for later, so that matrix work runs meanwhile.

Shapes: b batch, s sequence, n ranks of the group.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.distributed import ProcessGroup

_ops = torch.ops._c10d_functional


def wait(pending: Tensor) -> Tensor:
    """The result of a `start_...` function, once it is there."""
    result: Tensor = _ops.wait_tensor(pending)
    return result


def start_sum(x: Tensor, group: ProcessGroup) -> Tensor:
    """Begin to sum x over the group; `wait` for the result before any use."""
    result: Tensor = _ops.all_reduce(x.contiguous(), "sum", group.group_name)
    return result


def start_gather(x: Tensor, group: ProcessGroup) -> Tensor:
    """Begin to collect x [m, ...] of every rank into [n * m, ...]; `wait` for the result before any use."""
    result: Tensor = _ops.all_gather_into_tensor(x.contiguous(), group.size(), group.group_name)
    return result


def start_sum_scatter(x: Tensor, group: ProcessGroup) -> Tensor:
    """Begin to sum x [n * m, ...] over the group, keeping this rank's [m, ...]; `wait` for the result before any use."""
    result: Tensor = _ops.reduce_scatter_tensor(x.contiguous(), "sum", group.size(), group.group_name)
    return result


def ranks_first(x: Tensor, n: int) -> Tensor:
    """[b, s, ...] -> [n * b, s / n, ...]: every rank's part of the sequence behind one another."""
    b, s = x.shape[:2]
    return x.unflatten(1, (n, s // n)).transpose(0, 1).reshape(n * b, s // n, *x.shape[2:])


def ranks_last(x: Tensor, n: int) -> Tensor:
    """[n * b, s / n, ...] -> [b, s, ...], the inverse of `ranks_first`."""
    parts, part_length = x.shape[:2]
    return x.unflatten(0, (n, parts // n)).transpose(0, 1).reshape(parts // n, n * part_length, *x.shape[2:])


class _Copy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: ProcessGroup) -> Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return wait(start_sum(grad, ctx.group)), None


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: ProcessGroup) -> Tensor:
        return wait(start_sum(x, group))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


class _GatherSequence(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: ProcessGroup) -> Tensor:
        ctx.group = group
        return ranks_last(wait(start_gather(x, group)), group.size())

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return wait(start_sum_scatter(ranks_first(grad, ctx.group.size()), ctx.group)), None


class _GatherSequenceAlike(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: ProcessGroup) -> Tensor:
        ctx.group = group
        return ranks_last(wait(start_gather(x, group)), group.size())

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad.chunk(ctx.group.size(), dim=1)[ctx.group.rank()].contiguous(), None


class _SumScatterSequence(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: ProcessGroup) -> Tensor:
        ctx.group = group
        return wait(start_sum_scatter(ranks_first(x, group.size()), group))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return ranks_last(wait(start_gather(grad, ctx.group)), ctx.group.size()), None


class _Exchange(torch.autograd.Function):
    """All-to-all of the first dim: part j of rank i becomes part i of rank j. It is its own inverse and its own adjoint."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: ProcessGroup) -> Tensor:
        ctx.group = group
        return _exchange(x, group)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _exchange(grad, ctx.group), None


def _exchange(x: Tensor, group: ProcessGroup) -> Tensor:
    split = [x.shape[0] // group.size()] * group.size()
    return wait(_ops.all_to_all_single(x.contiguous(), split, split, group.group_name))


def copy_to_ranks(x: Tensor, group: ProcessGroup) -> Tensor:
    """x itself, for a use that is divided over the group: its gradient is summed over the ranks."""
    result: Tensor = _Copy.apply(x, group)
    return result


def sum_over_ranks(x: Tensor, group: ProcessGroup) -> Tensor:
    """x summed over the group, for a use that every rank makes alike: its gradient is that of every rank's x."""
    result: Tensor = _Sum.apply(x, group)
    return result


def gather_sequence(x: Tensor, group: ProcessGroup) -> Tensor:
    """[b, s / n, ...] of each rank -> [b, s, ...], for a use divided over the group: gradients are summed and scattered."""
    result: Tensor = _GatherSequence.apply(x, group)
    return result


def gather_sequence_alike(x: Tensor, group: ProcessGroup) -> Tensor:
    """[b, s / n, ...] of each rank -> [b, s, ...], for a use that every rank makes alike: its gradient is the rank's part."""
    result: Tensor = _GatherSequenceAlike.apply(x, group)
    return result


def sum_scatter_sequence(x: Tensor, group: ProcessGroup) -> Tensor:
    """[b, s, ...] summed over the group, each rank keeping its [b, s / n, ...] of the sequence.

    Raises ValueError unless n divides s.
    """
    if x.shape[1] % group.size():
        raise ValueError(f"sequence of {x.shape[1]} tokens does not divide over {group.size()} tensor-parallel ranks")
    result: Tensor = _SumScatterSequence.apply(x, group)
    return result


def exchange(x: Tensor, group: ProcessGroup) -> Tensor:
    """All-to-all of x [n * m, ...]: the j-th m rows go to rank j. Raises ValueError unless n divides the rows."""
    if x.shape[0] % group.size():
        raise ValueError(f"{x.shape[0]} rows cannot be exchanged between {group.size()} ranks in equal parts")
    result: Tensor = _Exchange.apply(x, group)
    return result
