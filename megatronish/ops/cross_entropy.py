"""Token-summed cross-entropy that keeps the logits in their own dtype and works through them a slab at a time."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

# fp32 temporaries hold at most this many elements: 1 MiB stays in a CPU core's cache; a GPU wants fewer, larger kernels.
_SLAB_ELEMENTS_CPU = 1 << 18
_SLAB_ELEMENTS_CUDA = 1 << 26


def _slab_rows(logits: Tensor) -> int:
    elements = _SLAB_ELEMENTS_CUDA if logits.is_cuda else _SLAB_ELEMENTS_CPU
    return max(1, elements // logits.shape[-1])


class _CrossEntropy(torch.autograd.Function):
    """Keeps the logits as they came and nothing else of their size; the gradient is the only new [T, V] tensor."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, labels: Tensor, ignore_index: int) -> Tensor:
        wide = torch.float64 if logits.dtype == torch.float64 else torch.float32
        kept = labels != ignore_index
        index = labels.where(kept, 0).unsqueeze(1)
        rows = _slab_rows(logits)
        losses = [
            torch.log_softmax(piece, dim=-1, dtype=wide).gather(1, piece_index)
            for piece, piece_index in zip(logits.split(rows), index.split(rows), strict=True)
        ]
        ctx.save_for_backward(logits, kept, index)
        return -torch.cat(losses).squeeze(1).where(kept, 0.0).sum()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        logits, kept, index = ctx.saved_tensors
        factor = (grad * kept).unsqueeze(1)  # fp32 (or float64): the loss is
        grad_logits = torch.empty_like(logits)
        rows = _slab_rows(logits)
        for start in range(0, logits.shape[0], rows):
            part = slice(start, start + rows)
            wide = torch.softmax(logits[part], dim=-1, dtype=factor.dtype)
            wide.scatter_add_(1, index[part], wide.new_full((wide.shape[0], 1), -1.0))
            # One rounding, at the store.
            grad_logits[part].copy_(wide.mul_(factor[part]))
        return grad_logits, None, None


def cross_entropy(logits: Tensor, labels: Tensor, ignore_index: int = -100) -> Tensor:
    """Sum over tokens of -log softmax(logits)[label]: an fp32 scalar (float64 for float64 logits).

    logits [..., V]; labels int64 [...]; tokens labelled ignore_index add nothing.
    Raises ValueError if the shapes do not match.
    """
    if labels.shape != logits.shape[:-1]:
        raise ValueError(
            f"cross_entropy: labels have shape {tuple(labels.shape)}, expected {tuple(logits.shape[:-1])}, that of the "
            "logits without the vocabulary"
        )
    result: Tensor = _CrossEntropy.apply(logits.flatten(0, -2), labels.flatten(), ignore_index)
    return result
