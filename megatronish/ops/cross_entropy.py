"""Token-summed cross-entropy that keeps the logits in their own dtype and works through them a slab at a time."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

# fp32 temporaries hold at most this many elements: a few MiB stay in a CPU's cache; a GPU wants fewer, larger kernels.
_SLAB_ELEMENTS_CPU = 1 << 19
_SLAB_ELEMENTS_CUDA = 1 << 26


def _slab_rows(logits: Tensor) -> int:
    elements = _SLAB_ELEMENTS_CUDA if logits.is_cuda else _SLAB_ELEMENTS_CPU
    return max(1, elements // logits.shape[-1])


class _CrossEntropy(torch.autograd.Function):
    """Keeps the logits (as they came) and one fp32 log-sum-exp a token; the gradient is the only new [T, V] tensor."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, labels: Tensor, ignore_index: int) -> Tensor:
        wide = torch.float64 if logits.dtype == torch.float64 else torch.float32
        log_z = torch.empty(logits.shape[0], dtype=wide, device=logits.device)
        rows = _slab_rows(logits)
        for piece, out in zip(logits.split(rows), log_z.split(rows), strict=True):
            torch.logsumexp(piece.to(wide), dim=-1, out=out)
        kept = labels != ignore_index
        target = logits.gather(1, labels.where(kept, 0).unsqueeze(1)).squeeze(1).to(wide)
        ctx.save_for_backward(logits, labels, log_z)
        ctx.ignore_index = ignore_index
        return (log_z - target).where(kept, 0.0).sum()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        logits, labels, log_z = ctx.saved_tensors
        kept = labels != ctx.ignore_index
        factor = grad.to(log_z.dtype) * kept.to(log_z.dtype)
        index = labels.where(kept, 0).unsqueeze(1)
        grad_logits = torch.empty_like(logits)
        rows = _slab_rows(logits)
        for start in range(0, logits.shape[0], rows):
            part = slice(start, start + rows)
            wide = torch.sub(logits[part], log_z[part].unsqueeze(1)).exp_()
            wide.scatter_add_(1, index[part], wide.new_full((wide.shape[0], 1), -1.0))
            torch.mul(wide, factor[part].unsqueeze(1), out=wide)
            grad_logits[part].copy_(wide)
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
