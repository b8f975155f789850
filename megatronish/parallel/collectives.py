"""Differentiable collectives; every function takes its process group.

Megatron-LM's conjugate operators (Shoeybi et al. 2019; Korthikanti et al. 2022): f is the identity forward and an all-reduce
backward, g an all-reduce forward and the identity backward. Under sequence parallelism f becomes an all-gather forward and a
reduce-scatter backward, g a reduce-scatter forward and an all-gather backward. f has no function here: column-parallel linear
layers (`parallel.layers.column_linear`) contain it, to overlap its collectives with matrix products.

The operators underneath are torch's functional collectives: they return new tensors, which a checkpointed or compiled block may
keep or replay, and they are asynchronous until `wait`.

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
    """The result of a `start_...` function, once the collective has completed."""
    result: Tensor = _ops.wait_tensor(pending)
    return result


def start_all_reduce(x: Tensor, group: ProcessGroup) -> Tensor:
    """Start to sum x over the group; call `wait` before using the result."""
    result: Tensor = _ops.all_reduce(x.contiguous(), "sum", group.group_name)
    return result


def start_all_gather(x: Tensor, group: ProcessGroup) -> Tensor:
    """Start to concatenate x [m, ...] of every rank to [n * m, ...]; call `wait` before using the result."""
    result: Tensor = _ops.all_gather_into_tensor(x.contiguous(), group.size(), group.group_name)
    return result


def start_reduce_scatter(x: Tensor, group: ProcessGroup) -> Tensor:
    """Start to sum x [n * m, ...] over the group; each rank keeps its [m, ...]. Call `wait` before using the result."""
    result: Tensor = _ops.reduce_scatter_tensor(x.contiguous(), "sum", group.size(), group.group_name)
    return result


def ranks_first(x: Tensor, n: int) -> Tensor:
    """[b, s, ...] -> [n * b, s / n, ...]: the sequence chunks of all ranks, concatenated along the batch."""
    b, s = x.shape[:2]
    return x.unflatten(1, (n, s // n)).transpose(0, 1).reshape(n * b, s // n, *x.shape[2:])


def ranks_last(x: Tensor, n: int) -> Tensor:
    """[n * b, s / n, ...] -> [b, s, ...], the inverse of `ranks_first`."""
    parts, part_length = x.shape[:2]
    return x.unflatten(0, (n, parts // n)).transpose(0, 1).reshape(parts // n, n * part_length, *x.shape[2:])


class _AllReduce(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: ProcessGroup) -> Tensor:
        return wait(start_all_reduce(x, group))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


class _AllGatherSequence(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: ProcessGroup) -> Tensor:
        ctx.group = group
        return ranks_last(wait(start_all_gather(x, group)), group.size())

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad.chunk(ctx.group.size(), dim=1)[ctx.group.rank()].contiguous(), None


class _ReduceScatterSequence(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: ProcessGroup) -> Tensor:
        ctx.group = group
        return wait(start_reduce_scatter(ranks_first(x, group.size()), group))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return ranks_last(wait(start_all_gather(grad, ctx.group)), ctx.group.size()), None


class _AllToAll(torch.autograd.Function):
    """Chunk j of rank i becomes chunk i of rank j. It is its own inverse and its own adjoint."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: ProcessGroup) -> Tensor:
        ctx.group = group
        return _all_to_all(x, group)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _all_to_all(grad, ctx.group), None


def _all_to_all(x: Tensor, group: ProcessGroup) -> Tensor:
    split = [x.shape[0] // group.size()] * group.size()
    return wait(_ops.all_to_all_single(x.contiguous(), split, split, group.group_name))


def all_reduce(x: Tensor, group: ProcessGroup) -> Tensor:
    """Megatron's g: x summed over the group. The ranks use the sum identically, so the gradient passes unchanged."""
    result: Tensor = _AllReduce.apply(x, group)
    return result


def all_gather_sequence(x: Tensor, group: ProcessGroup) -> Tensor:
    """[b, s / n, ...] of each rank -> [b, s, ...], for a use that is identical on all ranks: the gradient is this rank's chunk."""
    result: Tensor = _AllGatherSequence.apply(x, group)
    return result


def reduce_scatter_sequence(x: Tensor, group: ProcessGroup) -> Tensor:
    """Megatron's g under sequence parallelism: [b, s, ...] summed over the group, of which each rank keeps its [b, s / n, ...].

    Raises ValueError unless n divides s.
    """
    if x.shape[1] % group.size():
        raise ValueError(f"sequence of {x.shape[1]} tokens does not divide over {group.size()} tensor-parallel ranks")
    result: Tensor = _ReduceScatterSequence.apply(x, group)
    return result


def all_to_all(x: Tensor, group: ProcessGroup) -> Tensor:
    """All-to-all of x [n * m, ...]: rows j * m to (j + 1) * m go to rank j. Raises ValueError unless n divides the rows."""
    if x.shape[0] % group.size():
        raise ValueError(f"all-to-all of {x.shape[0]} rows over {group.size()} ranks: the ranks must divide the rows")
    result: Tensor = _AllToAll.apply(x, group)
    return result
