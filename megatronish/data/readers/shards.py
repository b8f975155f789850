"""The documents of one shard, local or remote: JSON lines (plain, .gz, .zst) and Parquet, from any place in it.

A place is (document number, byte offset in the decompressed text). Going on from a place costs nothing in plain JSON lines
and no more than a row group in Parquet; compressed JSON lines are decompressed up to it again.
"""

from __future__ import annotations

import gzip
import io
import json
import logging
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import IO, Any, NamedTuple

import orjson

from megatronish.data.readers.remote import RemoteFile, Retry
from megatronish.errors import DataError

BUFFER_BYTES = 1 << 20
BYTE_ORDER_MARK = b"\xef\xbb\xbf"
ZSTD_INPUT_BYTES = 1 << 16  # little, as text compresses up to a hundredfold
PARQUET_ROWS = 512
JSON_SUFFIXES = (".jsonl", ".ndjson", ".json")
SHARD_SUFFIXES = tuple(f"{end}{zipped}" for end in JSON_SUFFIXES for zipped in ("", ".gz", ".zst")) + (".parquet",)
log = logging.getLogger(__name__)


class Place(NamedTuple):
    """Where a document begins in a shard."""

    document: int = 0
    byte: int = 0


START = Place()


@dataclass(frozen=True)
class Shard:
    """One file. `name`: its path without query; `token`: for its host; `pinned`: the URL names its content."""

    location: str
    token: str | None = None
    pinned: bool = False

    @property
    def remote(self) -> bool:
        """Whether it is behind http(s)."""
        return self.location.startswith(("http://", "https://"))

    @property
    def name(self) -> str:
        """The location without a query, which may hold a signature."""
        return self.location.split("?")[0] if self.remote else self.location

    def __repr__(self) -> str:
        return f"Shard({self.name!r})"  # without the token


@dataclass(frozen=True)
class Fields:
    """Which text a record holds: the values of `keys`, joined by a blank line, empty ones left out.

    on_error: "fail" raises DataError at the first record without such text, "skip" warns and passes over it.
    """

    keys: tuple[str, ...] = ("text",)
    on_error: str = "fail"

    def text(self, record: Any) -> str:
        """The text of a record. Raises _Rejected where there is none."""
        if not isinstance(record, dict):
            raise _Rejected(f"a JSON object is needed, found {type(record).__name__}")
        texts = []
        for key in self.keys:
            if key not in record:
                raise _Rejected(f"no key {key!r}; keys are {sorted(map(str, record))}. Choose with data.text_key")
            if not isinstance(record[key], str):
                raise _Rejected(f"the value of {key!r} is {str(record[key])[:40]!r}, not a string")
            texts.append(record[key])
        text = "\n\n".join(filter(None, texts))
        try:
            text.encode("utf-8")
        except UnicodeEncodeError:
            raise _Rejected("the text has a lone surrogate") from None
        return text

    def text_or_skip(self, parse: Callable[[], Any], place: str) -> str:
        """The text of the record that `parse` gives, "" where a faulty one is passed over."""
        try:
            return self.text(parse())
        except _Rejected as fault:
            if self.on_error == "fail":
                raise DataError(f'{place}: {fault} (data.on_error "skip" passes over such documents)') from None
            log.warning("%s: skipped: %s", place, fault)
            return ""


class _Rejected(Exception):
    """Why a record has no text."""


class ShardReader:
    """Iterates over (text, place behind it) of the documents of a shard whose number modulo `of` is `number`.

    start: where to begin. `tag` tells the shard's content from another once the first document was read.
    Empty texts are passed over. Raises DataError for damaged files and faulty documents.
    """

    def __init__(
        self, shard: Shard, fields: Fields, retry: Retry, start: Place = START, number: int = 0, of: int = 1
    ) -> None:
        self.shard = shard
        self._fields = fields
        self._retry = retry
        self._start = start
        self._number, self._of = number, of
        self._file: RemoteFile | None = None

    @property
    def tag(self) -> str:
        """Size (and ETag) of the shard."""
        if self._file is not None:
            return self._file.tag
        return str(Path(self.shard.location).stat().st_size)

    def __iter__(self) -> Iterator[tuple[str, Place]]:
        for row, place, behind in self._rows():
            if isinstance(row, dict) or row.strip():
                parse = partial(dict, row) if isinstance(row, dict) else partial(_record, row)
                if text := self._fields.text_or_skip(parse, place):
                    yield text, behind

    def rows(self) -> Iterator[bytes | dict[str, Any]]:
        """The rows themselves, whether they hold text or not: lines of JSON (blank ones too), the columns of Parquet."""
        for row, _, _ in self._rows():
            yield row.rstrip(b"\r\n") if isinstance(row, bytes) else row

    def _rows(self) -> Iterator[tuple[bytes | dict[str, Any], str, Place]]:
        """A row, what to call it, and the place behind it."""
        name = self.shard.name.lower()
        parquet = name.endswith(".parquet")
        raw: IO[bytes] | RemoteFile
        if self.shard.remote:
            raw = self._file = RemoteFile(
                self.shard.location, self._retry, token=self.shard.token, ranged=parquet, pinned=self.shard.pinned
            )
        else:
            raw = _open_local(self.shard.location)
        with raw:
            if parquet:
                yield from self._parquet(raw)
                return
            try:
                yield from self._json_lines(self._text_stream(name, raw))
            except (EOFError, gzip.BadGzipFile, zlib.error) as error:
                raise DataError(f"{self.shard.name}: truncated or corrupt gzip file: {error}") from None

    def _text_stream(self, name: str, raw: Any) -> io.BufferedReader:
        """The decompressed bytes from the starting place on."""
        stream = raw
        if name.endswith(".gz"):
            stream = gzip.GzipFile(fileobj=io.BufferedReader(raw, BUFFER_BYTES))
        elif name.endswith(".zst"):
            stream = _Zstd(raw, self.shard.name)
        if stream is raw:
            raw.seek(self._start.byte)
            return io.BufferedReader(raw, BUFFER_BYTES)
        left = self._start.byte
        while left:
            passed = len(stream.read(min(left, BUFFER_BYTES)))
            if not passed:
                raise DataError(f"{self.shard.name}: shorter than when it was read before; begin afresh")
            left -= passed
        return io.BufferedReader(stream, BUFFER_BYTES)

    def _json_lines(self, stream: io.BufferedReader) -> Iterator[tuple[bytes, str, Place]]:
        document, byte = self._start
        for line in stream:
            first = document == 0
            mine = document % self._of == self._number
            document, byte = document + 1, byte + len(line)
            if not mine and not first:
                continue
            line = line.removeprefix(BYTE_ORDER_MARK) if first else line
            if first and line.lstrip().startswith(b"["):
                raise DataError(f"{self.shard.name}: a JSON array; one JSON object on each line is needed")
            if mine:
                yield line, f"{self.shard.name}, line {document}", Place(document, byte)

    def _parquet(self, raw: Any) -> Iterator[tuple[dict[str, Any], str, Place]]:
        try:
            import pyarrow
            from pyarrow import parquet
        except ImportError:
            raise DataError(f"{self.shard.name}: Parquet needs pyarrow: pip install pyarrow") from None
        try:
            file = parquet.ParquetFile(raw)
        except pyarrow.ArrowInvalid as error:
            raise DataError(f"{self.shard.name}: not a Parquet file: {error}") from None
        missing = [key for key in self._fields.keys if key not in file.schema_arrow.names]
        if missing:
            raise DataError(
                f"{self.shard.name}: no column {missing[0]!r}; columns are {file.schema_arrow.names}. Choose with data.text_key"
            )
        first = 0
        for group in range(file.num_row_groups):
            rows = file.metadata.row_group(group).num_rows
            if first + rows > self._start.document:
                yield from self._row_group(file, group, first)
            first += rows

    def _row_group(self, file: Any, group: int, first: int) -> Iterator[tuple[dict[str, Any], str, Place]]:
        document = first
        for batch in file.iter_batches(batch_size=PARQUET_ROWS, row_groups=[group], columns=list(self._fields.keys)):
            for record in batch.to_pylist():
                document += 1
                if document > self._start.document and (document - 1) % self._of == self._number:
                    yield record, f"{self.shard.name}, row {document}", Place(document, 0)


def _record(line: bytes) -> Any:
    try:
        return orjson.loads(line)
    except ValueError:  # Python's own parser accepts more (NaN, lone surrogates) and names faults by column
        pass
    try:
        return json.loads(line.decode("utf-8"))
    except (ValueError, RecursionError) as error:  # UnicodeDecodeError is a ValueError
        raise _Rejected(f"not JSON: {error}") from None


def _open_local(path: str) -> IO[bytes]:
    try:
        return open(path, "rb", buffering=0)
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from None


class _Zstd(io.RawIOBase):
    """Decompresses frames that follow each other; unlike zstandard's own reader it notices a truncated one."""

    def __init__(self, raw: Any, name: str) -> None:
        try:
            import zstandard
        except ImportError:
            raise DataError(f"{name}: .zst needs zstandard: pip install zstandard") from None
        self._raw, self._name = raw, name
        self._library = zstandard
        self._frame: Any = None
        self._compressed = b""
        self._ready = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._ready:
            if not self._advance():
                return 0
        count = min(len(buffer), len(self._ready))
        buffer[:count], self._ready = self._ready[:count], self._ready[count:]
        return count

    def _advance(self) -> bool:
        """Decompresses some more; False at the end of the file. Raises DataError for what is damaged or cut off."""
        compressed = self._compressed or self._raw.read(ZSTD_INPUT_BYTES)
        if not compressed:
            if self._frame is not None:
                raise DataError(f"{self._name}: truncated zstd file")
            return False
        self._frame = self._frame or self._library.ZstdDecompressor().decompressobj()
        try:
            self._ready = memoryview(self._frame.decompress(compressed))
        except self._library.ZstdError as error:
            raise DataError(f"{self._name}: corrupt zstd file: {error}") from None
        self._compressed = self._frame.unused_data if self._frame.eof else b""
        if self._frame.eof:
            self._frame = None
        return True
