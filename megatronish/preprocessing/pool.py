"""Processes that do units and hand back the results in order, however many there are.

Workers are forked, so the tokenizer is loaded once and its memory shared. One that dies ends the run with an error; when
the parent is killed, the workers see it within a batch and go too.
"""

from __future__ import annotations

import gc
import multiprocessing
import os
import signal
import sys
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any

from megatronish.errors import DataError
from megatronish.preprocessing.encoding import Job, Tally, UnitResult, encode_unit
from megatronish.preprocessing.units import Unit

# Units that a worker holds at a time: the next one waits in its pipe while the present one is done.
DEPTH = 2
# Units begun but not yet taken over, for each worker: bounds the shards that wait on the disk for an earlier one.
WINDOW = 4


class WorkerDied(RuntimeError):
    """A worker ended without a result."""


@dataclass
class _Worker:
    process: BaseProcess
    pipe: Connection
    held: set[int] = field(default_factory=set)


def results(
    job: Job, units: Iterator[Unit], workers: int, tell: Callable[[int, Tally], None]
) -> Iterator[tuple[Unit, UnitResult]]:
    """Each unit with its result, in order. `tell(unit, tally)` is called while units are being done.

    An error of making the units is raised after the results of the units before it; one of a worker (DataError, OSError)
    in place of its unit's result.
    """
    gc.enable()  # tools/preprocess_data.py starts without it
    if workers == 1 or "fork" not in multiprocessing.get_all_start_methods():
        for unit in units:
            yield unit, encode_unit(job, unit, lambda tally, index=unit.index: tell(index, tally))  # type: ignore[misc]
        return
    gc.freeze()  # a collection in a worker would else write to, and so copy, every page of objects that it shares
    pool = _Pool(job, workers, tell)
    try:
        yield from pool.run(units)
    finally:
        pool.close()
        gc.unfreeze()


class _Pool:
    def __init__(self, job: Job, workers: int, tell: Callable[[int, Tally], None]) -> None:
        self._job, self._count, self._tell = job, workers, tell
        self._workers: list[_Worker] = []
        self._finished: dict[int, UnitResult | BaseException] = {}
        self._units: dict[int, Unit] = {}

    def run(self, units: Iterator[Unit]) -> Iterator[tuple[Unit, UnitResult]]:
        following: int | None = None
        stop: BaseException | None = None
        while True:
            while stop is None and len(self._units) < WINDOW * self._count and (worker := self._free()):
                try:
                    unit = next(units)
                except StopIteration:
                    stop = StopIteration()
                except (DataError, OSError) as error:
                    stop = error
                else:
                    following = unit.index if following is None else following
                    self._units[unit.index] = unit
                    worker.held.add(unit.index)
                    _send(worker, unit)
            while following is not None and following in self._finished:
                result = self._finished.pop(following)
                unit = self._units.pop(following)
                following += 1
                if isinstance(result, BaseException):
                    raise result
                yield unit, result
                if result.fault is not None:
                    return
            if self._units:
                self._receive()
            elif stop is not None:
                if not isinstance(stop, StopIteration):
                    raise stop
                return

    def _free(self) -> _Worker | None:
        """The worker with the least to do, a new one if all have something and there may be more; None if all are full."""
        idle = min(self._workers, key=lambda worker: len(worker.held), default=None)
        if idle is not None and not idle.held:
            return idle
        if len(self._workers) < self._count:
            self._workers.append(self._start())
            return self._workers[-1]
        return idle if idle is not None and len(idle.held) < DEPTH else None

    def _start(self) -> _Worker:
        context = multiprocessing.get_context("fork")
        ours, theirs = context.Pipe()
        sys.stdout.flush()
        sys.stderr.flush()
        process = context.Process(target=_serve, args=(self._job, theirs, ours, os.getpid()), daemon=True)
        process.start()
        theirs.close()
        return _Worker(process, ours)

    def _receive(self) -> None:
        busy = {worker.pipe: worker for worker in self._workers if worker.held}
        for pipe in wait(list(busy)):
            worker = busy[pipe]  # type: ignore[index]
            try:
                index, message = worker.pipe.recv()
            except (EOFError, ConnectionResetError):
                raise _death(worker) from None
            if isinstance(message, Tally):
                self._tell(index, message)
                continue
            worker.held.discard(index)
            self._finished[index] = message

    def close(self) -> None:
        for worker in self._workers:
            worker.pipe.close()
            worker.process.terminate()
        for worker in self._workers:
            worker.process.join()


def _send(worker: _Worker, unit: Unit) -> None:
    try:
        worker.pipe.send(unit)
    except (BrokenPipeError, ConnectionResetError):
        raise _death(worker) from None


def _death(worker: _Worker) -> WorkerDied:
    worker.process.join(5)
    code = worker.process.exitcode
    if code is not None and code < 0:
        name = signal.Signals(-code).name
        memory = " (out of memory? try fewer --workers)" if -code == signal.SIGKILL else ""
        return WorkerDied(f"a worker was ended by {name}{memory}")
    return WorkerDied(f"a worker ended with status {code}")


def _serve(job: Job, pipe: Connection, parents_end: Connection, parent: int) -> None:
    """The life of a worker: a unit in, its result out, until the pipe closes."""
    parents_end.close()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    # One thread a worker: the workers share the cores, and a thread pool of the parent does not live on here.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"

    def send(index: int, message: Any) -> None:
        if os.getppid() != parent:
            os._exit(1)
        pipe.send((index, message))

    while True:
        try:
            unit = pipe.recv()
        except (EOFError, OSError):
            os._exit(0)
        try:
            result: Any = encode_unit(job, unit, lambda tally, index=unit.index: send(index, tally))  # type: ignore[misc]
        except (DataError, OSError) as error:
            result = error
        except BaseException:
            result = RuntimeError(f"in a worker:\n{traceback.format_exc()}")
        try:
            send(unit.index, result)
        except BrokenPipeError:
            os._exit(0)
