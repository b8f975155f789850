"""gzip and zstd: decompressed streams, and one error that names a damaged file."""

from __future__ import annotations

import contextlib
import gzip
import io
import zlib
from collections.abc import Iterator
from typing import Any, BinaryIO

from megatronish.errors import DataError

COMPRESSED_SUFFIXES = {".gz": "gzip", ".zst": "zstd"}
# Frames written with `zstd --long=31` need this much.
ZSTD_WINDOW_BYTES = 1 << 31
ZSTD_INPUT_BYTES = 1 << 16  # little, as text compresses up to a hundredfold
BUFFER_BYTES = 1 << 20


def decompressed(stored: BinaryIO, compression: str) -> BinaryIO:
    """The buffered decompressed bytes of an open file; `compression` is "", gzip or zstd. Damage raises in `naming_damage`."""
    if compression == "gzip":
        return gzip.GzipFile(fileobj=stored)  # type: ignore[return-value]
    if compression == "zstd":
        return io.BufferedReader(_ZstdStream(stored), BUFFER_BYTES)
    return stored


@contextlib.contextmanager
def naming_damage(name: str, compression: str) -> Iterator[None]:
    """Turns the errors of a damaged compressed file into a DataError with its name."""
    try:
        yield
    except (EOFError, gzip.BadGzipFile, zlib.error, _ZstdDamage) as error:
        raise DataError(f"{name}: truncated or corrupt {compression or 'file'} file: {error}") from None


class _ZstdDamage(ValueError):
    """A zstd file that ends within a frame or does not decode."""


class _ZstdStream(io.RawIOBase):
    """Decompressed bytes of consecutive zstd frames. Unlike the library's own reader it reports a truncated frame."""

    def __init__(self, stored: BinaryIO) -> None:
        import zstandard

        self._library: Any = zstandard
        self._stored = stored
        self._frame: Any = None
        self._ready = memoryview(b"")
        self._pending = b""

    def readable(self) -> bool:
        return True

    def readinto(self, target: Any) -> int:
        while not self._ready:
            if not self._decode():
                return 0
        count = min(len(target), len(self._ready))
        target[:count], self._ready = self._ready[:count], self._ready[count:]
        return count

    def _decode(self) -> bool:
        """Decompresses some more bytes; False at the end of the file."""
        raw = self._pending or self._stored.read(ZSTD_INPUT_BYTES)
        if not raw:
            if self._frame is not None:
                raise _ZstdDamage("the last frame is truncated")
            return False
        if self._frame is None:
            self._frame = self._library.ZstdDecompressor(max_window_size=ZSTD_WINDOW_BYTES).decompressobj()
        try:
            self._ready = memoryview(self._frame.decompress(raw))
        except self._library.ZstdError as error:
            raise _ZstdDamage(str(error)) from None
        self._pending = self._frame.unused_data if self._frame.eof else b""
        if self._frame.eof:
            self._frame = None
        return True
