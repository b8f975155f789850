"""Ranks that exit, stop, hang, fail or are slow: all ranks exit within bounded time, and one of them prints why.

Real processes, killed and stopped. Upper bounds on time are those of the harness only: a loaded machine may be slow.
"""

from __future__ import annotations

import ctypes
import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from megatronish.errors import UserError, exit_on_user_error
from megatronish.launch import watchdog
from megatronish.launch.exit import EXIT_STOPPED
from megatronish.launch.rendezvous import join_rendezvous_from_env
from megatronish.launch.watchdog import Watchdog
from tests.launch.faulty_ranks import FaultyRanks, start_ranks

pytestmark = pytest.mark.distributed
TIMEOUT = 4.0  # of the watchdog in these tests, in seconds
LAST_STEP = 100_000


@contextmanager
def monitored(folder: Path) -> Iterator[Watchdog]:
    """A rank as in the training loop: after the rendezvous, with a watchdog, in a process group."""
    from megatronish.training.engine import start_process_group, stop_process_group

    rendezvous = join_rendezvous_from_env(60.0)
    with Watchdog(rendezvous, TIMEOUT, folder, count_cpu=True, compare=True) as watch:
        start_process_group(rendezvous=rendezvous)
        yield watch
    stop_process_group()


def steps(rank: int, folder: Path, fault: Callable[[int, int], Any]) -> int:
    """All-reduces in a loop, with `fault(rank, step)` before each."""
    with exit_on_user_error(rank == 0), monitored(folder) as watch:
        for step in range(LAST_STEP):
            watch.mark("training", step)
            if fault(rank, step):
                break
            dist.all_reduce(torch.ones(1))
            if step == 3:
                print("at work", flush=True)
            time.sleep(0.001)
    return 0


def nothing(rank: int, step: int) -> bool:
    return False


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., FaultyRanks]]:
    """Starts three ranks that run `steps`, and kills those that are left at the end."""
    started = []

    def run(fault: Callable[[int, int], Any] = nothing) -> FaultyRanks:
        started.append(start_ranks(3, tmp_path, steps, tmp_path, fault))
        return started[-1]

    yield run
    for ranks in started:
        ranks.kill()


def errors(ranks: FaultyRanks) -> list[str]:
    """The messages of all ranks."""
    return [line for rank in ranks.pids for line in ranks.output(rank).splitlines() if line.startswith("error: ")]


def test_a_run_without_faults(start: Callable[..., FaultyRanks], tmp_path: Path) -> None:
    """All ranks exit with status 0 although one finishes first; nothing is printed and no stack file is left."""

    def finish(rank: int, step: int) -> bool:
        return step == 10

    ranks = start(finish)
    assert ranks.wait() == {0: 0, 1: 0, 2: 0}, [ranks.output(rank) for rank in ranks.pids]
    assert errors(ranks) == []
    assert not (tmp_path / "stacks").exists()


@pytest.mark.parametrize("victim", [0, 2])
def test_a_killed_rank(start: Callable[..., FaultyRanks], victim: int) -> None:
    """Its closed socket is noticed at once, long before a heartbeat is missing."""
    ranks = start()
    ranks.wait_for_output(victim, "at work")
    os.kill(ranks.pids[victim], signal.SIGKILL)
    statuses = ranks.wait()
    assert statuses.pop(victim) == -signal.SIGKILL
    assert set(statuses.values()) == {EXIT_STOPPED}, [ranks.output(rank) for rank in ranks.pids]
    (message,) = errors(ranks) or [str([ranks.output(rank) for rank in ranks.pids])]
    assert (
        message.startswith(f"error: rank {victim} (")
        and f"pid {ranks.pids[victim]}) ended without an error message" in message
    )
    reporter = ranks.output(1 if victim == 0 else 0)
    assert "Likely cause: it was killed" in reporter and "Traceback" not in reporter


@pytest.mark.parametrize("victim", [0, 1])
def test_a_stopped_rank(start: Callable[..., FaultyRanks], victim: int, tmp_path: Path) -> None:
    """SIGSTOP: the others exit after the timeout, and wake and kill the stopped rank, which still writes its stacks.

    When rank 1 wakes it may receive rank 0's message and exit by itself.
    """
    ranks = start()
    ranks.wait_for_output(victim, "at work")
    os.kill(ranks.pids[victim], signal.SIGSTOP)
    begin = time.monotonic()
    statuses = ranks.wait()
    assert time.monotonic() - begin > TIMEOUT / 2, "not before the timeout"
    stacks = (tmp_path / "stacks" / f"rank-{victim:05d}.txt").read_text()
    assert statuses.pop(victim) in (-signal.SIGKILL, EXIT_STOPPED if victim else None), stacks
    assert set(statuses.values()) == {EXIT_STOPPED}, [ranks.output(rank) for rank in ranks.pids]
    (message,) = errors(ranks) or [str([ranks.output(rank) for rank in ranks.pids])]
    assert message.startswith(f"error: rank {victim} (") and "has sent no heartbeat for 4 s" in message
    reporter = ranks.output(1 if victim == 0 else 0)
    assert "in all_reduce, launch/test_watchdog.py:" in reporter, "where the others wait"
    assert "Likely cause: the process is stopped (SIGSTOP" in reporter
    assert "in steps" in stacks


def test_a_rank_that_holds_the_interpreter(start: Callable[..., FaultyRanks], tmp_path: Path) -> None:
    """None of its threads runs Python code: its stack is written by a signal handler before it is killed."""

    def hold(rank: int, step: int) -> None:
        if rank == 1 and step == 5:
            ctypes.PyDLL(None).read(os.pipe()[0], ctypes.create_string_buffer(1), 1)

    ranks = start(hold)
    assert ranks.wait() == {0: EXIT_STOPPED, 1: -signal.SIGKILL, 2: EXIT_STOPPED}, [
        ranks.output(rank) for rank in ranks.pids
    ]
    assert "in hold" in (tmp_path / "stacks" / "rank-00001.txt").read_text()


def test_requesting_stacks_does_not_disturb_the_run(start: Callable[..., FaultyRanks], tmp_path: Path) -> None:
    """A thousand requests, at arbitrary lines of the rank."""
    done = tmp_path / "asked"

    def until_asked(rank: int, step: int) -> bool:
        finished = torch.tensor(float(rank == 0 and done.exists()))
        dist.all_reduce(finished)
        return bool(finished)

    ranks = start(until_asked)
    ranks.wait_for_output(1, "at work")
    stacks = tmp_path / "stacks" / "rank-00001.txt"
    for _ in range(1000):
        os.kill(ranks.pids[1], signal.SIGUSR2)
        time.sleep(0.001)
    begin = time.monotonic()
    while "in until_asked" not in (written := stacks.read_text()) and time.monotonic() < begin + 30:
        os.kill(ranks.pids[1], signal.SIGUSR2)
        time.sleep(0.1)
    assert "in steps" in written and "in _watch" in written
    done.touch()
    assert ranks.wait() == {0: 0, 1: 0, 2: 0}, [ranks.output(rank) for rank in ranks.pids]


def test_a_rank_that_does_not_reach_a_collective(start: Callable[..., FaultyRanks], tmp_path: Path) -> None:
    def wander(rank: int, step: int) -> None:
        if rank == 1 and step == 5:
            time.sleep(1000)

    ranks = start(wander)
    assert ranks.wait() == {0: EXIT_STOPPED, 1: EXIT_STOPPED, 2: EXIT_STOPPED}, [
        ranks.output(rank) for rank in ranks.pids
    ]
    (message,) = errors(ranks) or [str([ranks.output(rank) for rank in ranks.pids])]
    assert "error: rank 1 (" in message
    assert "has not reached all_reduce at step 5, where ranks 0, 2 wait; no progress for" in message
    assert "rank 1: step 5, training, launch/test_watchdog.py" in ranks.output(0) and "(wander)" in ranks.output(0)
    assert "in wander" in (tmp_path / "stacks" / "rank-00001.txt").read_text()


def test_a_rank_with_an_error_of_its_own(start: Callable[..., FaultyRanks]) -> None:
    """Rank 0 prints the traceback; the failing rank exits with status 1, like python."""

    def raise_error(rank: int, step: int) -> None:
        if rank == 2 and step == 5:
            raise KeyError("no such thing")

    ranks = start(raise_error)
    assert ranks.wait() == {0: EXIT_STOPPED, 1: EXIT_STOPPED, 2: 1}, [ranks.output(rank) for rank in ranks.pids]
    (message,) = errors(ranks) or [str([ranks.output(rank) for rank in ranks.pids])]
    assert message.startswith("error: rank 2 (") and message.endswith(" failed at step 5 (training):")
    assert "KeyError: 'no such thing'" in ranks.output(0) and "in raise_error" in ranks.output(0)
    assert sum(ranks.output(rank).count("Traceback") for rank in ranks.pids) == 1


@pytest.mark.parametrize("failing", [{1}, {0, 1, 2}])
def test_a_user_error_after_the_rendezvous(start: Callable[..., FaultyRanks], failing: set[int]) -> None:
    """On one rank or on all: one message, and status 2 everywhere."""

    def refuse(rank: int, step: int) -> None:
        if rank in failing and step == 5:
            raise UserError("the loss is nan")

    ranks = start(refuse)
    assert ranks.wait() == {0: 2, 1: 2, 2: 2}, [ranks.output(rank) for rank in ranks.pids]
    (message,) = errors(ranks) or [str([ranks.output(rank) for rank in ranks.pids])]
    assert message.endswith("the loss is nan") and ("rank 1 (" in message) == (failing == {1})


def test_a_slow_rank(start: Callable[..., FaultyRanks], monkeypatch: pytest.MonkeyPatch) -> None:
    """It computes while the others wait; rank 0 prints a note, and the run continues."""
    monkeypatch.setattr(watchdog, "SLOW_SECONDS", 3.0)

    def compute(rank: int, step: int) -> None:
        if rank == 1:
            time.sleep(0.1)

    ranks = start(compute)
    ranks.wait_for_output(0, "note: rank 1 (")
    assert "is slow: it waits in collectives for" in ranks.output(0)
    assert errors(ranks) == [] and ranks.output(0).count("note: ") == 1


def test_a_suspended_job(start: Callable[..., FaultyRanks]) -> None:
    """Ctrl-Z and fg, longer apart than the timeout: nothing is reported, and the run continues."""
    ranks = start()
    for rank in ranks.pids:
        ranks.wait_for_output(rank, "at work")
    for number, pause in ((signal.SIGSTOP, TIMEOUT + 1), (signal.SIGCONT, 2.5)):
        for pid in ranks.pids.values():
            os.kill(pid, number)
        time.sleep(pause)
    assert errors(ranks) == []
    assert all(os.waitpid(pid, os.WNOHANG) == (0, 0) for pid in ranks.pids.values()), "all still run"
