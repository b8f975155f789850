"""Restarting a command until it succeeds, or until a restart cannot help.

Launchers do not pass on the exit status of the ranks (torchrun never, deepspeed not after a signal): the first rank writes its
own to the file that its environment names (exit.STATUS_FILE).
"""

from __future__ import annotations

import itertools
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from types import FrameType

import psutil

from megatronish.checkpoint.paths import CHECKPOINTS, LATEST
from megatronish.errors import ConfigError
from megatronish.launch.exit import EXIT_SAVED, STATUS_FILE

CTRL_C = 130
FINAL = {
    0: "done",
    2: "an error that the user has to fix",
    EXIT_SAVED: "asked to stop, saved",
    CTRL_C: "stopped by Ctrl-C",
}
RANK_NAMES = ("RANK", "OMPI_COMM_WORLD_RANK")  # in the environment of ranks, but not of launchers
PASSED_ON = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
ATTEMPTS_FILE = "attempts.jsonl"


class Supervisor:
    """Runs a command again when it fails.

    run_dir: of its checkpoints; retries: attempts in a row that may fail without a newer checkpoint; wait, longest_wait:
    seconds between attempts, at first and at most.
    """

    def __init__(self, command: Sequence[str], run_dir: Path, retries: int, wait: float, longest_wait: float) -> None:
        self._command, self._run_dir = list(command), run_dir
        self._retries, self._wait, self._longest = retries, wait, longest_wait
        self._child: subprocess.Popen[bytes] | None = None
        self._signal: signal.Signals | None = None
        self._woken = threading.Event()

    def run(self) -> int:
        """Start attempts until one is final or the retries are used up; returns the last exit status. Forwards signals meanwhile."""
        before = {number: signal.signal(number, self._pass_on) for number in PASSED_ON}
        try:
            return self._attempts()
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _attempts(self) -> int:
        failed, wait, attempt = 0, self._wait, 0
        while True:
            attempt += 1
            known, start = newest_checkpoint(self._run_dir), time.monotonic()
            status = self._attempt(attempt)
            newest = newest_checkpoint(self._run_dir)
            if newest != known:
                failed, wait = 0, self._wait
            failed += 1
            reason = self._final(status, failed)
            self._log(attempt, status, time.monotonic() - start, newest, reason)
            if reason:
                return status
            self._print(
                f"attempt {attempt} ended with {status}; the next one begins in {wait:g} s from {newest or 'the start'}"
            )
            self._woken.wait(wait)
            if self._signal:
                return 128 + self._signal
            wait = min(2 * wait, self._longest)

    def _final(self, status: int, failed: int) -> str:
        """The reason for no further attempt; '' when there is one."""
        if status in FINAL:
            return FINAL[status]
        if self._signal:
            return f"stopped by {self._signal.name}"
        return f"{failed} attempts in a row without a newer checkpoint" if failed > self._retries else ""

    def _attempt(self, number: int) -> int:
        self._print(f"attempt {number}: {' '.join(self._command)}")
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "status"
            status = self._start({**os.environ, STATUS_FILE: str(file)})
            return int(file.read_text()) if file.exists() else status

    def _start(self, env: dict[str, str]) -> int:
        try:
            # A session of its own: a terminal sends Ctrl-C to the supervisor only, which forwards it once.
            self._child = subprocess.Popen(self._command, env=env, start_new_session=True)
        except OSError as error:
            self._print(f"error: {self._command[0]} cannot be started: {error.strerror}")
            return 2
        if self._signal:  # while it was being started
            self._child.send_signal(self._signal)
        status = self._child.wait()
        self._child = None
        return status if status >= 0 else 128 - status

    def _pass_on(self, number: int, frame: FrameType | None) -> None:
        """Forward a signal to the ranks, which launchers would kill instead; where there are none, to the command."""
        self._signal = signal.Signals(number)
        self._woken.set()
        child = self._child
        if child is None:
            return
        for pid in ranks_below(child.pid) or [child.pid]:
            try:
                os.kill(pid, number)
            except ProcessLookupError:
                continue

    def _log(self, attempt: int, status: int, seconds: float, newest: str | None, reason: str) -> None:
        self._run_dir.mkdir(parents=True, exist_ok=True)
        line = {
            "attempt": attempt,
            "status": status,
            "seconds": round(seconds, 1),
            "checkpoint": newest,
            "final": reason,
        }
        with (self._run_dir / ATTEMPTS_FILE).open("a", encoding="utf-8") as file:
            file.write(json.dumps({"time": time.strftime("%Y-%m-%dT%H:%M:%S%z"), **line}) + "\n")
        if reason:
            self._print(f"attempt {attempt} ended with {status}: {reason}")

    def _print(self, text: str) -> None:
        print(f"supervise: {text}", file=sys.stderr, flush=True)


def ranks_below(pid: int) -> list[int]:
    """The descendants of `pid` that are ranks: their environment names a rank, that of their parents does not."""

    def is_rank(process: psutil.Process | None) -> bool:
        return process is not None and any(name in process.environ() for name in RANK_NAMES)

    found = []
    for process in psutil.Process(pid).children(recursive=True):
        try:
            if is_rank(process) and not is_rank(process.parent()):
                found.append(process.pid)
        except psutil.Error:  # gone meanwhile
            continue
    return found


def newest_checkpoint(run_dir: Path) -> str | None:
    """The name that `latest` holds, None without one."""
    try:
        return (run_dir / CHECKPOINTS / LATEST).read_text(encoding="utf-8").strip() or None
    except OSError:
        return None


def run_folder(command: Sequence[str]) -> Path:
    """train.save_dir of the run that a command line starts. Raises ConfigError where it cannot be determined."""
    words = [word for argument in command for word in ([argument] if argument[:2] != "--" else argument.split("=", 1))]
    options = {name: value for name, value in itertools.pairwise(words) if name.startswith("--")}
    if "--train.save_dir" in options:
        return Path(options["--train.save_dir"])
    file = options.get("--deepspeed_config")
    try:
        return Path(json.loads(Path(file or "").read_text(encoding="utf-8"))["megatronish"]["train"]["save_dir"])
    except (OSError, ValueError, KeyError, TypeError):
        raise ConfigError(
            f"neither --train.save_dir nor a readable --deepspeed_config is in {' '.join(command)!r}: give --run-dir."
        ) from None
