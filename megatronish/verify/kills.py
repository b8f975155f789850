"""Kills at chosen moments: a process strikes itself dead with SIGKILL, which nothing in it can notice or delay.

The moments are found without any help of the code that is tested: by Python's audit events, which tell of every folder made and
every rename before it is done, and by a clock from there on.
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
COMMIT_SECONDS = 0.05  # after the first of them, by when the kill comes at the latest


@dataclass(frozen=True)
class Kill:
    """One kill. rank: the process that dies first; late: seconds after which the others are killed.

    kind "step": `moment` steps (a fraction of one included) after the run went on; "save": in checkpoint number `save` since then,
    at the share `moment` of its usual time; "rename": in the commit of that one, before the event number `moment`, or, the
    fraction of it as milliseconds, behind.
    """

    kind: str
    rank: int
    moment: float
    late: float
    save: int = 0


def plan_kills(count: int, ranks: int, save_interval: int, seed: int) -> list[Kill]:
    """`count` kills, each kind as often as the others give or take one, in an order and at moments drawn from `seed`.

    From one to the next a run comes at most two checkpoints further.
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
    """A kill in the process that is to die. usual_step, usual_save: seconds; note: a file that takes where it struck."""

    def __init__(self, kill: Kill, usual_step: float, usual_save: float, save_interval: int, note: Path) -> None:
        self._kill, self._usual_step, self._usual_save, self._note = kill, usual_step, usual_save, note
        # When it should have struck long since: a rank that writes no file of its own hears of no folder.
        self._last_step = kill.moment if kill.kind == "step" else (kill.save + 1) * save_interval
        self._armed = threading.Event()
        self._saves = self._events = 0
        self._main = threading.main_thread().ident
        self.step = -1  # of the run, as the recorder counts
        if kill.kind != "step":
            sys.addaudithook(self._hear)

    def begins_step(self, since_start: int, step: int) -> None:
        """A step begins, so many after the run went on."""
        self.step = step
        if since_start == int(self._last_step):
            self._strike_in(self._last_step % 1.0 * self._usual_step)

    def _hear(self, event: str, arguments: tuple[Any, ...]) -> None:
        if self._kill.kind == "save":
            if event == "os.mkdir" and os.path.basename(os.path.dirname(str(arguments[0]))).startswith(".writing-"):
                self._saves += 1
                if self._saves == self._kill.save:
                    self._strike_in(self._kill.moment * self._usual_save)
        elif event in COMMIT_EVENTS:
            begins = event == "os.rename" and os.path.basename(str(arguments[0])).startswith(".writing-")
            self._saves += begins
            if self._saves == self._kill.save:
                self._hear_commit(event, begins)

    def _hear_commit(self, event: str, begins: bool) -> None:
        if self._events == int(self._kill.moment):
            fraction = self._kill.moment % 1.0
            self._strike_in(fraction / 1000) if fraction else self._strike(f"before {event}")
        self._events += 1
        if begins:
            self._strike_in(COMMIT_SECONDS)

    def _strike_in(self, seconds: float) -> None:
        if seconds != COMMIT_SECONDS:
            if self._armed.is_set():
                return
            self._armed.set()
        threading.Thread(target=self._wait_and_strike, args=(seconds,), daemon=True).start()

    def _wait_and_strike(self, seconds: float) -> None:
        end = time.monotonic() + seconds
        while (left := end - time.monotonic()) > 0:
            time.sleep(left)
        self._strike("")

    def _strike(self, where: str) -> None:
        frame = sys._current_frames().get(self._main or 0)
        while (
            frame is not None
            and "verify" not in frame.f_code.co_filename
            and "megatronish" not in frame.f_code.co_filename
        ):
            frame = frame.f_back
        stands = f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno}" if frame is not None else "?"
        told = {**asdict(self._kill), "step": self.step, "where": where or f"main thread at {stands}"}
        handle = os.open(self._note, os.O_WRONLY | os.O_CREAT)
        os.write(handle, json.dumps(told).encode())
        os.kill(os.getpid(), signal.SIGKILL)
