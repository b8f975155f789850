"""What there is to read: files by suffix, Hugging Face data sets by name, streams of rows; and how to open each."""

from __future__ import annotations

import glob
import gzip
import io
import os
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import orjson

from megatronish.errors import DataError

JSON_LINES_SUFFIXES = (".jsonl", ".ndjson", ".json")
COMPRESSED_SUFFIXES = {".gz": "gzip", ".zst": "zstd"}
UNREADABLE_SUFFIXES = (".bz2", ".xz", ".zip", ".tar", ".tgz", ".bin", ".idx", ".npy", ".arrow")
READ_BYTES = 1 << 20
# Frames written with `zstd --long=31` need this much.
ZSTD_WINDOW_BYTES = 1 << 31

# Inputs that are no paths on this machine.
SCHEMES = ("hf://", "http://", "https://")

Row = Mapping[str, Any] | bytes  # values by name, or a line of JSON that nobody has read yet
Rows = Callable[[], Iterator[Row]]


@dataclass(frozen=True)
class Source:
    """One input. `format` is jsonl, text, parquet or rows; `compression` is "", gzip or zstd.

    `size` (bytes as stored, 0 where not known) and `mtime_ns` tell a resumed run whether the input is still the same.
    `rows` makes the rows of a `rows` source, from the first.
    """

    name: str
    format: str
    compression: str = ""
    size: int = 0
    mtime_ns: int = 0
    rows: Rows | None = None

    @property
    def seekable(self) -> bool:
        """Whether a worker can read a part of it without what comes before."""
        return self.format == "parquet" or (self.format != "rows" and not self.compression)

    @property
    def signature(self) -> list[Any]:
        """What must be equal for two runs to have read the same."""
        return [self.name, self.size, self.mtime_ns]

    def place(self, number: int) -> str:
        """Where record `number` is (line or row from 1; for text the byte where it begins, -1 for a whole file)."""
        if self.format == "text":
            return self.name if number < 0 else f"{self.name}, byte {number}"
        return f"{self.name}, {'line' if self.format == 'jsonl' else 'row'} {number}"


def is_remote(spec: str) -> bool:
    """Whether an input is no path on this machine."""
    return spec.startswith(SCHEMES)


def find_inputs(patterns: Sequence[str]) -> list[Path]:
    """Files of the given paths and globs (`**` is recursive), globs sorted, each file once. Raises DataError."""
    found: dict[Path, Path] = {}
    for pattern in patterns:
        path = Path(pattern)
        if path.exists():
            matches = [path]
        else:
            matches = [Path(name) for name in sorted(glob.glob(pattern, recursive=True)) if not os.path.isdir(name)]
            if not matches:
                kind = "no file matches" if glob.has_magic(pattern) else "no such file:"
                raise DataError(f"--input: {kind} {pattern}")
        for match in matches:
            if match.is_dir():
                raise DataError(f"--input {match} is a folder; give a pattern such as '{match}/**/*.txt' (quoted)")
            suffix = match.suffix.lower()
            if suffix in UNREADABLE_SUFFIXES:
                raise DataError(
                    f"--input {match}: {suffix} files are not read; convert to parquet, text or JSON lines (plain, .gz or .zst)"
                )
            if not os.access(match, os.R_OK):
                raise DataError(f"--input {match}: no permission to read it")
            found.setdefault(match.resolve(), match)
    return list(found.values())


def file_source(path: Path) -> Source:
    """The source that a file's name and metadata describe. Raises DataError for what cannot be combined."""
    compression = COMPRESSED_SUFFIXES.get(path.suffix.lower(), "")
    inner = path.with_suffix("") if compression else path
    suffix = inner.suffix.lower()
    kind = "jsonl" if suffix in JSON_LINES_SUFFIXES else "parquet" if suffix == ".parquet" else "text"
    if kind == "parquet" and compression:
        raise DataError(f"--input {path}: parquet is compressed inside; unpack the {path.suffix} first")
    state = path.stat()
    return Source(str(path), kind, compression, state.st_size, state.st_mtime_ns)


def check_keys(sources: Sequence[Source], keys: Sequence[str]) -> None:
    """Refuses several keys for text, which has one. Raises DataError."""
    for source in sources:
        if len(keys) > 1 and source.format == "text":
            raise DataError(f"--json-keys {' '.join(keys)}: {source.name} is not JSON lines, so has a single text")


def open_stream(source: Source, stored: BinaryIO) -> BinaryIO:
    """The unpacked bytes of an open file, buffered; errors are raised as DataError by `reading`."""
    if source.compression == "gzip":
        return gzip.GzipFile(fileobj=stored)  # type: ignore[return-value]
    if source.compression == "zstd":
        return io.BufferedReader(_ZstdStream(stored), READ_BYTES)
    return stored


class reading:  # a context manager, used as a verb
    """Turns the errors of a damaged compressed file into a DataError that names it."""

    def __init__(self, source: Source) -> None:
        self._source = source

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, EOFError | gzip.BadGzipFile | zlib.error | _ZstdDamage):
            name = self._source.compression or "file"
            raise DataError(f"{self._source.name}: truncated or corrupt {name} file: {error}") from None


class _ZstdDamage(ValueError):
    """A zstd file that ends within a frame or does not decode."""


class _ZstdStream(io.RawIOBase):
    """Unpacked bytes of consecutive zstd frames. Unlike the library's own reader it does not take a cut frame for the end."""

    def __init__(self, stored: BinaryIO) -> None:
        try:
            import zstandard
        except ImportError:
            raise DataError("reading .zst needs the package zstandard: pip install zstandard") from None
        self._library: Any = zstandard
        self._stored = stored
        self._frame: Any = None
        self._ready = b""
        self._pending = b""

    def readable(self) -> bool:
        return True

    def readinto(self, target: Any) -> int:
        while not self._ready:
            if not self._decode():
                return 0
        count = min(len(target), len(self._ready))
        target[:count] = self._ready[:count]
        self._ready = self._ready[count:]
        return count

    def _decode(self) -> bool:
        raw = self._pending or self._stored.read(1 << 17)
        self._pending = b""
        if not raw:
            if self._frame is not None:
                raise _ZstdDamage("the last frame is cut short")
            return False
        if self._frame is None:
            self._frame = self._library.ZstdDecompressor(max_window_size=ZSTD_WINDOW_BYTES).decompressobj()
        try:
            self._ready = self._frame.decompress(raw)
        except self._library.ZstdError as error:
            raise _ZstdDamage(str(error)) from None
        if self._frame.eof:
            self._pending = self._frame.unused_data
            self._frame = None
        return True


def mapping_of(row: Row) -> Mapping[str, Any]:
    """The values of a row, none of a faulty one."""
    if not isinstance(row, bytes):
        return row
    try:
        record = orjson.loads(row)
    except ValueError:
        return {}
    return record if isinstance(record, dict) else {}
