"""Cross-entropy per token, of logits in their own dtype, full or sharded by vocabulary over the ranks of a group."""

from __future__ import annotations

from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.distributed import ProcessGroup

from megatronish.ops.dispatch import check_floating

# The kernels of csrc/, or plain torch operations on a slab of rows at a time.
CrossEntropyBackend = Literal["fused", "reference"]

# fp32 temporaries hold at most this many elements: 1 MiB stays in a CPU core's cache; a GPU wants fewer, larger kernels.
_SLAB_ELEMENTS_CPU = 1 << 18
_SLAB_ELEMENTS_CUDA = 1 << 26


def token_losses(
    logits: Tensor,
    labels: Tensor,
    ignore_index: int = -100,
    *,
    backend: CrossEntropyBackend = "reference",
    group: ProcessGroup | None = None,
    vocab_start: int = 0,
    vocab_size: int | None = None,
) -> Tensor:
    """-log softmax(logits)[label] of every token, in fp32 (float64 for float64 logits); 0 where it is ignore_index.

    logits [..., V]; labels int64 [...]. With a group, every rank has the same labels and holds the columns vocab_start, ...,
    vocab_start + V - 1 of logits over vocab_size tokens (Shoeybi et al. 2019, section 3); the loss is the same on all, the
    gradient that of the rank's own columns.

    backend "fused" overwrites the logits: the backward pass writes their gradient into them, and a second one raises
    RuntimeError (a leaf is copied first). Raises ValueError for shapes and dtypes that do not match and for a label outside
    the vocabulary (RuntimeError by the fused kernel; on CUDA labels are not checked, and the fused kernel returns NaN).
    """
    check_floating("cross_entropy", "logits", logits)
    columns = logits.shape[-1]
    vocab_size = vocab_start + columns if vocab_size is None else vocab_size
    if labels.shape != logits.shape[:-1]:
        raise ValueError(
            f"cross_entropy: labels have shape {tuple(labels.shape)}, expected {tuple(logits.shape[:-1])}, that of the "
            "logits without the vocabulary"
        )
    if labels.dtype != torch.int64:
        raise ValueError(f"cross_entropy: labels are {labels.dtype}, expected torch.int64")
    if vocab_start < 0 or vocab_start + columns > vocab_size or (group is None and columns != vocab_size):
        raise ValueError(
            f"cross_entropy: logits hold the columns {vocab_start} to {vocab_start + columns - 1}, expected "
            f"{'all' if group is None else 'a part'} of the {vocab_size} tokens of the vocabulary"
        )
    flat, flat_labels = logits.flatten(0, -2), labels.flatten()
    if backend != "fused" and not labels.is_cuda and not torch.compiler.is_compiling():
        _check_labels(flat_labels, vocab_size, ignore_index)
    losses: Tensor
    if backend == "fused" or group is not None:
        if backend == "fused" and logits.is_leaf and logits.requires_grad:
            flat = flat.clone()
        losses = _ShardLosses.apply(flat, flat_labels, ignore_index, backend == "fused", group, vocab_start, vocab_size)
    else:
        losses = _TokenLosses.apply(flat, flat_labels, ignore_index)
    return losses.view(labels.shape)


def cross_entropy(
    logits: Tensor, labels: Tensor, ignore_index: int = -100, *, backend: CrossEntropyBackend = "reference"
) -> Tensor:
    """The sum of `token_losses` over all tokens: an fp32 scalar (float64 for float64 logits)."""
    return token_losses(logits, labels, ignore_index, backend=backend).sum()


def resolve_cross_entropy(requested: str, ops: str) -> CrossEntropyBackend:
    """The backend for KernelConfig.cross_entropy; "auto" is fused where `ops`, the backend of the other operators, is."""
    return "fused" if (ops if requested == "auto" else requested) == "fused" else "reference"


class _TokenLosses(torch.autograd.Function):
    """Saves the logits and nothing else of their size; the gradient is the only new [T, V] tensor."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, labels: Tensor, ignore_index: int) -> Tensor:
        wide = _wide(logits)
        kept = labels != ignore_index
        index = labels.where(kept, 0).unsqueeze(1)
        rows = _slab_rows(logits)
        losses = [
            torch.log_softmax(piece, dim=-1, dtype=wide).gather(1, piece_index)
            for piece, piece_index in zip(logits.split(rows), index.split(rows), strict=True)
        ]
        ctx.save_for_backward(logits, kept, index)
        return -torch.cat(losses).squeeze(1).where(kept, 0.0)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        logits, kept, index = ctx.saved_tensors
        factor = (grad * kept).unsqueeze(1)  # fp32 (or float64): the losses are
        grad_logits = torch.empty_like(logits)
        rows = _slab_rows(logits)
        for start in range(0, logits.shape[0], rows):
            part = slice(start, start + rows)
            wide = torch.softmax(logits[part], dim=-1, dtype=factor.dtype)
            wide.scatter_add_(1, index[part], wide.new_full((wide.shape[0], 1), -1.0))
            # One rounding, at the store.
            grad_logits[part].copy_(wide.mul_(factor[part]))
        return grad_logits, None, None


class _ShardLosses(torch.autograd.Function):
    """Three statistics per token and shard, combined over the group; saves them and the logits for the backward pass."""

    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        labels: Tensor,
        ignore_index: int,
        fused: bool,
        group: ProcessGroup | None,
        vocab_start: int,
        vocab_size: int,
    ) -> Tensor:
        if fused:
            logits = logits if logits.shape[-1] <= 1 or logits.stride(-1) == 1 else logits.contiguous()
            largest, total, target = torch.ops.megatronish.cross_entropy_fwd(
                logits, labels, vocab_start, vocab_size, ignore_index
            )
        else:
            largest, total, target = _shard_statistics(logits, labels, vocab_start, vocab_size, ignore_index)
        if group is not None:
            largest, total, target = _merge(largest, total, target, group)
        ctx.save_for_backward(logits, labels, largest, total)
        ctx.fused, ctx.vocab_start, ctx.ignore_index = fused, vocab_start, ignore_index
        # The logarithm is small compared to the largest logit: adding it to the difference preserves its digits.
        return (largest - target + total.log()).where(labels != ignore_index, 0.0)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        try:
            logits, labels, largest, total = ctx.saved_tensors
        except RuntimeError as error:
            raise RuntimeError(
                "cross_entropy: the logits are no longer those of the forward pass: the fused backward pass writes their "
                "gradient over them, so it runs once and they must not be modified before; for another, compute the loss "
                f"again or choose backend 'reference' ({error})"
            ) from error
        if not ctx.fused:
            grad_logits = _shard_gradient(logits, labels, grad, largest, total, ctx.vocab_start, ctx.ignore_index)
            return grad_logits, *(None,) * 6
        if torch.compiler.is_compiling():
            logits = (
                logits.clone()
            )  # a graph may not change what its forward pass was given; the compiler removes the copy
        torch.ops.megatronish.cross_entropy_bwd_(
            logits, labels, grad, largest, total, ctx.vocab_start, ctx.ignore_index
        )
        if not torch.compiler.is_compiling():
            torch.autograd.graph.increment_version(logits)
        return logits, *(None,) * 6


def _merge(largest: Tensor, total: Tensor, target: Tensor, group: ProcessGroup) -> tuple[Tensor, Tensor, Tensor]:
    """The statistics of all shards, from those of each."""
    overall = largest.clone()
    dist.all_reduce(overall, dist.ReduceOp.MAX, group=group)
    # A shard of nothing but -infinity has a sum of 0, which must not become 0 * exp(NaN) where all shards are so.
    scaled = (total * (largest - overall).exp()).where(total != 0, 0.0)
    sums = torch.stack((scaled, target))
    dist.all_reduce(sums, group=group)
    return overall, sums[0], sums[1]


def _shard_statistics(
    logits: Tensor, labels: Tensor, vocab_start: int, vocab_size: int, ignore_index: int
) -> tuple[Tensor, Tensor, Tensor]:
    """The operator cross_entropy_fwd in plain torch."""
    wide = _wide(logits)
    outside = _outside(labels, vocab_size, ignore_index)
    mine, index = _own_labels(labels, logits, vocab_start, ignore_index)
    totals, rows = [], _slab_rows(logits)
    largest = logits.amax(dim=-1).to(wide)
    for piece, top in zip(logits.split(rows), largest.split(rows), strict=True):
        shift = top.masked_fill(top == float("-inf"), 0.0).unsqueeze(1)
        totals.append((piece.to(wide) - shift).exp_().sum(dim=-1))
    target = logits.gather(1, index).squeeze(1).to(wide).where(mine, 0.0).masked_fill(outside, float("nan"))
    return largest, torch.cat(totals), target


def _shard_gradient(
    logits: Tensor, labels: Tensor, grad: Tensor, largest: Tensor, total: Tensor, vocab_start: int, ignore_index: int
) -> Tensor:
    """The gradient that the operator cross_entropy_bwd_ writes into the logits, as a new tensor."""
    mine, index = _own_labels(labels, logits, vocab_start, ignore_index)
    kept = (labels != ignore_index).unsqueeze(1)
    factor, hit = (grad / total).unsqueeze(1), -(grad * mine).unsqueeze(1)
    grad_logits = torch.empty_like(logits)
    rows = _slab_rows(logits)
    for start in range(0, logits.shape[0], rows):
        part = slice(start, start + rows)
        wide = (logits[part].to(total.dtype) - largest[part].unsqueeze(1)).exp_().mul_(factor[part])
        wide.scatter_add_(1, index[part], hit[part])
        grad_logits[part].copy_(wide.where(kept[part], 0.0))
    return grad_logits


def _outside(labels: Tensor, vocab_size: int, ignore_index: int) -> Tensor:
    return (labels != ignore_index) & ((labels < 0) | (labels >= vocab_size))


def _check_labels(labels: Tensor, vocab_size: int, ignore_index: int) -> None:
    """Raise ValueError for a label outside the vocabulary. CPU tensors only: reading values would synchronise a GPU."""
    outside = _outside(labels, vocab_size, ignore_index)
    if outside.any():
        row = int(outside.nonzero()[0])
        raise ValueError(
            f"cross_entropy: labels: expected tokens from 0 to {vocab_size - 1}, or {ignore_index}, got "
            f"{int(labels[row])} in row {row}"
        )


def _own_labels(labels: Tensor, logits: Tensor, vocab_start: int, ignore_index: int) -> tuple[Tensor, Tensor]:
    """Which labels belong to this shard [T], and their columns [T, 1] (0 for the others)."""
    mine = (labels != ignore_index) & (labels >= vocab_start) & (labels < vocab_start + logits.shape[-1])
    return mine, (labels - vocab_start).where(mine, 0).unsqueeze(1)


def _wide(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _slab_rows(logits: Tensor) -> int:
    elements = _SLAB_ELEMENTS_CUDA if logits.is_cuda else _SLAB_ELEMENTS_CPU
    return max(1, elements // max(logits.shape[-1], 1))
