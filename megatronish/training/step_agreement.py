"""The record of a step that all ranks share: its mean loss, and whether any rank received a stop request.

One all-reduce of a few numbers after every step, on the device that trains. On CPUs the result is read at once. On a GPU
that would make the host wait for the device, so the result is read after the next step, when it has arrived, or when it is
needed (before a report, a validation, a checkpoint): on every rank at the same step.
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
    """All-reduces step records. device: of the loss; copies: ranks that hold the same part of the loss (tp x pp)."""

    def __init__(self, device: torch.device, copies: int) -> None:
        self._device, self._copies = device, copies
        self._waiting: deque[tuple[int, Tensor, torch.cuda.Event | None]] = deque()

    def exchange(self, step: int, loss_sum: Tensor, tokens: Tensor, stop: str | None) -> None:
        """Send this rank's part after a step. Every rank calls it. loss_sum, tokens: scalars, see StepResult."""
        values = torch.zeros(2 + len(REASONS), dtype=torch.float64, device=self._device)
        values[0] = loss_sum
        if stop is not None:
            values[2 + REASONS.index(stop)] = 1.0
        if dist.is_initialized() and dist.get_world_size() > 1:
            dist.all_reduce(values)
        values[1] = tokens  # of all ranks already
        if self._device.type == "cpu":
            self._waiting.append((step, values, None))
            return
        here = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
        here.copy_(values, non_blocking=True)
        arrived = torch.cuda.Event()
        arrived.record()
        self._waiting.append((step, here, arrived))

    def completed(self, wait_for_all: bool) -> list[StepRecord]:
        """The records that are known by now and were not returned before, in order.

        wait_for_all: wait for that of the last step, too. So does a stop request, after which the run is saved.
        """
        keep = 0 if wait_for_all or self._device.type == "cpu" else 1
        records = []
        while len(self._waiting) > keep:
            step, values, arrived = self._waiting.popleft()
            if arrived is not None:
                arrived.synchronize()
            loss_sum, tokens, *stops = values.tolist()
            stop = next((reason for reason, count in zip(REASONS, stops, strict=True) if count), None)
            keep = 0 if stop else keep
            records.append(StepRecord(step, loss_sum / self._copies / tokens, int(tokens), stop))
        return records

    def forget(self) -> None:
        """Drop the records that were not returned yet: their steps are undone."""
        self._waiting.clear()
