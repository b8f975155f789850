"""Forked ranks that may fail: the output and the exit status of each."""

from __future__ import annotations

import contextlib
import gc
import os
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

from megatronish.launch.exit import run_program
from megatronish.launch.process import free_port

LIMIT_SECONDS = 60.0  # far above what any of these tests takes, even on a loaded machine


@dataclass
class FaultyRanks:
    """Processes by rank. Each wrote its stdout and stderr to folder/RANK.out."""

    folder: Path
    pids: dict[int, int]
    statuses: dict[int, int] = field(default_factory=dict)

    def wait(self) -> dict[int, int]:
        """Exit status by rank (negative: the signal that killed it), None for one that still runs at the limit."""
        deadline = time.monotonic() + LIMIT_SECONDS
        while len(self.statuses) < len(self.pids) and time.monotonic() < deadline:
            for rank, pid in self.pids.items():
                if rank not in self.statuses:
                    done, status = os.waitpid(pid, os.WNOHANG)
                    if done:
                        self.statuses[rank] = os.waitstatus_to_exitcode(status)
            time.sleep(0.02)
        return self.statuses

    def output(self, rank: int) -> str:
        return (self.folder / f"{rank}.out").read_text()

    def wait_for_output(self, rank: int, text: str) -> None:
        deadline = time.monotonic() + LIMIT_SECONDS
        while text not in self.output(rank):
            assert time.monotonic() < deadline, self.output(rank)
            time.sleep(0.02)

    def kill(self) -> None:
        for rank in self.pids.keys() - self.statuses.keys():
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pids[rank], signal.SIGKILL)
                os.waitpid(self.pids[rank], 0)


def start_ranks(
    world_size: int, folder: Path, function: Callable[..., Any], *args: Any, ranks: list[int] | None = None
) -> FaultyRanks:
    """Fork `function(rank, *args)` with the variables of rank `rank` of `world_size`, for each of `ranks` (all).

    A process exits like a launcher: with the status that `function` returns, or 1 after a traceback.
    """
    import megatronish.training.engine  # noqa: F401  imported once here, inherited by every fork

    port = free_port()
    pids = {}
    for rank in range(world_size) if ranks is None else ranks:
        out = folder / f"{rank}.out"
        out.touch()
        sys.stdout.flush()
        pid = os.fork()
        if pid:
            pids[rank] = pid
            continue
        gc.freeze()  # as in tests/distributed.py
        os.environ.update(
            RANK=str(rank),
            WORLD_SIZE=str(world_size),
            LOCAL_RANK=str(rank),
            MASTER_ADDR="127.0.0.1",
            MASTER_PORT=str(port),
        )
        _be_rank(out, partial(function, rank, *args))
    return FaultyRanks(folder, pids)


def _be_rank(out: Path, function: Callable[[], int | None]) -> NoReturn:
    """In the child: run `function` with its output in `out`, which pytest does not capture."""
    import torch

    descriptor = os.open(out, os.O_WRONLY | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    sys.stdout, sys.stderr = os.fdopen(1, "w", 1, closefd=False), os.fdopen(2, "w", 1, closefd=False)
    torch.set_num_threads(1)
    run_program(lambda: function() or 0)
