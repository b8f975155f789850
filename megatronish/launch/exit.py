"""How a process ends: within bounded time, whatever its threads, its peers or its libraries still wait for."""

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
INTERRUPTED_SECONDS = 3.0  # the same, after Ctrl-C
FLUSH_SECONDS = 1.0
EXIT_STOPPED = 75  # exit status of a run that the watchdog ended: EX_TEMPFAIL of sysexits.h, "try again"
EXIT_SAVED = 76  # exit status of a run that was asked to stop, by a signal or its time limit, and saved before it did

STATUS_FILE = (
    "MEGATRONISH_STATUS_FILE"  # in the environment: where the first rank writes its status for launchers/supervise.py
)


def exit_now(status: int) -> NoReturn:
    """End this process with `status` at once: no clean-up, only the output that a second is enough to write."""

    def flush() -> None:
        sys.stdout.flush()
        sys.stderr.flush()

    writer = threading.Thread(target=flush, daemon=True)  # a thread that hangs in print holds the lock of stdout
    writer.start()
    writer.join(FLUSH_SECONDS)
    os._exit(status)


def exit_within(seconds: float, status: int) -> threading.Timer:
    """Have this process end in `seconds` with exit status `status`, however its threads hang, unless cancelled."""
    timer = threading.Timer(seconds, exit_now, (status,))
    timer.daemon = True
    timer.start()
    return timer


def run_program(main: Callable[[], int]) -> NoReturn:
    """Run `main` and end the process with its status within SHUTDOWN_SECONDS of its return.

    The exit functions of libraries run, the interpreter's own end does not: there a process can hang, in the destructor of
    a communicator or a thread, where nothing in Python can interrupt it any more.
    """
    try:
        status = main()
    except SystemExit as ended:
        status = ended.code if isinstance(ended.code, int) else int(ended.code is not None)
    except BaseException:
        traceback.print_exc()
        status = 1
    exit_within(SHUTDOWN_SECONDS, status)
    if (told := os.environ.get(STATUS_FILE)) and os.environ.get("RANK", "0") == "0":
        Path(told).write_text(str(status), encoding="ascii")
    atexit._run_exitfuncs()
    mpi = sys.modules.get("mpi4py.MPI")
    if mpi is not None and status == 0 and not mpi.Is_finalized():
        mpi.Finalize()  # mpirun calls a rank that ends without it a failure, and ends the others: right unless all is well
    exit_now(status)
