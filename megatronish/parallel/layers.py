"""Linear layers and embeddings whose weights are sharded over a tensor-parallel group (Shoeybi et al. 2019, Megatron-LM),
with sequence parallelism between them (Korthikanti et al. 2022).

A column-parallel layer holds some output features of a matrix, a row-parallel layer some input features. Between a row-
and a column-parallel layer every rank holds the same [b, s, hidden], or under sequence parallelism its own
[b, s / tp, hidden].
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.distributed import ProcessGroup

from megatronish.ops.linear import linear
from megatronish.parallel.collectives import (
    all_reduce,
    ranks_first,
    ranks_last,
    reduce_scatter_sequence,
    start_all_gather,
    start_all_reduce,
    start_reduce_scatter,
    wait,
)
from megatronish.parallel.mesh import Axis

_SHARD = "shard"
_DEEPSPEED_MARK = "tensor_model_parallel"  # gradient norms count a parameter without it on tensor-parallel rank 0 only


@dataclass(frozen=True)
class TensorParallel:
    """The tensor-parallel axis of a layer.

    sequence: Megatron sequence parallelism: activations between the matrices are sharded along the sequence.
    """

    axis: Axis = field(default_factory=Axis)
    sequence: bool = False

    @property
    def size(self) -> int:
        """Ranks that shard every matrix."""
        return self.axis.size

    @property
    def rank(self) -> int:
        """Index of this rank."""
        return self.axis.rank

    @property
    def group(self) -> ProcessGroup:
        """The group; only for more than one rank."""
        assert self.axis.group is not None, "a single rank has no process group"
        return self.axis.group


@dataclass(frozen=True)
class TensorShard:
    """The part of a full tensor that a parameter holds: `segments` [start, stop) along `dim`, concatenated.

    full: shape of the full tensor. name: last component of the full tensor's name, where it differs from the parameter's.
    replicated: all ranks of the group hold the same part.
    """

    full: tuple[int, ...]
    dim: int
    segments: tuple[tuple[int, int], ...]
    name: str | None = None
    replicated: bool = False

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the part."""
        return (*self.full[: self.dim], sum(stop - start for start, stop in self.segments), *self.full[self.dim + 1 :])

    def full_name(self, name: str) -> str:
        """The full tensor's name, for the parameter `name`."""
        if self.name is None:
            return name
        return ".".join([*name.split(".")[:-1], self.name])

    def take(self, full: Tensor) -> Tensor:
        """The part of `full` that the parameter holds."""
        if tuple(full.shape) != self.full:
            raise ValueError(f"a full tensor of shape {tuple(full.shape)} was given, expected {self.full}")
        return torch.cat([full.narrow(self.dim, start, stop - start) for start, stop in self.segments], self.dim)

    def put(self, full: Tensor, part: Tensor) -> None:
        """Write the part into its place in `full`."""
        sizes = [stop - start for start, stop in self.segments]
        for (start, stop), piece in zip(self.segments, part.split(sizes, self.dim), strict=True):
            full.narrow(self.dim, start, stop - start).copy_(piece)


def set_shard(parameter: nn.Parameter, shard: TensorShard) -> None:
    """Record which part of a full tensor `parameter` holds."""
    assert parameter.shape == shard.shape, (parameter.shape, shard)
    setattr(parameter, _SHARD, shard)
    if not shard.replicated:
        setattr(parameter, _DEEPSPEED_MARK, True)


def shard_of(parameter: Tensor) -> TensorShard | None:
    """The part of a full tensor that `parameter` holds; None when it holds all of it."""
    found: TensorShard | None = getattr(parameter, _SHARD, None)
    return found


def is_copy(parameter: Tensor) -> bool:
    """Whether every tensor-parallel rank holds the same `parameter`."""
    shard = shard_of(parameter)
    return shard is None or shard.replicated


def part_of(total: int, size: int, rank: int) -> tuple[int, int]:
    """[start, stop) of rank's part of `total` items over `size` ranks: parts differ by one at most, larger ones first."""
    base, rest = divmod(total, size)
    start = rank * base + min(rank, rest)
    return start, start + base + (rank < rest)


def all_reduce_gradient(parameter: nn.Parameter, tp: TensorParallel) -> None:
    """Sum the gradient of a parameter that every rank holds but of which each rank's loss sees a part of the uses.

    That is the case of norms and biases between the matrices under sequence parallelism, of the norms of heads, and of
    key/value projections that ranks share.
    """
    group = tp.group
    parameter.register_hook(lambda grad: wait(start_all_reduce(grad, group)))


class _ColumnLinear(torch.autograd.Function):
    """x weight^T of the rank's rows of the weight.

    The input's gradient is summed over the ranks while the weight's is computed. Under sequence parallelism the gathered
    input is not kept: it is gathered again in the backward pass while the input's gradient is computed.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, tp: TensorParallel) -> Tensor:
        ctx.tp = tp
        ctx.save_for_backward(x, weight)
        if tp.sequence:
            x = ranks_last(wait(start_all_gather(x, tp.group)), tp.size)
        return F.linear(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor | None, None]:
        x, weight = ctx.saved_tensors
        tp: TensorParallel = ctx.tp
        gathering = start_all_gather(x, tp.group) if tp.sequence else None
        grad_x = grad @ weight
        if gathering is not None:
            x = ranks_last(wait(gathering), tp.size)
            summing = start_reduce_scatter(ranks_first(grad_x, tp.size), tp.group)
        else:
            summing = start_all_reduce(grad_x, tp.group)
        rows = grad.flatten(0, -2)
        grad_weight = rows.t() @ x.flatten(0, -2)
        grad_bias = rows.sum(0) if ctx.needs_input_grad[2] else None
        return wait(summing), grad_weight, grad_bias, None


def column_linear(x: Tensor, weight: Tensor, bias: Tensor | None, tp: TensorParallel) -> Tensor:
    """Megatron's f, then x [b, s, in] (under sequence parallelism [b, s / tp, in]) times the rank's rows: [b, s, rows]."""
    result: Tensor = _ColumnLinear.apply(x, weight, bias, tp)
    return result


class ColumnParallelLinear(nn.Module):
    """A linear layer of which this rank computes some output features.

    parts: widths of the packed outputs, such as [gate, up]; each is divided over the ranks. Parameters are left unset.
    Raises ValueError unless the ranks divide every part.
    """

    def __init__(self, in_features: int, parts: Sequence[int], bias: bool, tp: TensorParallel) -> None:
        super().__init__()
        self.tp = tp
        for part in parts:
            if part % tp.size:
                raise ValueError(f"{part} output features do not divide over {tp.size} tensor-parallel ranks")
        segments, start = [], 0
        for part in parts:
            segments.append((start + part // tp.size * tp.rank, start + part // tp.size * (tp.rank + 1)))
            start += part
        rows = sum(parts)
        self.weight = sharded_parameter(TensorShard((rows, in_features), 0, tuple(segments)))
        self.bias = sharded_parameter(TensorShard((rows,), 0, tuple(segments))) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        """x [b, s, in] or its part of the sequence -> [b, s, out / tp]."""
        return column_linear(x, self.weight, self.bias, self.tp)


class SharedKVLinear(nn.Module):
    """The packed projection [q; k; v] where there are fewer key/value heads than ranks.

    The query rows are sharded. The key and value rows are one parameter that is replicated on every rank: each rank uses the
    rows of the key/value head that its query heads read, and the gradient is all-reduced.
    Raises ValueError unless the ranks divide the query heads and the key/value heads divide the ranks.
    """

    def __init__(
        self, in_features: int, heads: int, kv_heads: int, head_dim: int, bias: bool, tp: TensorParallel
    ) -> None:
        super().__init__()
        if heads % tp.size or tp.size % kv_heads:
            raise ValueError(
                f"{heads} query heads and {kv_heads} key/value heads do not divide over {tp.size} tensor-parallel ranks"
            )
        self.tp, self.kv_heads, self.head_dim = tp, kv_heads, head_dim
        self.head = tp.rank * kv_heads // tp.size  # the key/value head of this rank's query heads
        rows = (heads + 2 * kv_heads) * head_dim
        q = heads // tp.size * head_dim
        q_rows, kv_rows = ((tp.rank * q, (tp.rank + 1) * q),), ((heads * head_dim, rows),)
        self.q_weight = sharded_parameter(TensorShard((rows, in_features), 0, q_rows, "weight"))
        self.kv_weight = sharded_parameter(TensorShard((rows, in_features), 0, kv_rows, "weight", replicated=True))
        self.q_bias = sharded_parameter(TensorShard((rows,), 0, q_rows, "bias")) if bias else None
        self.kv_bias = sharded_parameter(TensorShard((rows,), 0, kv_rows, "bias", replicated=True)) if bias else None
        for shared in (self.kv_weight, self.kv_bias):
            if shared is not None:
                all_reduce_gradient(shared, tp)

    def forward(self, x: Tensor) -> Tensor:
        """x [b, s, in] or its part of the sequence -> [b, s, (q heads of the rank + 2) * head_dim]."""
        bias = None if self.q_bias is None or self.kv_bias is None else self._packed(self.q_bias, self.kv_bias)
        return column_linear(x, self._packed(self.q_weight, self.kv_weight), bias, self.tp)

    def _packed(self, q: Tensor, kv: Tensor) -> Tensor:
        """Rows [q of this rank; k; v of its key/value head]."""
        k_and_v = kv.unflatten(0, (2, self.kv_heads, self.head_dim))[:, self.head]
        return torch.cat([q, k_and_v.flatten(0, 1)])


class RowParallelLinear(nn.Module):
    """A linear layer of which this rank holds some input features; the bias is added once, after the sum over ranks.

    Parameters are left unset. Raises ValueError unless the ranks divide the input features.
    """

    def __init__(self, in_features: int, out_features: int, bias: bool, tp: TensorParallel) -> None:
        super().__init__()
        self.tp = tp
        if in_features % tp.size:
            raise ValueError(f"{in_features} input features do not divide over {tp.size} tensor-parallel ranks")
        columns = part_of(in_features, tp.size, tp.rank)
        self.weight = sharded_parameter(TensorShard((out_features, in_features), 1, (columns,)))
        self.bias = nn.Parameter(torch.empty(out_features)) if bias else None
        if self.bias is not None and tp.sequence:
            all_reduce_gradient(self.bias, tp)

    def forward(self, x: Tensor) -> Tensor:
        """x [b, s, in / tp] -> [b, s, out], or the rank's part of the sequence."""
        y = reduce_partial_sums(linear(x, self.weight), self.tp)
        return y if self.bias is None else y + self.bias


class VocabParallelEmbedding(nn.Module):
    """Rows of an embedding table of which this rank holds some; the vocabulary need not divide evenly."""

    def __init__(self, vocab_size: int, hidden_size: int, tp: TensorParallel) -> None:
        super().__init__()
        self.tp = tp
        self.start, self.stop = part_of(vocab_size, tp.size, tp.rank)
        self.weight = sharded_parameter(TensorShard((vocab_size, hidden_size), 0, ((self.start, self.stop),)))

    def forward(self, tokens: Tensor) -> Tensor:
        """tokens [b, s] -> [b, s, hidden], or the rank's part of the sequence."""
        mine = (tokens >= self.start) & (tokens < self.stop)
        rows = F.embedding((tokens - self.start).where(mine, 0), self.weight)
        return reduce_partial_sums(rows.where(mine.unsqueeze(-1), 0), self.tp)


def reduce_partial_sums(y: Tensor, tp: TensorParallel) -> Tensor:
    """Megatron's g: the sum over ranks of y [b, s, hidden], or under sequence parallelism the rank's chunk of the sum."""
    return reduce_scatter_sequence(y, tp.group) if tp.sequence else all_reduce(y, tp.group)


def sharded_parameter(shard: TensorShard) -> nn.Parameter:
    """An unset parameter that holds `shard`."""
    parameter = nn.Parameter(torch.empty(shard.shape))
    set_shard(parameter, shard)
    return parameter
