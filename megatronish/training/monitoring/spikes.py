"""Steps with a non-finite loss or gradient, which are counted, and loss spikes.

The engine finds non-finite steps before weights change (see Engine.train_step). A spike is measured by the robust z-score of
Iglewicz and Hoaglin (1993): the distance from the median in units of the median absolute deviation.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

from megatronish.errors import UserError

MAD_TO_DEVIATION = 1.4826  # of a normal distribution
LEAST_DEVIATION = 1e-3  # of the median: when the loss hardly varies, not every change is a spike
LEAST_LOSSES = 8


class TrainingStopped(UserError):
    """Training ended: too many steps in a row had a non-finite loss or gradient."""


class BadSteps:
    """Counts steps that were skipped for a non-finite loss or gradient; limit: how many in a row end the run."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self.in_a_row = 0

    def count(self, bad: bool, step: int, checkpoint: object) -> None:
        """Count step `step`. Raises TrainingStopped at the limit; checkpoint: the last one, for the message."""
        self.in_a_row = self.in_a_row + 1 if bad else 0
        if self.in_a_row >= self._limit:
            raise TrainingStopped(
                f"{self.in_a_row} step(s) in a row, the last of them step {step}, had a non-finite loss or gradient; each "
                f"was skipped, so the weights are those of step {step - self.in_a_row}. The last checkpoint is {checkpoint}. "
                "SAVE_DIR/black_box shows the first non-finite output. Lower --optimizer.params.lr, lengthen --schedule.warmup_steps, "
                "clip with --gradient_clipping 1.0, or allow more with --train.max_skipped_steps."
            )


def spike_score(losses: Sequence[float], loss: float) -> float:
    """How many robust standard deviations `loss` is above the median of `losses`; 0 while those are too few."""
    if len(losses) < LEAST_LOSSES or not math.isfinite(loss):
        return 0.0
    median = statistics.median(losses)
    deviation = MAD_TO_DEVIATION * statistics.median(abs(each - median) for each in losses)
    return (loss - median) / max(deviation, LEAST_DEVIATION * abs(median), 1e-12)
