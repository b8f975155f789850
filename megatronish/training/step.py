"""Inputs and results of an optimizer step, and how an update is skipped."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from megatronish.model.transformer import Transformer
from megatronish.parallel.mesh import Axis

Batch = dict[str, Any]  # a micro batch of data/loader.py, on the engine's device


@dataclass(frozen=True)
class StepResult:
    """Result of one optimizer step. Tensors stay on the device: reading them synchronizes."""

    loss_sum: torch.Tensor  # [] fp32, this rank's sum of token losses
    tokens: torch.Tensor  # [] fp32, tokens of the step over all ranks
    grad_norm: float | torch.Tensor | None  # before clipping, over all ranks
    skipped: bool  # nothing was updated
    bad: bool  # skipped for a non-finite loss or gradient on some rank, not for fp16's loss scale
    out_of_memory: bool = False  # skipped because a rank ran out of memory in a forward pass


class LossModule(nn.Module):
    """The module that DeepSpeed wraps: a batch in, the sum of its token losses out."""

    def __init__(self, model: Transformer) -> None:
        super().__init__()
        self.model = model

    def forward(self, batch: Batch) -> torch.Tensor:
        loss_sum, _ = self.model.loss(**batch)
        return loss_sum


def to_device(batch: Batch, target: torch.device) -> Batch:
    """The batch with its tensors on the device; from pinned memory the copies overlap with computation."""
    return {
        key: value.to(target, non_blocking=True) if isinstance(value, torch.Tensor) else value
        for key, value in batch.items()
    }


def own_part(batch: Batch, sp: Axis) -> Batch:
    """This rank's part of the sequences of a micro batch; document boundaries stay those of the full sequences."""
    if sp.size == 1:
        return batch
    parts: Batch = {
        key: batch[key].chunk(sp.size, dim=1)[sp.rank] for key in ("tokens", "labels", "positions") if key in batch
    }
    return {**batch, **parts}


def nan_unless_finite(loss: torch.Tensor) -> torch.Tensor:
    """0 for a finite loss, else NaN; computed on the device of the loss."""
    return loss.detach() - loss.detach()


def let_skip_steps(optimizer: Any) -> None:
    """Add the `overflow` flag of DeepSpeed's optimizers to a torch optimizer: while it is set, `step` does nothing."""
    step, optimizer.overflow = optimizer.step, False

    def step_without_overflow(closure: Any = None) -> Any:
        return None if optimizer.overflow else step(closure)

    optimizer.step = step_without_overflow


def skip_overflow_check(partition_gradients: bool = True) -> None:
    """Replaces DeepSpeed's check of every gradient: its optimizers check the norm next."""
