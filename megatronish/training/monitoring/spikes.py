"""Which steps are bad: those without a number for a loss or gradient, and those whose loss rises out of the ordinary.

The first are found by the engine, before weights change (see Engine.train_step); here they are counted. A spike is judged by
the robust z-score of Iglewicz and Hoaglin (1993): distance from the median in units of the median absolute deviation.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

from megatronish.errors import UserError

MAD_TO_DEVIATION = 1.4826  # of a normal distribution
LEAST_DEVIATION = 1e-3  # of the median: a loss that hardly moves does not make every change a spike
LEAST_LOSSES = 8


class TrainingStopped(UserError):
    """Training cannot go on: step after step has no number for a loss or gradient."""


class BadSteps:
    """Counts steps that were left out because a loss or gradient was no number; limit: how many in a row end the run."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self.in_a_row = 0

    def count(self, bad: bool, step: int, checkpoint: object) -> None:
        """Count step `step`. Raises TrainingStopped at the limit; checkpoint: the last one, for the message."""
        self.in_a_row = self.in_a_row + 1 if bad else 0
        if self.in_a_row >= self._limit:
            raise TrainingStopped(
                f"{self.in_a_row} step(s) in a row, the last of them step {step}, had a loss or gradient that is no number; each "
                f"was left out, so the weights are those of step {step - self.in_a_row}. The last checkpoint is {checkpoint}. "
                "SAVE_DIR/black_box says where the numbers break first. Lower --optimizer.params.lr, lengthen --schedule.warmup_steps, "
                "clip with --gradient_clipping 1.0, or allow more with --train.max_skipped_steps."
            )


def spike_score(losses: Sequence[float], loss: float) -> float:
    """How many robust standard deviations `loss` lies above the median of `losses`; 0 while those are too few."""
    if len(losses) < LEAST_LOSSES or not math.isfinite(loss):
        return 0.0
    median = statistics.median(losses)
    deviation = MAD_TO_DEVIATION * statistics.median(abs(each - median) for each in losses)
    return (loss - median) / max(deviation, LEAST_DEVIATION * abs(median), 1e-12)
