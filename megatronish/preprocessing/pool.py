"""Worker processes that encode units; results come back in order, however many workers there are.

Workers are forked, so the tokenizer is loaded once and its memory shared. A worker that dies ends the run with an error; when
the parent is killed, its workers exit within a fraction of a second.
"""

from __future__ import annotations

import gc
import itertools
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.process import BaseProcess

from megatronish.errors import DataError
from megatronish.preprocessing.encoding import EncodeJob, UnitResult, encode_unit
from megatronish.preprocessing.units import WorkUnit

# Units submitted and not yet committed, per worker: bounds the shards on disk that wait for an earlier one.
WINDOW = 4
PARENT_CHECK_SECONDS = 0.1


class WorkerDied(RuntimeError):
    """A worker ended without a result."""


def results(job: EncodeJob, units: Iterator[WorkUnit], workers: int) -> Iterator[tuple[WorkUnit, UnitResult]]:
    """Each unit with its result, in order; a result with a `fault` is the last.

    An error of making the units is raised after the results of the units before it; one of a worker (DataError, OSError)
    instead of its unit's result.
    """
    gc.enable()  # tools/preprocess_data.py starts without it
    first = list(itertools.islice(units, 2))
    units = itertools.chain(first, units)
    if workers == 1 or len(first) < 2 or "fork" not in multiprocessing.get_all_start_methods():
        for unit in units:
            yield unit, encode_unit(job, unit)
        return
    gc.freeze()  # a collection in a worker would otherwise write to, and so copy, every page of shared objects
    sys.stdout.flush()
    sys.stderr.flush()
    context = multiprocessing.get_context("fork")
    pool = ProcessPoolExecutor(workers, context, initializer=_start_worker, initargs=(job, os.getpid()))
    pool.submit(os.getpid)  # the first task starts all workers
    processes = list(pool._processes.values())  # not active_children(), which forgets a worker that has died already
    try:
        yield from _in_order(pool, units, WINDOW * workers)
    except BrokenProcessPool:
        raise _death(processes) from None
    finally:
        for process in processes:
            process.terminate()
        pool.shutdown(cancel_futures=True)
        gc.unfreeze()


def _in_order(
    pool: ProcessPoolExecutor, units: Iterator[WorkUnit], window: int
) -> Iterator[tuple[WorkUnit, UnitResult]]:
    submitted: deque[tuple[WorkUnit, Future[UnitResult]]] = deque()
    error: Exception | None = None
    exhausted = False
    while True:
        while not exhausted and len(submitted) < window:
            try:
                unit = next(units)
            except StopIteration:
                exhausted = True
            except (DataError, OSError) as found:
                error, exhausted = found, True
            else:
                submitted.append((unit, pool.submit(_encode_in_worker, unit)))
        if not submitted:
            break
        unit, future = submitted.popleft()
        result = future.result()
        yield unit, result
        if result.fault is not None:
            return
    if error is not None:
        raise error


def _death(processes: Sequence[BaseProcess]) -> WorkerDied:
    """Which signal ended a worker; the others are then terminated by the pool."""
    for process in processes:
        process.join(5)
    codes = [process.exitcode for process in processes]
    code = next((code for code in codes if code not in (0, None, -signal.SIGTERM)), codes[0])
    if code is not None and code < 0:
        name = signal.Signals(-code).name
        memory = " (out of memory? try fewer --workers)" if -code == signal.SIGKILL else ""
        return WorkerDied(f"a worker was ended by {name}{memory}")
    return WorkerDied(f"a worker ended with status {code}")


_job: EncodeJob  # of a worker, set once by its initializer


def _start_worker(job: EncodeJob, parent: int) -> None:
    global _job
    _job = job
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is handled by the parent
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    # One thread per worker: the workers share the cores, and a thread pool of the parent does not survive a fork.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    threading.Thread(target=_exit_with, args=(parent,), daemon=True).start()


def _exit_with(parent: int) -> None:
    """Ends this worker when the parent is gone: it would wait for units, holding the lock of the output, for ever."""
    while os.getppid() == parent:
        time.sleep(PARENT_CHECK_SECONDS)
    os._exit(1)


def _encode_in_worker(unit: WorkUnit) -> UnitResult:
    return encode_unit(_job, unit)
