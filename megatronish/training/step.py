"""What goes into an optimizer step and comes out of it, and how one that must not happen is made to do nothing."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from megatronish.model.transformer import Transformer
from megatronish.parallel.mesh import Axis

Batch = dict[str, Any]  # what data/loader.py yields, on the engine's device


@dataclass(frozen=True)
class StepResult:
    """What one optimizer step did. Tensors stay on the device: reading them waits for it."""

    loss_sum: torch.Tensor  # [] fp32, this rank's sum of token losses
    tokens: torch.Tensor  # [] fp32, tokens of the whole step over all ranks
    grad_norm: float | torch.Tensor | None  # before clipping, over all ranks
    skipped: bool  # nothing was updated
    bad: bool  # and that because a loss or gradient was no number on some rank, not because of fp16's loss scale
    out_of_memory: bool = False  # nothing was updated because a rank had no memory for a micro batch


class LossModule(nn.Module):
    """What DeepSpeed calls: a batch in, the sum of its token losses out."""

    def __init__(self, model: Transformer) -> None:
        super().__init__()
        self.model = model

    def forward(self, batch: Batch) -> torch.Tensor:
        loss_sum, _ = self.model.loss(**batch)
        return loss_sum


def own_part(batch: Batch, sp: Axis) -> Batch:
    """The rank's part of the sequences of a micro batch; documents stay those of the whole."""
    if sp.size == 1:
        return batch
    parts: Batch = {
        key: batch[key].chunk(sp.size, dim=1)[sp.rank] for key in ("tokens", "labels", "positions") if key in batch
    }
    return {**batch, **parts}


def nan_unless_finite(loss: torch.Tensor) -> torch.Tensor:
    """0, or NaN for an infinite loss or one that is no number; computed where the loss is."""
    return loss.detach() - loss.detach()


def let_skip_steps(optimizer: Any) -> None:
    """Give torch's optimizer the flag that DeepSpeed's have: while it is set, a step does nothing."""
    step, optimizer.overflow = optimizer.step, False

    def step_unless_told(closure: Any = None) -> Any:
        return None if optimizer.overflow else step(closure)

    optimizer.step = step_unless_told


def the_norm_tells(partition_gradients: bool = True) -> None:
    """In place of DeepSpeed's look at every gradient: its optimizers judge by the norm next."""
