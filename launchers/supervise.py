"""Restart a run when it crashes: `python launchers/supervise.py -- deepspeed launchers/pretrain.py --deepspeed_config FILE`.

Each attempt is the same command, which resumes from the newest checkpoint (--train.resume auto). The wait between attempts
doubles each time; an attempt that wrote a newer checkpoint resets the wait and the count. There is no restart after success (0),
an error that the user has to fix (2) or a requested stop (76 after saving, 130 after Ctrl-C). SIGTERM, SIGUSR1 and SIGINT are
forwarded to the ranks. The exit status is that of the last attempt.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from megatronish.errors import exit_on_user_error
from megatronish.training.supervision import Supervisor, run_folder


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        usage="%(prog)s [options] -- COMMAND ...",
    )
    parser.add_argument("--retries", type=int, default=5, help="attempts in a row without a newer checkpoint [5]")
    parser.add_argument(
        "--wait", type=float, default=10.0, help="seconds before the second attempt, doubled each time [10]"
    )
    parser.add_argument("--longest-wait", type=float, default=600.0, help="seconds at most between attempts [600]")
    parser.add_argument("--run-dir", type=Path, help="train.save_dir of the run; read from the command where not given")
    parser.add_argument("command", nargs=argparse.REMAINDER, help="the command to start, after --")
    given = parser.parse_args()
    command = given.command[1:] if given.command[:1] == ["--"] else given.command
    if not command or given.retries < 0 or given.wait < 0:
        parser.error("give the command after --, and --retries and --wait of at least 0")
    with exit_on_user_error():
        run_dir = given.run_dir or run_folder(command)
    return Supervisor(command, run_dir, given.retries, given.wait, given.longest_wait).run()


if __name__ == "__main__":
    sys.exit(main())
