"""Where a rank stands: its step, its phase, the collective it waits in and the line that called it.

Read from outside by a sampler, so that the training loop pays for one assignment a step and nothing in between.
"""

from __future__ import annotations

import linecache
import os
import sys
import sysconfig
import threading
import time
from dataclasses import dataclass
from types import CodeType, FrameType

COLLECTIVES = (os.path.join("torch", "distributed") + os.sep, os.path.join("deepspeed", "comm") + os.sep)
BUSY_SHARE = 0.1  # of a core: a process that computes so much moves, though its stack may not show it


@dataclass(frozen=True)
class RankStatus:
    """Of one rank at one moment. still: seconds since it last moved; waits of samples: how often it was seen waiting in a
    collective, while training."""

    step: int
    phase: str
    collective: str
    place: str
    still: float
    waits: int = 0
    samples: int = 0


class Sampler:
    """Looks at the main thread now and then. count_cpu: computing counts as moving (on GPUs waiting computes, too)."""

    def __init__(self, count_cpu: bool) -> None:
        self.step, self.phase = 0, "starting"
        self._count_cpu = count_cpu
        self._main = threading.main_thread().ident
        self._libraries = tuple({sysconfig.get_path(name) + os.sep for name in ("stdlib", "purelib", "platlib")})
        # By id: hashing a code object reads all of it. The object is kept, so that its id stays its own.
        self._roles: dict[int, tuple[CodeType, str]] = {}
        self._lines: dict[tuple[int, int], bool] = {}
        self._last: tuple[int, ...] = ()
        self._cpu = time.process_time()
        self._still, self._waits, self._samples = 0.0, 0, 0
        self._collective, self._place = "", ""

    def look(self, elapsed: float) -> None:
        """Take a sample; elapsed: seconds since the last one."""
        frames = sys._current_frames()
        stack = list(_outwards(frames.get(self._main or 0)))
        mark = (self.step, hash(self.phase), *(id(frame.f_code) ^ frame.f_lasti for frame in stack))
        cpu = time.process_time()
        busy = self._count_cpu and cpu - self._cpu > BUSY_SHARE * elapsed
        self._still = 0.0 if busy or mark != self._last else self._still + elapsed
        self._last, self._cpu = mark, cpu
        self._collective, self._place = self._read(stack)
        if not self._collective:  # on GPUs the backward pass, and its collectives, run in a thread of their own
            for thread, frame in frames.items():
                if thread not in (self._main, threading.get_ident()):
                    collective, place = self._read(list(_outwards(frame)))
                    if collective:
                        self._collective, self._place = collective, place
                        break
        if self.phase == "training":
            self._samples += 1
            self._waits += bool(self._collective)

    def rank_status(self) -> RankStatus:
        """As of the last sample."""
        return RankStatus(self.step, self.phase, self._collective, self._place, self._still, self._waits, self._samples)

    def _read(self, stack: list[FrameType]) -> tuple[str, str]:
        """Name of the collective that a stack (innermost frame first) waits in, or '', and the line of ours that leads there."""
        collective, place = "", ""
        for depth, frame in enumerate(stack):
            role = self._role(frame.f_code)
            if role == "collective" and not collective and frame.f_code.co_name not in ("wrapper", "log_wrapper"):
                collective = frame.f_code.co_name
            if depth == 0 and not collective and self._awaits_work(frame):
                collective = "wait for a collective"
            if role == "ours":
                path = frame.f_code.co_filename.split(os.sep)
                place = f"{'/'.join(path[-2:])}:{frame.f_lineno} ({frame.f_code.co_name})"
                break
        return collective, place

    def _role(self, code: CodeType) -> str:
        known = self._roles.get(id(code))
        if known is None:
            name = code.co_filename
            if any(part in name for part in COLLECTIVES):
                role = "collective"
            else:
                library = name.startswith((*self._libraries, "<")) and f"{os.sep}megatronish{os.sep}" not in name
                role = "library" if library else "ours"
            known = self._roles[id(code)] = (code, role)
        return known[1]

    def _awaits_work(self, frame: FrameType) -> bool:
        """Whether the line is `handle.wait()`: what a collective started earlier is awaited by, in a call without a frame."""
        if self._role(frame.f_code) == "library" and os.sep + "deepspeed" + os.sep not in frame.f_code.co_filename:
            return False
        key = (id(frame.f_code), frame.f_lineno)
        if key not in self._lines:
            self._lines[key] = ".wait()" in linecache.getline(frame.f_code.co_filename, frame.f_lineno)
        return self._lines[key]


def _outwards(frame: FrameType | None) -> list[FrameType]:
    stack = []
    while frame is not None:
        stack.append(frame)
        frame = frame.f_back
    return stack
