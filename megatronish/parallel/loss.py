"""Cross-entropy of logits whose vocabulary is divided over tensor-parallel ranks."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.distributed import ProcessGroup

# fp32 temporaries hold at most this many elements: 1 MiB stays in a CPU core's cache; a GPU wants fewer, larger kernels.
_SLAB_ELEMENTS_CPU = 1 << 18
_SLAB_ELEMENTS_CUDA = 1 << 26


class _VocabParallelCrossEntropy(torch.autograd.Function):
    """Ranks exchange three numbers a token: the largest logit, the sum of exponentials, the label's logit.

    The logits are kept in their own dtype; the arithmetic is fp32 (float64 for float64 logits), a slab of rows at a time.
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, labels: Tensor, start: int, ignore_index: int, group: ProcessGroup) -> Tensor:
        wide = torch.float64 if logits.dtype == torch.float64 else torch.float32
        kept = labels != ignore_index
        mine = kept & (labels >= start) & (labels < start + logits.shape[-1])
        index = (labels - start).where(mine, 0).unsqueeze(1)
        largest = logits.amax(dim=-1).to(wide)
        dist.all_reduce(largest, dist.ReduceOp.MAX, group=group)
        rows = _slab_rows(logits)
        exponentials = [
            (piece.to(wide) - top.unsqueeze(1)).exp_().sum(dim=-1)
            for piece, top in zip(logits.split(rows), largest.split(rows), strict=True)
        ]
        label_logit = logits.gather(1, index).squeeze(1).to(wide).where(mine, 0.0)
        sums = torch.stack([torch.cat(exponentials), label_logit])
        dist.all_reduce(sums, group=group)
        log_total = sums[0].log() + largest  # log of the sum of exponentials over the whole vocabulary
        ctx.save_for_backward(logits, kept, mine, index, log_total)
        return (log_total - sums[1]).where(kept, 0.0).sum()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None, None]:
        logits, kept, mine, index, log_total = ctx.saved_tensors
        factor = (grad * kept).unsqueeze(1)
        hit = -mine.to(log_total.dtype).unsqueeze(1)
        grad_logits = torch.empty_like(logits)
        rows = _slab_rows(logits)
        for first in range(0, logits.shape[0], rows):
            part = slice(first, first + rows)
            wide = (logits[part].to(log_total.dtype) - log_total[part].unsqueeze(1)).exp_()
            wide.scatter_add_(1, index[part], hit[part])
            grad_logits[part].copy_(wide.mul_(factor[part]))
        return grad_logits, None, None, None, None


def _slab_rows(logits: Tensor) -> int:
    elements = _SLAB_ELEMENTS_CUDA if logits.is_cuda else _SLAB_ELEMENTS_CPU
    return max(1, elements // logits.shape[-1])


def vocab_parallel_cross_entropy(
    logits: Tensor, labels: Tensor, start: int, group: ProcessGroup, ignore_index: int = -100
) -> Tensor:
    """Sum over tokens of -log softmax(logits)[label], a scalar that is the same on every rank of the group.

    logits [..., V of this rank]: columns start, start + 1, ... of the whole vocabulary; labels int64 [...], in the whole
    vocabulary; tokens labelled ignore_index add nothing. fp32 (float64 for float64 logits).
    Raises ValueError if the shapes do not match.
    """
    if labels.shape != logits.shape[:-1]:
        raise ValueError(
            f"vocab_parallel_cross_entropy: labels have shape {tuple(labels.shape)}, expected "
            f"{tuple(logits.shape[:-1])}, that of the logits without the vocabulary"
        )
    result: Tensor = _VocabParallelCrossEntropy.apply(
        logits.flatten(0, -2), labels.flatten(), start, ignore_index, group
    )
    return result
