"""Requests to stop a run before its last step, by a signal or a time limit. The run saves a checkpoint first.

Each rank knows its own requests; step_agreement.py makes all ranks stop after the same step. SIGTERM and SIGUSR1 are sent by
Slurm (`--signal`), spot machines and launchers; SIGINT is Ctrl-C, and a second one ends the rank at once.
"""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Mapping
from types import FrameType, TracebackType
from typing import Any

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
OUT_OF_TIME = "the time limit"
REASONS = (*(number.name for number in SIGNALS), OUT_OF_TIME)
SLURM_END = "SLURM_JOB_END_TIME"  # seconds since the epoch; Slurm sets it in the tasks of a job
UNKNOWN_SAVE_SECONDS = 60.0  # before the first one is measured; never more than a tenth of the time left at the start
SAVE_MARGIN, STEP_MARGIN = 1.5, 2.0


def seconds_left(time_limit: float | None, env: Mapping[str, str]) -> float | None:
    """Seconds until this run has to end: `time_limit` in hours, or the end of the Slurm job if that is earlier."""
    found = [] if time_limit is None else [time_limit * 3600]
    end = env.get(SLURM_END, "")
    if end.isdecimal():
        found.append(int(end) - time.time())
    return min(found, default=None)


class StopRequests:
    """The stop requests of this rank: a context manager that handles signals in the main thread and restores the old handlers.

    seconds_left: until the run has to end, None without a limit. Time is monotonic: setting the clock changes nothing.
    """

    def __init__(self, seconds_left: float | None = None) -> None:
        self._signal: signal.Signals | None = None
        self._before: dict[signal.Signals, Any] = {}
        self._end = None if seconds_left is None else time.monotonic() + seconds_left
        self._saving = min(UNKNOWN_SAVE_SECONDS, 0.1 * max(seconds_left or 0.0, 0.0))
        self._step = 0.0
        self._saves = 0

    def __enter__(self) -> StopRequests:
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._handle) for number in SIGNALS}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self._signal == signal.SIGINT:
            raise KeyboardInterrupt
        if self._signal is None or number == signal.SIGINT:
            self._signal = signal.Signals(number)

    def step_took(self, seconds: float) -> None:
        """Note how long a step took: the time limit leaves room for the one during which it is noticed."""
        self._step = max(seconds, 0.9 * self._step)

    def save_took(self, seconds: float) -> None:
        """Note how long a checkpoint took, so that the last one begins early enough."""
        self._saving = seconds if not self._saves else max(self._saving, seconds)
        self._saves += 1

    @property
    def reason(self) -> str | None:
        """Why this rank wants to stop, one of REASONS, or None."""
        if self._signal is not None:
            return self._signal.name
        if self._end is not None:
            needed = SAVE_MARGIN * self._saving + STEP_MARGIN * self._step
            if time.monotonic() + needed >= self._end:
                return OUT_OF_TIME
        return None
