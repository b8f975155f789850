"""Kills at chosen moments: a process sends itself SIGKILL, which nothing in it can catch or delay.

The code under test does not take part in choosing the moments: Python's audit events report each folder and each rename before
it is made, and a clock measures the time since then.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import threading
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

KINDS = ("step", "save", "rename")
COMMIT_EVENTS = {"os.rename", "os.remove", "os.rmdir", "shutil.rmtree"}  # the last audit events of a checkpoint
COMMIT_SECONDS = 0.05  # after the first of them: the latest moment of the kill


@dataclass(frozen=True)
class Kill:
    """One kill. rank: the process that is killed first; late: seconds until the others are killed.

    kind "step": `moment` steps after the start of the attempt (fractions allowed); "save": while checkpoint number `save` since
    the start is written, at the fraction `moment` of its usual time; "rename": during the commit of that checkpoint, before
    audit event number `moment`, or the fractional part of `moment` in milliseconds after it.
    """

    kind: str
    rank: int
    moment: float
    late: float
    save: int = 0


def plan_kills(count: int, ranks: int, save_interval: int, seed: int) -> list[Kill]:
    """`count` kills, the kinds in equal numbers (differing by at most one), in an order and at moments drawn from `seed`.

    A run advances by at most two checkpoints between two kills.
    """
    draw = random.Random(seed)
    kinds = [KINDS[number % len(KINDS)] for number in range(count)]
    draw.shuffle(kinds)
    kills = []
    for kind in kinds:
        late = draw.choice((0.0, 0.0, draw.uniform(0.0, 0.5)))
        if kind == "step":
            kills.append(Kill(kind, draw.randrange(ranks), draw.uniform(0.0, 2.0 * save_interval), late))
        elif kind == "save":
            kills.append(Kill(kind, draw.randrange(ranks), draw.uniform(0.0, 1.0), late, draw.choice((1, 2))))
        else:
            moment = draw.randrange(5) + draw.choice((0.0, draw.random()))
            kills.append(Kill(kind, 0, moment, late, draw.choice((1, 2))))
    return kills


class Trap:
    """Carries out a kill in its process. usual_step, usual_save: seconds; note: the file that records where it happened."""

    def __init__(self, kill: Kill, usual_step: float, usual_save: float, save_interval: int, note: Path) -> None:
        self._kill, self._usual_step, self._usual_save, self._note = kill, usual_step, usual_save, note
        # The step of the kill at the latest: a rank that writes no files makes no folder either.
        self._last_step = kill.moment if kill.kind == "step" else (kill.save + 1) * save_interval
        self._armed = threading.Event()
        self._saves = self._events = 0
        self._main = threading.main_thread().ident
        self.step = -1  # of the run
        if kill.kind != "step":
            sys.addaudithook(self._on_event)

    def begins_step(self, since_start: int, step: int) -> None:
        """Step `step` of the run begins, the step number `since_start` of this attempt."""
        self.step = step
        if since_start == int(self._last_step):
            self._kill_in(self._last_step % 1.0 * self._usual_step)

    def _on_event(self, event: str, arguments: tuple[Any, ...]) -> None:
        if self._kill.kind == "save":
            if event == "os.mkdir" and os.path.basename(os.path.dirname(str(arguments[0]))).startswith(".writing-"):
                self._saves += 1
                if self._saves == self._kill.save:
                    self._kill_in(self._kill.moment * self._usual_save)
        elif event in COMMIT_EVENTS:
            begins = event == "os.rename" and os.path.basename(str(arguments[0])).startswith(".writing-")
            self._saves += begins
            if self._saves == self._kill.save:
                self._on_commit(event, begins)

    def _on_commit(self, event: str, begins: bool) -> None:
        if self._events == int(self._kill.moment):
            fraction = self._kill.moment % 1.0
            self._kill_in(fraction / 1000) if fraction else self._kill_now(f"before {event}")
        self._events += 1
        if begins:
            self._kill_in(COMMIT_SECONDS)

    def _kill_in(self, seconds: float) -> None:
        if seconds != COMMIT_SECONDS:
            if self._armed.is_set():
                return
            self._armed.set()
        threading.Thread(target=self._kill_after, args=(seconds,), daemon=True).start()

    def _kill_after(self, seconds: float) -> None:
        end = time.monotonic() + seconds
        while (left := end - time.monotonic()) > 0:
            time.sleep(left)
        self._kill_now("")

    def _kill_now(self, where: str) -> None:
        frame = sys._current_frames().get(self._main or 0)
        while (
            frame is not None
            and "verify" not in frame.f_code.co_filename
            and "megatronish" not in frame.f_code.co_filename
        ):
            frame = frame.f_back
        position = f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno}" if frame is not None else "?"
        record = {**asdict(self._kill), "step": self.step, "where": where or f"main thread at {position}"}
        handle = os.open(self._note, os.O_WRONLY | os.O_CREAT)
        os.write(handle, json.dumps(record).encode())
        os.kill(os.getpid(), signal.SIGKILL)
