"""What all ranks know of a step: its mean loss, and whether any of them was asked to stop.

One all-reduce of a few numbers after every step, on the device that trains. On CPUs its result is read at once. On a GPU
that would make the host wait for the device, so the result is read when the next step is done, by which time it has
long arrived, or when it is needed (before a report, a validation, a checkpoint): on every rank at the same step.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from megatronish.training.stopping import REASONS


@dataclass(frozen=True)
class StepRecord:
    """A finished step, the same on every rank.

    step: steps done with it; loss: mean in nats over the `tokens` of all ranks, not finite where any rank's is not; stop:
    why some rank was asked to stop, one of stopping.REASONS, or None.
    """

    step: int
    loss: float
    tokens: int
    stop: str | None


class StepAgreement:
    """device: of the loss; copies: ranks that have the same part of the loss (tensor-parallel ones and pipeline stages)."""

    def __init__(self, device: torch.device, copies: int) -> None:
        self._device, self._copies = device, copies
        self._waiting: deque[tuple[int, Tensor, torch.cuda.Event | None]] = deque()

    def exchange(self, step: int, loss_sum: Tensor, tokens: Tensor, stop: str | None) -> None:
        """Give this rank's part after a step; every rank calls it. loss_sum, tokens: scalars, see StepResult."""
        told = torch.zeros(2 + len(REASONS), dtype=torch.float64, device=self._device)
        told[0] = loss_sum
        if stop is not None:
            told[2 + REASONS.index(stop)] = 1.0
        if dist.is_initialized() and dist.get_world_size() > 1:
            dist.all_reduce(told)
        told[1] = tokens  # of all ranks already
        if self._device.type == "cpu":
            self._waiting.append((step, told, None))
            return
        here = torch.empty(told.shape, dtype=told.dtype, pin_memory=True)
        here.copy_(told, non_blocking=True)
        arrived = torch.cuda.Event()
        arrived.record()
        self._waiting.append((step, here, arrived))

    def settled(self, all_of_them: bool) -> list[StepRecord]:
        """What is known by now and was not given before; all_of_them: wait for the last step's, too."""
        keep = 0 if all_of_them or self._device.type == "cpu" else 1
        records = []
        while len(self._waiting) > keep:
            step, told, arrived = self._waiting.popleft()
            if arrived is not None:
                arrived.synchronize()
            loss_sum, tokens, *stops = told.tolist()
            stop = next((reason for reason, count in zip(REASONS, stops, strict=True) if count), None)
            records.append(StepRecord(step, loss_sum / self._copies / tokens, int(tokens), stop))
        return records

    def forget(self) -> None:
        """Drop what was not given yet: the steps are undone."""
        self._waiting.clear()
