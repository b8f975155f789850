"""Files read over http(s): after a fault, reading is retried from the byte where it stopped.

Retried with exponential back-off and jitter: refused, reset and timed-out connections, 408, 425, 429 (its Retry-After is
kept) and 5xx, and bodies that end before their announced length. Anything else raises DataError.
"""

from __future__ import annotations

import http.client
import io
import logging
import random
import re
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

from megatronish.errors import DataError

T = TypeVar("T")
RETRIED_STATUS = frozenset({408, 425, 429, 500, 502, 503, 504, 520, 521, 522, 523, 524})
SKIP_BYTES = 1 << 20
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Retry:
    """How often to retry. Waits double from `first_wait` to `longest_wait` seconds, each shortened at random by up to half.

    attempts: in a row without one byte of progress. timeout: seconds without an answer.
    """

    attempts: int = 8
    first_wait: float = 0.5
    longest_wait: float = 60.0
    timeout: float = 60.0

    def wait(self, attempt: int, asked: float = 0.0) -> float:
        """Seconds to wait before attempt number `attempt` (from 1); a server may ask for longer, up to the longest."""
        backed_off = min(self.longest_wait, self.first_wait * 2.0 ** (attempt - 1))
        return max(backed_off * random.uniform(0.5, 1.0), min(asked, self.longest_wait))


class _Fault(Exception):
    """A fault that a retry may overcome."""

    def __init__(self, reason: str, wait: float = 0.0) -> None:
        super().__init__(reason)
        self.wait = wait


def retried(place: str, call: Callable[[], T], retry: Retry) -> T:
    """The result of `call`, tried again while it raises network faults. Raises DataError when they do not end."""
    for attempt in range(1, retry.attempts + 1):
        try:
            return call()
        except (_Fault, OSError, http.client.HTTPException) as error:
            fault = error
        if attempt < retry.attempts:
            seconds = retry.wait(attempt, getattr(fault, "wait", 0.0))
            log.warning("%s: %s; trying again in %.1f s", place, _words(fault), seconds)
            time.sleep(seconds)
    raise DataError(
        f"{place}: {_words(fault)}, {retry.attempts} times in a row; check the network and restart to resume"
    )


def _words(error: BaseException) -> str:
    return f"{error or type(error).__name__}"


class RemoteFile(io.RawIOBase):
    """A file at a URL, readable from any place; `tag` and `size` are known once something was read.

    ranged: each `read(n)` requests these n bytes alone (for Parquet, which is not read in order); otherwise one response is
    read to its end. Raises DataError for what retrying cannot fix, a changed file among it.
    """

    def __init__(self, url: str, retry: Retry, *, ranged: bool = False) -> None:
        self.url = url
        self.size: int | None = None
        self.etag: str | None = None
        self._retry = retry
        self._ranged = ranged
        self._position = 0
        self._response: Any = None

    @property
    def tag(self) -> str:
        """Size and ETag: differs when another file is stored at the same URL."""
        return f"{self.size}" if self.etag is None else f"{self.size} {self.etag}"

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        if whence == io.SEEK_END and self.size is None:
            retried(self.url, lambda: self._connect(0, 1), self._retry).close()
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self.size or 0}[whence]
        if base + offset != self._position:
            self._drop()
            self._position = base + offset
        return self._position

    def close(self) -> None:
        self._drop()
        super().close()

    def readinto(self, buffer: Any) -> int:
        data = self.read(len(buffer)) if self._ranged else self._read_on(len(buffer))
        buffer[: len(data)] = data
        return len(data)

    def read(self, size: int = -1) -> bytes:
        """Up to `size` bytes; with `ranged` all of them, fewer only at the end of the file."""
        if not self._ranged or size < 0:
            return super().read(size) or b""
        if self.size is None:
            self.seek(0, io.SEEK_END)
        end = min(self._position + size, self.size or 0)
        parts = []
        while self._position < end:
            parts.append(self._read_on(end - self._position, end))
        self._drop()
        return b"".join(parts)

    def _read_on(self, size: int, end: int | None = None) -> bytes:
        """The next bytes, at least one but at the end of the file. Every retry begins after the last byte received."""

        def receive() -> bytes:
            if self._response is None:
                if self.size is not None and self._position >= self.size:
                    return b""
                self._response = self._connect(self._position, end)
            data = self._response.read1(size)
            if not data and self.size is not None and self._position < self.size:
                raise _Fault(f"the body ended at byte {self._position:,} of {self.size:,}")
            return data

        def receive_or_drop() -> bytes:
            try:
                return receive()
            except (_Fault, OSError, http.client.HTTPException):
                self._drop()
                raise

        data = retried(self.url, receive_or_drop, self._retry) if size else b""
        self._position += len(data)
        return data

    def _drop(self) -> None:
        if self._response is not None:
            self._response.close()
            self._response = None

    def _connect(self, offset: int, end: int | None = None) -> Any:
        """A response whose body begins at `offset`. Raises _Fault or OSError to be retried, DataError otherwise."""
        request = urllib.request.Request(self.url, headers={"User-Agent": "megatronish", "Accept-Encoding": "identity"})
        if offset or end is not None:
            request.add_header("Range", f"bytes={offset}-{'' if end is None else end - 1}")
        try:
            response = urllib.request.urlopen(request, timeout=self._retry.timeout)
        except urllib.error.HTTPError as error:
            with error:
                raise self._explained(error) from None
        except urllib.error.URLError as error:
            raise _Fault(str(error.reason)) from None
        try:
            self._check_same(response)
            if response.status == 206:
                begins = re.match(r"bytes (\d+)-", response.headers.get("Content-Range", ""))
                if begins is None or int(begins[1]) != offset:
                    raise _Fault(f"asked for bytes from {offset}, got {response.headers.get('Content-Range')!r}")
            elif offset:
                self._skip(response, offset)
        except BaseException:
            response.close()
            raise
        return response

    def _explained(self, error: urllib.error.HTTPError) -> Exception:
        if error.code in RETRIED_STATUS:
            asked = error.headers.get("Retry-After", "")
            return _Fault(f"HTTP {error.code} {error.reason}", float(asked) if asked.isdigit() else 0.0)
        if error.code in (401, 403):
            return DataError(f"{self.url}: HTTP {error.code} {error.reason}: access is not granted; download the file")
        return DataError(f"{self.url}: HTTP {error.code} {error.reason}; check the location")

    def _check_same(self, response: Any) -> None:
        """Notes size and ETag of the first answer and refuses another content later on."""
        total = re.search(r"/(\d+)$", response.headers.get("Content-Range", ""))
        length = response.headers.get("Content-Length")
        size = int(total[1]) if total else (int(length) if length and response.status == 200 else None)
        etag = response.headers.get("ETag")
        if self.size is not None and size is not None and size != self.size:
            raise DataError(
                f"{self.url}: {size:,} bytes now, {self.size:,} before: it changed while it was read; start again"
            )
        if None not in (self.etag, etag) and etag != self.etag:
            raise DataError(
                f"{self.url}: its ETag was {self.etag}, is {etag}: it changed while it was read; start again"
            )
        self.size = size if size is not None else self.size
        self.etag = etag or self.etag

    def _skip(self, response: Any, count: int) -> None:
        """Skips bytes of a server that ignores ranges."""
        if self._ranged:
            raise DataError(
                f"{self.url}: the server does not honour byte ranges, without which Parquet cannot be streamed; download the file"
            )
        while count:
            passed = len(response.read(min(count, SKIP_BYTES)))
            if not passed:
                raise _Fault(f"the body ended {count:,} bytes before the position to resume from")
            count -= passed
