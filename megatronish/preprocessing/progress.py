"""One live line for a long run over data: rate in MB/s, tokens/s, documents, time left."""

from __future__ import annotations

import sys
import time
from typing import TextIO


class Progress:
    """Prints progress to a terminal (rewriting one line) or a log (a line now and then).

    log_interval: also a full line each time this many documents have passed (0: only by time).
    """

    def __init__(self, label: str, log_interval: int = 0, stream: TextIO | None = None) -> None:
        self.label = label
        self.log_interval = log_interval
        self.stream = stream or sys.stderr
        self.live = self.stream.isatty()
        self.started = time.monotonic()
        self._last_print = self.started
        self._next_documents = log_interval
        self._width = 0

    @property
    def seconds(self) -> float:
        """Seconds since the start."""
        return time.monotonic() - self.started

    def update(
        self, documents: int, text_bytes: int, tokens: int | None, fraction: float | None, errors: int = 0
    ) -> None:
        """Prints the state, at most every 0.2 s on a terminal and every 10 s in a log."""
        now = time.monotonic()
        due = self.log_interval > 0 and documents >= self._next_documents
        if due:
            self._next_documents = documents - documents % self.log_interval + self.log_interval
        if not due and now - self._last_print < (0.2 if self.live else 10.0):
            return
        self._last_print = now
        self._write(self._line(now, documents, text_bytes, tokens, fraction, errors), end="\n" if due else "")

    def finish(self, documents: int, text_bytes: int, tokens: int | None, errors: int = 0) -> None:
        """Prints the final line."""
        line = self._line(time.monotonic(), documents, text_bytes, tokens, None, errors)
        self._write(line, end="\n")

    def _line(
        self, now: float, documents: int, text_bytes: int, tokens: int | None, fraction: float | None, errors: int
    ) -> str:
        seconds = max(now - self.started, 1e-6)
        parts = [f"{self.label}: {documents:,} documents", f"{text_bytes / 1e6:,.1f} MB"]
        parts.append(f"{text_bytes / 1e6 / seconds:.2f} MB/s")
        if tokens is not None:
            parts.append(f"{tokens / seconds:,.0f} tokens/s")
        if errors:
            parts.append(f"{errors:,} errors")
        if fraction is None:
            parts.append(f"{seconds:.1f} s")
        elif fraction > 0:
            parts.append(f"{100 * fraction:.0f}%, {seconds * (1 / fraction - 1):.0f} s left")
        return ", ".join(parts)

    def _write(self, line: str, end: str) -> None:
        if self.live:
            padding = " " * max(0, self._width - len(line))
            self._width = 0 if end else len(line)
            self.stream.write(f"\r{line}{padding}{end}")
        else:
            self.stream.write(line + "\n")
        self.stream.flush()
