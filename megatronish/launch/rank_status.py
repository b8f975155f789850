"""The status of a rank: its step, its phase, the collective it waits in and the line that called it.

A sampler in another thread reads it, so the training loop only pays for one assignment per step.
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
BUSY_SHARE = 0.1  # of a core: a process that uses more makes progress, even if its stack does not change


@dataclass(frozen=True)
class RankStatus:
    """Status of one rank at one moment. location: file, line and function; idle: seconds since it last made progress; waits: how
    many of `samples`, taken while training, found it in a collective."""

    step: int
    phase: str
    collective: str
    location: str
    idle: float
    waits: int = 0
    samples: int = 0


class Sampler:
    """Samples the stack of the main thread. count_cpu: use of the CPU counts as progress (not on GPUs: waiting uses it, too)."""

    def __init__(self, count_cpu: bool) -> None:
        self.step, self.phase = 0, "starting"
        self._count_cpu = count_cpu
        self._main = threading.main_thread().ident
        self._libraries = tuple({sysconfig.get_path(name) + os.sep for name in ("stdlib", "purelib", "platlib")})
        # By id, because hashing a code object reads all of it. The object is kept so that its id is not reused.
        self._roles: dict[int, tuple[CodeType, str]] = {}
        self._lines: dict[tuple[int, int], bool] = {}
        self._last: tuple[int, ...] = ()
        self._cpu = time.process_time()
        self._idle, self._waits, self._samples = 0.0, 0, 0
        self._collective, self._location = "", ""

    def sample(self, elapsed: float) -> None:
        """Take a sample; elapsed: seconds since the last one."""
        frames = sys._current_frames()
        stack = list(_frames_outwards(frames.get(self._main or 0)))
        mark = (self.step, hash(self.phase), *(id(frame.f_code) ^ frame.f_lasti for frame in stack))
        cpu = time.process_time()
        busy = self._count_cpu and cpu - self._cpu > BUSY_SHARE * elapsed
        self._idle = 0.0 if busy or mark != self._last else self._idle + elapsed
        self._last, self._cpu = mark, cpu
        self._collective, self._location = self._read(stack)
        if not self._collective:  # on GPUs the backward pass and its collectives run in another thread
            for thread, frame in frames.items():
                if thread not in (self._main, threading.get_ident()):
                    collective, location = self._read(list(_frames_outwards(frame)))
                    if collective:
                        self._collective, self._location = collective, location
                        break
        if self.phase == "training":
            self._samples += 1
            self._waits += bool(self._collective)

    def status(self) -> RankStatus:
        """The status as of the last sample."""
        return RankStatus(
            self.step, self.phase, self._collective, self._location, self._idle, self._waits, self._samples
        )

    def _read(self, stack: list[FrameType]) -> tuple[str, str]:
        """The collective that a stack (innermost frame first) waits in, or '', and the line outside libraries that led there."""
        collective, location = "", ""
        for depth, frame in enumerate(stack):
            role = self._role(frame.f_code)
            if role == "collective" and not collective and frame.f_code.co_name not in ("wrapper", "log_wrapper"):
                collective = frame.f_code.co_name
            if depth == 0 and not collective and self._is_wait(frame):
                collective = "wait for a collective"
            if role == "ours":
                path = frame.f_code.co_filename.split(os.sep)
                location = f"{'/'.join(path[-2:])}:{frame.f_lineno} ({frame.f_code.co_name})"
                break
        return collective, location

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

    def _is_wait(self, frame: FrameType) -> bool:
        """Whether the line is `handle.wait()`, which waits for an asynchronous collective without a Python frame of its own."""
        if self._role(frame.f_code) == "library" and os.sep + "deepspeed" + os.sep not in frame.f_code.co_filename:
            return False
        key = (id(frame.f_code), frame.f_lineno)
        if key not in self._lines:
            self._lines[key] = ".wait()" in linecache.getline(frame.f_code.co_filename, frame.f_lineno)
        return self._lines[key]


def _frames_outwards(frame: FrameType | None) -> list[FrameType]:
    stack = []
    while frame is not None:
        stack.append(frame)
        frame = frame.f_back
    return stack
