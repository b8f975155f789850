"""Exiting a process within bounded time, whatever its threads, its peers or its libraries are waiting for."""

from __future__ import annotations

import atexit
import os
import sys
import threading
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

SHUTDOWN_SECONDS = 20.0
INTERRUPTED_SECONDS = 3.0  # instead of SHUTDOWN_SECONDS, after Ctrl-C
FLUSH_SECONDS = 1.0
EXIT_STOPPED = 75  # exit status of a run that the watchdog ended: EX_TEMPFAIL of sysexits.h, "temporary failure"
EXIT_SAVED = 76  # exit status of a run that saved and stopped because of a signal or its time limit

# Environment variable with the file to which the first rank writes its exit status, for launchers/supervise.py.
STATUS_FILE = "MEGATRONISH_STATUS_FILE"


def exit_now(status: int) -> NoReturn:
    """Exit with `status` at once, without clean-up. Buffered output is written if that takes at most FLUSH_SECONDS."""

    def flush() -> None:
        sys.stdout.flush()
        sys.stderr.flush()

    writer = threading.Thread(target=flush, daemon=True)  # a thread that hangs in print holds the lock of stdout
    writer.start()
    writer.join(FLUSH_SECONDS)
    os._exit(status)


def exit_within(seconds: float, status: int) -> threading.Timer:
    """Exit with `status` in `seconds`, even if threads hang, unless the returned timer is cancelled."""
    timer = threading.Timer(seconds, exit_now, (status,))
    timer.daemon = True
    timer.start()
    return timer


def run_program(main: Callable[[], int]) -> NoReturn:
    """Run `main` and exit with its status within SHUTDOWN_SECONDS after it returns.

    The `atexit` functions of libraries run, the interpreter's finalization does not: there a process can hang in the
    destructor of a communicator or a thread, where nothing in Python can interrupt it.
    """
    try:
        status = main()
    except SystemExit as ended:
        status = ended.code if isinstance(ended.code, int) else int(ended.code is not None)
    except BaseException:
        traceback.print_exc()
        status = 1
    exit_within(SHUTDOWN_SECONDS, status)
    if (file := os.environ.get(STATUS_FILE)) and os.environ.get("RANK", "0") == "0":
        Path(file).write_text(str(status), encoding="ascii")
    atexit._run_exitfuncs()
    mpi = sys.modules.get("mpi4py.MPI")
    if mpi is not None and status == 0 and not mpi.Is_finalized():
        mpi.Finalize()  # if a rank exits without it, mpirun reports a failure and ends the other ranks
    exit_now(status)
