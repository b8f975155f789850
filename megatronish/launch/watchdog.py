"""A watchdog in every rank: if ranks fail or hang, all ranks exit within bounded time, with one message.

A thread of every rank samples the status of the main thread (rank_status.py) and sends it to rank 0 over a socket
(sockets.py). Rank 0 monitors the other ranks, and they monitor rank 0, for these failures:
- a socket was closed without a "bye" message: that process is gone;
- no heartbeat for `timeout` seconds: the process is stopped, frozen, or unreachable;
- no rank made progress for `timeout` seconds (ten times as long while starting, which reads checkpoints, or saving);
- a rank reports an error of its own.
Rank 0 then prints a message, every rank writes its stacks to a file and exits with status 75 (exit.EXIT_STOPPED), and ranks
that do not respond are killed by those on their machine. Each rank uses its own monotonic clock and does not count the time
in which it was stopped itself, so that a job can be suspended and continued.
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
# Writes the stacks of a rank from its signal handler, which can crash the rank while a frame is being created (CPython issue
# 116008). Only used before a rank is killed, if its watchdog thread did not respond to SIGUSR2.
LAST_RESORT = signal.SIGVTALRM
SLOW_PHASES = {"starting": 10.0, "saving": 10.0}
SAMPLE_SECONDS = 0.25
BEAT_SECONDS = 1.0
BEAT_SECONDS_PER_RANK = 0.02  # rank 0 reads a heartbeat in 50 us: 0.25% of its time, whatever the number of ranks
CONNECTED_SECONDS = 2.0  # for all ranks to connect to rank 0, which they do right after the rendezvous
ANSWER_SECONDS = (
    3.0  # for a rank that is to be killed to begin writing its stacks; a running one does in SAMPLE_SECONDS
)
WRITING_SECONDS = 0.5  # to finish writing them
GRACE_SECONDS = 2.0  # for an error to turn out to be the same on every rank, or the consequence of another rank's exit
MAX_ERROR = 20_000  # characters of a traceback that are reported
SLOW_SECONDS = 60.0  # period over which ranks are compared


class Watchdog:
    """Monitors this rank and, together with those of the other ranks, the run. Use as a context manager.

    timeout: seconds, above 0; folder: of the run; each rank writes a file in `folder/stacks`; count_cpu: whether waiting in a
    collective leaves the CPU idle (gloo); compare: whether to report slow ranks. Raises LaunchError if rank 0 cannot be
    reached.
    """

    def __init__(
        self, rendezvous: Rendezvous, timeout: float, folder: Path, count_cpu: bool, compare: bool = False
    ) -> None:
        self._rank, self._processes = rendezvous.rank, rendezvous.processes
        self._timeout, self._compare = timeout, compare
        self.beat_seconds = min(max(BEAT_SECONDS, BEAT_SECONDS_PER_RANK * rendezvous.world_size), timeout / 4)
        self._sampler = Sampler(count_cpu)
        self._statuses: dict[int, RankStatus] = {}
        self._silence = {process.rank: 0.0 for process in self._monitored()}
        self._failures: dict[int, tuple[float, Message]] = {}
        self._compared: dict[int, RankStatus] = {}
        self._compare_at = SLOW_SECONDS
        self._reported_slow: set[int] = set()
        self._failing: Message | None = None  # of this rank; set by the main thread
        self._own_status: int | None = None
        self._reporting = threading.RLock()  # held by the thread that reports a failure; `_exit_all` never releases it
        self._closing = threading.Event()
        self._folder = folder / STACKS
        self._folder.mkdir(parents=True, exist_ok=True)
        self._stacks_path = self._stacks_of(rendezvous.rank)
        self._stacks = self._stacks_path.open("w", encoding="utf-8")
        print(rendezvous.processes[rendezvous.rank], file=self._stacks, flush=True)
        self._sockets = RankSockets(rendezvous)
        faulthandler.enable(self._stacks)
        faulthandler.register(LAST_RESORT, self._stacks, all_threads=True)
        # The watchdog thread reads signal numbers from this pipe, whatever the main thread waits in.
        self._signals, self._signals_in = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        self._previous_wakeup = signal.set_wakeup_fd(self._signals_in, warn_on_full_buffer=False)
        self._previous_handler = signal.signal(signal.SIGUSR2, lambda number, frame: None)
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
        """Identifier of the watchdog thread."""
        assert self._thread.ident is not None
        return self._thread.ident

    def mark(self, phase: str, step: int) -> None:
        """Set the phase of this rank ("training", "validating" or "saving") and the number of steps done."""
        self._sampler.step, self._sampler.phase = step, phase

    def close(self) -> None:
        """Send "bye" to the other ranks: this rank may exit from now on."""
        self._closing.set()
        self._thread.join()
        signal.set_wakeup_fd(self._previous_wakeup)
        signal.signal(signal.SIGUSR2, self._previous_handler)
        os.close(self._signals)
        os.close(self._signals_in)
        faulthandler.unregister(LAST_RESORT)
        faulthandler.enable()
        self._stacks.close()
        self._stacks_path.unlink(missing_ok=True)
        with contextlib.suppress(OSError):
            self._folder.rmdir()

    def fail(self, error: BaseException) -> None:
        """Report to the other ranks that this one failed.

        Returns if the caller is to raise the error, because it is the one to show to the user. If rank 0 reports it, or if
        it is only a consequence of another rank's exit, the process exits here.
        """
        lost = not isinstance(error, UserError) and communication_failed(error)
        if isinstance(error, UserError):
            status, text = 2, str(error)
        elif isinstance(error, KeyboardInterrupt):
            status, text = 130, "stopped by Ctrl-C"
        else:
            status, text = 1, "".join(traceback.format_exception(error)).strip()[-MAX_ERROR:]
        if lost:
            text = "".join(traceback.format_exception_only(error)).strip()
        else:
            with self._reporting:
                self._own_status = status
        self._failing = {"failed": text, "status": status, "lost": lost}
        if self._rank or lost:
            self._thread.join(3 * GRACE_SECONDS)
        else:
            self._closing.wait(1.0)  # until the others are notified

    def _monitored(self) -> Iterable[RankProcess]:
        return self._processes[1:] if self._rank == 0 else self._processes[:1]

    def _watch(self) -> None:
        """The watchdog thread. It always sends "bye", so that an error of the watchdog itself does not stop the run."""
        try:
            for rank, message in self._sockets.accept_all(min(CONNECTED_SECONDS, self._timeout / 4)):
                self._handle(rank, message)
            self._run()
        finally:
            self._sockets.send_all({"bye": True})
            self._sockets.flush(1.0)
            self._sockets.close()

    def _run(self) -> None:
        """Receive, sample, send and check in a loop."""
        sampled = time.monotonic()
        beaten, ran = 0.0, self.beat_seconds  # seconds that this process ran; the first heartbeat is sent at once
        failure_sent = False
        while not self._closing.is_set():
            while (rest := sampled + SAMPLE_SECONDS - time.monotonic()) > 0 and not self._closing.is_set():
                for rank, message in self._sockets.receive(rest):
                    self._handle(rank, message)
            if self._stacks_requested():
                faulthandler.dump_traceback(self._stacks, all_threads=True)
            now = time.monotonic()
            elapsed = min(now - sampled, 2 * SAMPLE_SECONDS)  # a longer gap means that this process was stopped
            sampled, ran = now, ran + elapsed
            self._sampler.sample(elapsed)
            if self._failing and not failure_sent:
                failure_sent = True
                self._send_failure(self._failing)
            self._check_failures()
            if ran - beaten >= self.beat_seconds:
                self._statuses[self._rank] = status = self._sampler.status()
                self._sockets.send_all({"beat": astuple(status)})
                self._check(ran - beaten)
                beaten = ran

    def _stacks_requested(self) -> bool:
        """Whether SIGUSR2 has come since the last call."""
        with contextlib.suppress(BlockingIOError):
            return signal.SIGUSR2 in os.read(self._signals, 1 << 16)
        return False

    def _handle(self, rank: int, message: Message) -> None:
        if rank not in self._silence:
            return
        self._silence[rank] = 0.0
        if "beat" in message:
            self._statuses[rank] = RankStatus(*message["beat"])
        elif "bye" in message:
            del self._silence[rank]
            self._statuses.pop(rank, None)
        elif "failed" in message:
            self._failures.setdefault(rank, (time.monotonic(), message))
        elif "stop" in message:
            self._kill(message["kill"])
            self._exit_all(message["stop"], "")
        elif message == GONE:
            self._handle_gone(rank)

    def _handle_gone(self, rank: int) -> None:
        """A rank's process exited without "bye". If it reported an error before, that error is the reason."""
        if rank in self._failures:
            del self._silence[rank]
            return
        reports = self._rank <= 1  # if rank 0 is gone, rank 1 reports it
        text = failure_messages.process_ended(self._processes[rank], self._statuses) if reports else ""
        self._exit_all(EXIT_STOPPED, text)

    def _send_failure(self, failing: Message) -> None:
        if self._rank:
            self._sockets.send_all(failing)
        elif failing["lost"]:
            self._failures[0] = (time.monotonic(), failing)
        else:
            status = failing["status"] if failing["status"] != 1 else EXIT_STOPPED
            self._sockets.send_all({"stop": status, "kill": []})
            self._sockets.flush(1.0)
            self._closing.set()

    def _check(self, elapsed: float) -> None:
        """Stop the run if a rank is silent or no rank makes progress; elapsed: seconds since the last check."""
        for rank in self._silence:
            self._silence[rank] += elapsed
        # Rank 1 detects a silent rank 0 before the others do; otherwise one of them would kill it before rank 1 can report it.
        limit = self._timeout + (2 * GRACE_SECONDS if self._rank > 1 else 0.0)
        quiet = [process for process in self._monitored() if self._silence.get(process.rank, 0.0) > limit]
        if quiet:
            text = failure_messages.no_heartbeat(quiet, self._timeout, self._statuses) if self._rank <= 1 else ""
            self._exit_all(EXIT_STOPPED, text, quiet)
        if self._rank == 0:
            self._report_slow_ranks(elapsed)
        elif self._silence:
            return  # rank 0 checks for progress; without it every rank checks itself
        known = {rank: status for rank, status in self._statuses.items() if rank or not self._rank}
        if not known.keys() >= self._silence.keys():
            return
        idle = min(status.idle for status in known.values())
        if idle > self._timeout * max(SLOW_PHASES.get(status.phase, 1.0) for status in known.values()):
            self._exit_all(EXIT_STOPPED, failure_messages.no_progress(self._processes, idle, known))

    def _check_failures(self) -> None:
        """Rank 0 only: report the error of another rank, unless rank 0 fails in the same way within GRACE_SECONDS."""
        for rank, (when, message) in self._failures.items():
            if time.monotonic() - when < (2 if message["lost"] else 1) * GRACE_SECONDS:
                continue
            with self._reporting:
                if self._rank or self._own_status is not None:
                    return
                process, text = self._processes[rank], message["failed"]
                if message["lost"]:
                    self._exit_all(EXIT_STOPPED, failure_messages.collective_failed(process, text, self._statuses))
                exit_status = EXIT_STOPPED if message["status"] == 1 else message["status"]
                self._exit_all(exit_status, failure_messages.rank_failed(process, text, self._statuses.get(rank)))

    def _report_slow_ranks(self, elapsed: float) -> None:
        self._compare_at -= elapsed
        if not self._compare or self._compare_at > 0:
            return
        min_samples = int(SLOW_SECONDS / SAMPLE_SECONDS / 2)
        notes = failure_messages.slow_ranks(self._processes, self._compared, self._statuses, min_samples)
        for rank, note in notes.items():
            if rank not in self._reported_slow:
                self._reported_slow.add(rank)
                _write(f"note: {note}")
        self._compared, self._compare_at = dict(self._statuses), SLOW_SECONDS

    def _exit_all(self, status: int, text: str, quiet: Iterable[RankProcess] = ()) -> NoReturn:
        """Report the failure and exit; on rank 0, make all ranks exit. Ranks in `quiet` do not respond and are killed."""
        self._reporting.acquire()
        kill = [[process.pid_namespace, process.pid, process.rank] for process in quiet]
        if text:
            _write(f"error: {text}")
        if text and status == EXIT_STOPPED:
            _write(f"Stacks of the ranks: {self._folder}. The same command resumes from the last checkpoint.")
        if self._rank == 0:
            self._sockets.send_all({"stop": status, "kill": kill})
            self._sockets.flush(1.0)
        faulthandler.dump_traceback(self._stacks, all_threads=True)
        self._kill(kill)
        exit_now(status if self._own_status is None else self._own_status)

    def _kill(self, identities: Iterable[list]) -> None:
        """Make unresponsive ranks of this machine write their stacks, then kill them."""
        mine = self._processes[self._rank].pid_namespace
        local = {pid: rank for pid_namespace, pid, rank in identities if pid_namespace == mine and pid != os.getpid()}
        if not local:
            return
        before = {pid: _size(self._stacks_of(rank)) for pid, rank in local.items()}

        def without_stacks() -> list[int]:
            return [pid for pid, rank in local.items() if _size(self._stacks_of(rank)) == before[pid]]

        _send(local, signal.SIGUSR2, signal.SIGCONT)
        deadline = time.monotonic() + ANSWER_SECONDS
        while without_stacks() and time.monotonic() < deadline:
            time.sleep(0.05)
        _send(without_stacks(), LAST_RESORT)
        time.sleep(WRITING_SECONDS)
        _send(local, signal.SIGKILL)

    def _stacks_of(self, rank: int) -> Path:
        return self._folder / f"rank-{rank:05d}.txt"


def communication_failed(error: BaseException) -> bool:
    """Whether an exception was raised by a collective, so that another rank's exit may be the reason."""
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
    """Write to stderr without its lock, which a hanging main thread may hold."""
    lead = "\n" if sys.stdout.isatty() else ""  # after the progress line
    with contextlib.suppress(OSError):  # the reader is gone
        os.write(2, f"{lead}{text}\n".encode())
