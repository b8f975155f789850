"""Files behind http(s), read through faults: what breaks is retried from the byte it broke at.

Retried with exponential back-off and jitter: refused, reset and timed-out connections, 408, 425, 429 (its Retry-After is
kept) and 5xx, and bodies that end before their announced length. Anything else is the user's to mend and raises DataError.
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
    """How long to insist. Waits double from `first_wait` to `longest_wait` seconds, each shortened at random by up to half.

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
    """A fault that trying again may mend."""

    def __init__(self, reason: str, wait: float = 0.0) -> None:
        super().__init__(reason)
        self.wait = wait


def insist(place: str, call: Callable[[], T], retry: Retry) -> T:
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
        f"{place}: {_words(fault)}, {retry.attempts} times in a row; check the network and start again to go on"
    )


def _words(error: BaseException) -> str:
    return f"{error or type(error).__name__}"


class RemoteFile(io.RawIOBase):
    """A file at a URL, readable from any place; `tag` and `size` are known once something was read.

    ranged: each `read(n)` asks for these n bytes alone (for Parquet, which jumps about); otherwise one response is read on
    and on. token: sent as a bearer to the URL's own host, never to where it redirects. pinned: the URL names its content (a
    commit), so that a changed ETag, which mirrors may differ in, says nothing.
    Raises DataError for what retrying cannot mend, a changed file among it.
    """

    def __init__(
        self, url: str, retry: Retry, *, token: str | None = None, ranged: bool = False, pinned: bool = False
    ) -> None:
        self.url = url
        self.size: int | None = None
        self.etag: str | None = None
        self._retry = retry
        self._token = token
        self._ranged = ranged
        self._pinned = pinned
        self._position = 0
        self._response: Any = None

    @property
    def tag(self) -> str:
        """Tells this content from another that may come to lie at the same URL."""
        return f"{self.size}" if self._pinned or self.etag is None else f"{self.size} {self.etag}"

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        if whence == io.SEEK_END and self.size is None:
            insist(self.url, lambda: self._connect(0, 1), self._retry).close()
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
        """The next bytes, at least one but at the end of the file. Every retry begins behind the last byte received."""

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

        data = insist(self.url, receive_or_drop, self._retry) if size else b""
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
        if self._token:
            request.add_unredirected_header("Authorization", f"Bearer {self._token}")
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
            return DataError(
                f"{self.url}: HTTP {error.code} {error.reason}: access is not granted. A gated dataset needs its terms accepted "
                "on its page and a token: hf auth login, or HF_TOKEN"
            )
        return DataError(f"{self.url}: HTTP {error.code} {error.reason}; check the location")

    def _check_same(self, response: Any) -> None:
        """Notes size and ETag of the first answer and refuses another content later on."""
        total = re.search(r"/(\d+)$", response.headers.get("Content-Range", ""))
        length = response.headers.get("Content-Length")
        size = int(total[1]) if total else (int(length) if length and response.status == 200 else None)
        etag = response.headers.get("ETag")
        if self.size is not None and size is not None and size != self.size:
            raise DataError(
                f"{self.url}: {size:,} bytes now, {self.size:,} before: it changed while it was read; begin afresh"
            )
        if not self._pinned and None not in (self.etag, etag) and etag != self.etag:
            raise DataError(
                f"{self.url}: its ETag was {self.etag}, is {etag}: it changed while it was read; begin afresh"
            )
        self.size = size if size is not None else self.size
        self.etag = etag or self.etag

    def _skip(self, response: Any, count: int) -> None:
        """Passes over bytes of a server that ignores ranges."""
        if self._ranged:
            raise DataError(
                f"{self.url}: the server does not honour byte ranges, without which Parquet cannot be streamed; download the file"
            )
        while count:
            passed = len(response.read(min(count, SKIP_BYTES)))
            if not passed:
                raise _Fault(f"the body ended {count:,} bytes before the place to go on from")
            count -= passed
