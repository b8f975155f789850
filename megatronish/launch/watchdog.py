"""A watchdog a rank: when ranks no longer work together, all end within a stated time, with one message.

A thread of every rank looks where the main thread stands (rank_status.py) and tells rank 0, over a socket (sockets.py). Rank 0's
thread judges, the others judge rank 0:
- a socket that closes without a farewell: that process is gone;
- no heartbeat for `timeout` seconds: stopped, frozen, or cut off;
- no rank moved for `timeout` seconds (ten times as long while starting, which reads checkpoints, or saving): stuck;
- a rank that reports its own error: as it says.
Then rank 0 prints the message, every rank writes its stacks to a file and ends with status 75 (exit.EXIT_STOPPED), and ranks that
cannot hear it are killed by those on their machine. Time is monotonic and of each rank alone; the time in which a rank itself
was stopped is not counted, so that a job can be suspended and continued as a whole.
"""

from __future__ import annotations

import contextlib
import faulthandler
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Iterable
from dataclasses import astuple
from pathlib import Path
from typing import NoReturn

from megatronish.errors import UserError
from megatronish.launch import failure_messages
from megatronish.launch.exit import EXIT_STOPPED, exit_now
from megatronish.launch.rank_status import COLLECTIVES, RankStatus, Sampler
from megatronish.launch.rendezvous import RankProcess, Rendezvous
from megatronish.launch.sockets import GONE, Message, RankSockets

STACKS = "stacks"
# Has a rank write its stacks whatever it does: from inside the signal, where a frame that is being made crashes it (CPython's
# issue 116008). So only where it is killed anyway and SIGUSR2, which its watching thread answers, gave nothing.
LAST_RESORT = signal.SIGVTALRM
PATIENT_PHASES = {"starting": 10.0, "saving": 10.0}
LOOK_SECONDS = 0.25
BEAT_SECONDS = 1.0
BEAT_SECONDS_A_RANK = 0.02  # rank 0 reads a heartbeat in 50 microseconds: 0.25% of its time, however many ranks
WELCOME_SECONDS = 2.0  # for all ranks to call rank 0: they do at once after they have met
ANSWER_SECONDS = 3.0  # for a rank that is to be killed to begin writing its stacks; one at work does in LOOK_SECONDS
WRITING_SECONDS = 0.5  # to end doing so
GRACE_SECONDS = 2.0  # for a rank's error to turn out to be every rank's, or the consequence of a death
LONGEST_ERROR = 20_000  # letters of a traceback that are told
SLOW_SECONDS = 60.0  # over which ranks are compared


class Watchdog:
    """Watches this rank and, with the others', the run. Use as a context manager.

    timeout: seconds, above 0; folder: of the run, `folder/stacks` takes a file a rank; count_cpu, compare: whether waiting
    leaves the CPU idle (gloo), and whether slow ranks are to be told. Raises LaunchError when rank 0 cannot be reached.
    """

    def __init__(
        self, rendezvous: Rendezvous, timeout: float, folder: Path, count_cpu: bool, compare: bool = False
    ) -> None:
        self._rendezvous, self._timeout, self._compare = rendezvous, timeout, compare
        self.beat_seconds = min(max(BEAT_SECONDS, BEAT_SECONDS_A_RANK * rendezvous.world_size), timeout / 4)
        self._sampler = Sampler(count_cpu)
        self._rank_statuses: dict[int, RankStatus] = {}
        self._silence = {place.rank: 0.0 for place in self._listened_to()}
        self._failures: dict[int, tuple[float, Message]] = {}
        self._compared: dict[int, RankStatus] = {}
        self._compare_at = SLOW_SECONDS
        self._told_slow: set[int] = set()
        self._failing: Message | None = None  # of this rank; set by the main thread
        self._own_status: int | None = None
        self._speaking = threading.RLock()  # one of the two threads says why; `_end` keeps it
        self._closing = threading.Event()
        self._folder = folder / STACKS
        self._folder.mkdir(parents=True, exist_ok=True)
        self._stacks_path = self._stacks_of(rendezvous.rank)
        self._stacks = self._stacks_path.open("w", encoding="utf-8")
        print(rendezvous.processes[rendezvous.rank], file=self._stacks, flush=True)
        self._sockets = RankSockets(rendezvous)
        faulthandler.enable(self._stacks)
        faulthandler.register(LAST_RESORT, self._stacks, all_threads=True)
        # Signals by number, as they come: the watching thread reads them whatever the main thread waits in.
        self._signals, self._signals_in = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        self._before = (
            signal.set_wakeup_fd(self._signals_in, warn_on_full_buffer=False),
            signal.getsignal(signal.SIGUSR2),
        )
        signal.signal(signal.SIGUSR2, lambda number, frame: None)
        signal.siginterrupt(signal.SIGUSR2, False)
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self._thread.start()

    def __enter__(self) -> Watchdog:
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if error is None:
            self.close()
        else:
            self.fail(error)

    @property
    def thread_ident(self) -> int:
        """Of the watching thread."""
        assert self._thread.ident is not None
        return self._thread.ident

    def mark(self, phase: str, step: int) -> None:
        """Say what this rank does now: "training", "validating" or "saving"; steps done."""
        self._sampler.step, self._sampler.phase = step, phase

    def close(self) -> None:
        """Take leave of the other ranks: from now on this one may end."""
        self._closing.set()
        self._thread.join()
        wakeup, handler = self._before
        signal.set_wakeup_fd(wakeup)
        signal.signal(signal.SIGUSR2, handler)
        os.close(self._signals)
        os.close(self._signals_in)
        faulthandler.unregister(LAST_RESORT)
        faulthandler.enable()
        self._stacks.close()
        self._stacks_path.unlink(missing_ok=True)
        with contextlib.suppress(OSError):
            self._folder.rmdir()

    def fail(self, error: BaseException) -> None:
        """Tell the others that this rank cannot go on.

        Returns when its own error is what the user must see, which the caller raises. Where rank 0 tells it, or it only
        follows from another rank's end, the process ends in here.
        """
        lost = not isinstance(error, UserError) and communication_failed(error)
        if isinstance(error, UserError):
            status, text = 2, str(error)
        elif isinstance(error, KeyboardInterrupt):
            status, text = 130, "stopped by Ctrl-C"
        else:
            status, text = 1, "".join(traceback.format_exception(error)).strip()[-LONGEST_ERROR:]
        if lost:
            text = "".join(traceback.format_exception_only(error)).strip()
        else:
            with self._speaking:
                self._own_status = status
        self._failing = {"failed": text, "status": status, "lost": lost}
        if self._rendezvous.rank or lost:
            self._thread.join(3 * GRACE_SECONDS)
        else:
            self._closing.wait(1.0)  # until the others are told

    def _listened_to(self) -> Iterable[RankProcess]:
        return self._rendezvous.processes[1:] if self._rendezvous.rank == 0 else self._rendezvous.processes[:1]

    def _watch(self) -> None:
        """The thread: until this rank takes leave, or, should the watchdog itself fail, without leaving the others alarmed."""
        try:
            for rank, message in self._sockets.welcome(min(WELCOME_SECONDS, self._timeout / 4)):
                self._hear(rank, message)
            self._rounds()
        finally:
            self._sockets.send_all({"bye": True})
            self._sockets.flush(1.0)
            self._sockets.close()

    def _rounds(self) -> None:
        """Hear, look, tell and judge, again and again."""
        looked = time.monotonic()
        beaten, ran = 0.0, self.beat_seconds  # seconds that this process ran; the first beat goes at once
        told_failure = False
        while not self._closing.is_set():
            while (rest := looked + LOOK_SECONDS - time.monotonic()) > 0 and not self._closing.is_set():
                for rank, message in self._sockets.receive(rest):
                    self._hear(rank, message)
            if self._asked_for_stacks():
                faulthandler.dump_traceback(self._stacks, all_threads=True)
            now = time.monotonic()
            elapsed = min(now - looked, 2 * LOOK_SECONDS)  # a longer gap means that this process was stopped
            looked, ran = now, ran + elapsed
            self._sampler.look(elapsed)
            if self._failing and not told_failure:
                told_failure = True
                self._tell_failure(self._failing)
            self._judge_failures()
            if ran - beaten >= self.beat_seconds:
                self._rank_statuses[self._rendezvous.rank] = rank_status = self._sampler.rank_status()
                self._sockets.send_all({"beat": astuple(rank_status)})
                self._judge(ran - beaten)
                beaten = ran

    def _asked_for_stacks(self) -> bool:
        """Whether SIGUSR2 has come since the last call."""
        with contextlib.suppress(BlockingIOError):
            return signal.SIGUSR2 in os.read(self._signals, 1 << 16)
        return False

    def _hear(self, rank: int, message: Message) -> None:
        if rank not in self._silence:
            return
        self._silence[rank] = 0.0
        if "beat" in message:
            self._rank_statuses[rank] = RankStatus(*message["beat"])
        elif "bye" in message:
            del self._silence[rank]
            self._rank_statuses.pop(rank, None)
        elif "failed" in message:
            self._failures.setdefault(rank, (time.monotonic(), message))
        elif "stop" in message:
            self._kill(message["kill"])
            self._end(message["stop"], "")
        elif message == GONE:
            self._gone(rank)

    def _gone(self, rank: int) -> None:
        """A rank's process has ended without a farewell; if it told an error before, that error is the reason."""
        if rank in self._failures:
            del self._silence[rank]
            return
        speaks = self._rendezvous.rank <= 1  # where rank 0 is gone, rank 1 speaks for the others
        self._end(
            EXIT_STOPPED,
            failure_messages.process_ended(self._rendezvous.processes[rank], self._rank_statuses) if speaks else "",
        )

    def _tell_failure(self, failing: Message) -> None:
        if self._rendezvous.rank:
            self._sockets.send_all(failing)
        elif failing["lost"]:
            self._failures[0] = (time.monotonic(), failing)
        else:
            status = failing["status"] if failing["status"] != 1 else EXIT_STOPPED
            self._sockets.send_all({"stop": status, "kill": []})
            self._sockets.flush(1.0)
            self._closing.set()

    def _judge(self, elapsed: float) -> None:
        """End the run if it does not go on; elapsed: seconds since the last judgement."""
        for rank in self._silence:
            self._silence[rank] += elapsed
        # Rank 1 judges a silent rank 0 before the others do: who kills it first would leave rank 1 a dead one to explain.
        patience = self._timeout + (2 * GRACE_SECONDS if self._rendezvous.rank > 1 else 0.0)
        quiet = [place for place in self._listened_to() if self._silence.get(place.rank, 0.0) > patience]
        if quiet:
            text = (
                failure_messages.no_heartbeat(quiet, self._timeout, self._rank_statuses)
                if self._rendezvous.rank <= 1
                else ""
            )
            self._end(EXIT_STOPPED, text, quiet)
        if self._rendezvous.rank == 0:
            self._tell_slow_ranks(elapsed)
        elif self._silence:
            return  # rank 0 judges; without it every rank judges itself
        known = {
            rank: rank_status for rank, rank_status in self._rank_statuses.items() if rank or not self._rendezvous.rank
        }
        if not known.keys() >= self._silence.keys():
            return
        still = min(rank_status.still for rank_status in known.values())
        if still > self._timeout * max(PATIENT_PHASES.get(rank_status.phase, 1.0) for rank_status in known.values()):
            self._end(EXIT_STOPPED, failure_messages.no_progress(self._rendezvous.processes, still, known))

    def _judge_failures(self) -> None:
        """Rank 0 only: what a rank told of itself, after the grace in which rank 0 may say it itself."""
        for rank, (when, message) in self._failures.items():
            if time.monotonic() - when < (2 if message["lost"] else 1) * GRACE_SECONDS:
                continue
            with self._speaking:
                if self._rendezvous.rank or self._own_status is not None:
                    return
                place, rank_status = self._rendezvous.processes[rank], self._rank_statuses.get(rank)
                if message["lost"]:
                    self._end(
                        EXIT_STOPPED, failure_messages.collective_failed(place, message["failed"], self._rank_statuses)
                    )
                status = EXIT_STOPPED if message["status"] == 1 else message["status"]
                self._end(status, failure_messages.rank_failed(place, message["failed"], rank_status))

    def _tell_slow_ranks(self, elapsed: float) -> None:
        self._compare_at -= elapsed
        if not self._compare or self._compare_at > 0:
            return
        enough = int(SLOW_SECONDS / LOOK_SECONDS / 2)
        for rank, note in failure_messages.slow_ranks(
            self._rendezvous.processes, self._compared, self._rank_statuses, enough
        ).items():
            if rank not in self._told_slow:
                self._told_slow.add(rank)
                _write(f"note: {note}")
        self._compared, self._compare_at = dict(self._rank_statuses), SLOW_SECONDS

    def _end(self, status: int, text: str, quiet: Iterable[RankProcess] = ()) -> NoReturn:
        """End this rank, and from rank 0 all of them, after saying why; ranks in `quiet` cannot hear it and are killed."""
        self._speaking.acquire()
        kill = [[place.pid_namespace, place.pid, place.rank] for place in quiet]
        if text:
            _write(f"error: {text}")
        if text and status == EXIT_STOPPED:
            _write(f"Stacks of the ranks: {self._folder}. The same command goes on from the last checkpoint.")
        if self._rendezvous.rank == 0:
            self._sockets.send_all({"stop": status, "kill": kill})
            self._sockets.flush(1.0)
        faulthandler.dump_traceback(self._stacks, all_threads=True)
        self._kill(kill)
        exit_now(status if self._own_status is None else self._own_status)

    def _kill(self, identities: Iterable[list]) -> None:
        """Have ranks of this machine that do not answer write their stacks, then kill them."""
        mine = self._rendezvous.processes[self._rendezvous.rank].pid_namespace
        local = {pid: rank for pid_namespace, pid, rank in identities if pid_namespace == mine and pid != os.getpid()}
        if not local:
            return
        before = {pid: _size(self._stacks_of(rank)) for pid, rank in local.items()}

        def mute() -> list[int]:
            return [pid for pid, rank in local.items() if _size(self._stacks_of(rank)) == before[pid]]

        _send(local, signal.SIGUSR2, signal.SIGCONT)
        deadline = time.monotonic() + ANSWER_SECONDS
        while mute() and time.monotonic() < deadline:
            time.sleep(0.05)
        _send(mute(), LAST_RESORT)
        time.sleep(WRITING_SECONDS)
        _send(local, signal.SIGKILL)

    def _stacks_of(self, rank: int) -> Path:
        return self._folder / f"rank-{rank:05d}.txt"


def communication_failed(error: BaseException) -> bool:
    """Whether an exception came out of a collective: then another rank's end may be the reason."""
    import torch.distributed as dist

    if isinstance(error, dist.DistError):
        return True
    if not isinstance(error, RuntimeError):
        return False
    frames = traceback.extract_tb(error.__traceback__)
    inside = bool(frames) and any(part in frames[-1].filename for part in COLLECTIVES)
    return inside or "gloo" in str(error) or "NCCL" in str(error)


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return 0


def _send(pids: Iterable[int], *numbers: signal.Signals) -> None:
    for pid in pids:
        for number in numbers:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(pid, number)


def _write(text: str) -> None:
    """To stderr without its lock, which a hanging main thread may hold."""
    lead = "\n" if sys.stdout.isatty() else ""  # below the live line
    with contextlib.suppress(OSError):  # nobody reads it any more
        os.write(2, f"{lead}{text}\n".encode())
