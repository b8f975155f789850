"""Learning rate schedules as pure functions of the step: resuming needs no state."""

from __future__ import annotations

import math

from megatronish.config.training import ScheduleConfig


def learning_rate_multiplier(step: int, total: int, schedule: ScheduleConfig) -> float:
    """The multiplier of the peak learning rate at optimizer step `step` (0-based) of `total`, in [0, 1].

    Warmup is linear and reaches the peak at step `warmup_steps - 1`. Cosine (Loshchilov & Hutter 2017) and linear decay
    over the rest of the run to `min_ratio`, reached at the last step; wsd (Hu et al. 2024, MiniCPM) holds the peak and
    decays linearly over the last `decay_fraction` of the run.
    """
    warmup = schedule.warmup_steps
    if step < warmup:
        return (step + 1) / warmup
    start = warmup
    if schedule.type == "constant":
        return 1.0
    if schedule.type == "wsd":
        start = max(warmup, total - max(1, round(total * schedule.decay_fraction)))
        if step < start:
            return 1.0
    progress = min(1.0, (step + 1 - start) / max(1, total - start))
    falling = 0.5 * (1.0 + math.cos(math.pi * progress)) if schedule.type == "cosine" else 1.0 - progress
    return schedule.min_ratio + (1.0 - schedule.min_ratio) * falling
