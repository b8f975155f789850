"""Progress on standard error while the results go to standard output."""

from __future__ import annotations

import sys


class ProgressLine:
    """One line that is overwritten on a terminal; elsewhere each state is a line of its own."""

    def __init__(self) -> None:
        self._live = sys.stderr.isatty()

    def show(self, state: str) -> None:
        """Display `state` until the next call."""
        print(
            f"\r\033[K{state} ..." if self._live else f"{state} ...",
            end="" if self._live else "\n",
            file=sys.stderr,
            flush=True,
        )

    def print(self, line: str) -> None:
        """Print `line` to standard output in place of the progress."""
        print("\r\033[K" * self._live + line, flush=True)
