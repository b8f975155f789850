"""Work units: parts of the input fixed by the input and the shard size alone, whoever works on them.

A plain file is cut at the first line end (or document separator) at or after each multiple of the shard size, a parquet
file between row groups; small files share a unit. Compressed files and streams of rows are unpacked once, in order, into
files next to the output ("spooled"), cut at the same places.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import orjson

from megatronish.data.readers.compression import decompressed, naming_damage
from megatronish.data.readers.inputs import TextSource
from megatronish.data.readers.parquet import read_rows, row_groups
from megatronish.data.readers.records import READ_BYTES

WINDOW_BYTES = 1 << 16


@dataclass(frozen=True, slots=True)
class InputPiece:
    """Bytes (row groups of parquet) start..end-1 of the file `path`, which holds input `source` from byte `offset` on.

    weight: unpacked bytes; stored: bytes of the input as stored, for progress; spooled: delete the file after use.
    """

    source: int
    path: str
    start: int
    end: int
    offset: int
    weight: int
    stored: int
    spooled: bool = False


@dataclass(frozen=True, slots=True)
class WorkUnit:
    """One work unit. `pieces_before` counts the pieces of all earlier units."""

    index: int
    pieces: tuple[InputPiece, ...]
    pieces_before: int

    @property
    def stored(self) -> int:
        """Bytes of the input as stored."""
        return sum(piece.stored for piece in self.pieces)


class Planner:
    """Cuts sources into units of about `shard_size` unpacked bytes.

    keys and separator as for reading; spool: folder for unpacked parts.
    """

    def __init__(
        self, sources: Sequence[TextSource], keys: Sequence[str], separator: bytes | None, shard_size: int, spool: Path
    ) -> None:
        self.sources = list(sources)
        self.keys = tuple(keys)
        self.separator = separator
        self.shard_size = shard_size
        self.spool = spool
        self._ordinal = 0
        self._skip = 0

    def units(self, skip_units: int = 0, skip_pieces: int = 0) -> Iterator[WorkUnit]:
        """Units in order from number `skip_units` on; the pieces before `skip_pieces` are not unpacked."""
        self._ordinal, self._skip = 0, skip_pieces
        gathered: list[InputPiece] = []
        index = before = 0
        for piece in self._pieces():
            if gathered and sum(p.weight for p in gathered) + piece.weight > self.shard_size:
                if index >= skip_units:
                    yield WorkUnit(index, tuple(gathered), before)
                index, before, gathered = index + 1, before + len(gathered), []
            gathered.append(piece)
        if gathered and index >= skip_units:
            yield WorkUnit(index, tuple(gathered), before)

    def _pieces(self) -> Iterator[InputPiece]:
        for number, source in enumerate(self.sources):
            if source.format == "rows" or (source.format == "parquet" and source.remote):
                found = self._spooled(number, source, _row_lines(source, self.keys))
            elif source.format == "parquet":
                found = self._row_groups(number, source)
            elif source.compression or source.remote:
                found = self._spooled(number, source, _blocks(source))
            else:
                found = self._ranges(number, source)
            for piece in found:
                self._ordinal += 1
                yield piece

    def _cut_at(self, source: TextSource) -> bytes | None:
        return self.separator if source.format == "text" else b"\n"

    def _ranges(self, number: int, source: TextSource) -> Iterator[InputPiece]:
        separator = self._cut_at(source)
        with open(source.name, "rb") as file:
            start = 0
            while start < source.size:
                end = source.size
                if separator is not None:
                    nominal = (start // self.shard_size + 1) * self.shard_size
                    end = next_cut(file, nominal, source.size, separator)
                yield InputPiece(number, source.name, start, end, start, end - start, end - start)
                start = end

    def _row_groups(self, number: int, source: TextSource) -> Iterator[InputPiece]:
        groups = row_groups(source.name, self.keys)
        total = max(1, sum(groups.sizes))
        row = start = 0
        while start < len(groups.sizes):
            end, weight, rows = start, 0, 0
            while end < len(groups.sizes) and (end == start or weight + groups.sizes[end] <= self.shard_size):
                weight, rows, end = weight + groups.sizes[end], rows + groups.rows[end], end + 1
            yield InputPiece(number, source.name, start, end, row, weight, source.size * weight // total)
            row, start = row + rows, end

    def _spooled(self, number: int, source: TextSource, blocks: Iterator[tuple[bytes, int]]) -> Iterator[InputPiece]:
        separator = self._cut_at(source)
        cutter = StreamCutter(separator, self.shard_size)
        file: BinaryIO | None = None
        path, offset, size, counted, stored = self.spool, 0, 0, 0, 0
        for block, stored in blocks:
            for part, cut in cutter.feed(block):
                if size == 0 and self._ordinal >= self._skip:
                    path = self.spool / f"spool-{self._ordinal:07d}"
                    file = open(path, "wb")  # noqa: SIM115  # closed when the part is complete
                if file is not None:
                    file.write(part)
                size += len(part)
                if cut:
                    yield self._spooled_piece(number, path, file, size, offset, stored - counted)
                    offset, size, counted, file = offset + size, 0, stored, None
        if size:
            yield self._spooled_piece(number, path, file, size, offset, stored - counted)

    def _spooled_piece(
        self, source: int, path: Path, file: BinaryIO | None, size: int, offset: int, stored: int
    ) -> InputPiece:
        if file is not None:
            file.close()
        return InputPiece(source, str(path), 0, size, offset, size, stored, spooled=True)


def find_clean(data: bytes, separator: bytes, start: int) -> int:
    """The first occurrence at or after `start` that no earlier one overlaps, so that cutting from the left meets it; or -1."""
    position = data.find(separator, start)
    while position >= 0:
        before = max(0, position - len(separator) + 1)
        if data.find(separator, before, position + len(separator) - 1) < 0:
            return position
        position = data.find(separator, position + 1)
    return -1


def next_cut(file: BinaryIO, nominal: int, size: int, separator: bytes) -> int:
    """End of the first clean separator that ends at byte `nominal` or later, or `size`."""
    width = len(separator)
    base = max(0, nominal - 2 * width + 1)
    file.seek(base)
    data = b""
    start = max(0, nominal - width - base)
    while block := file.read(WINDOW_BYTES):
        data += block
        found = find_clean(data, separator, start)
        if found >= 0:
            return min(size, base + found + width)
        kept = min(len(data), 2 * width - 2)
        base += len(data) - kept
        data = data[len(data) - kept :]
        start = max(0, kept - width + 1)
    return size


class StreamCutter:
    """Cuts a stream of blocks at the same places as `next_cut` cuts a file. A separator of None never cuts."""

    def __init__(self, separator: bytes | None, shard_size: int) -> None:
        self._separator = separator
        self._shard_size = shard_size
        self._nominal = shard_size
        self._position = 0
        self._carry = b""

    def feed(self, block: bytes) -> Iterator[tuple[bytes, bool]]:
        """(part, whether a unit may end after it) for the next block; parts are not empty."""
        if self._separator is None:
            yield block, False
            return
        width, data = len(self._separator), self._carry + block
        base = self._position - len(self._carry)
        begin = len(self._carry)
        while True:
            start = max(0, self._nominal - width - base, begin - width + 1)
            found = find_clean(data, self._separator, start)
            if found < 0:
                break
            end = found + width
            yield data[begin:end], True
            begin = end
            self._nominal = ((base + end) // self._shard_size + 1) * self._shard_size
        if begin < len(data):
            yield data[begin:], False
        self._position += len(block)
        kept = min(len(data), 2 * width - 2)
        self._carry = data[len(data) - kept :]


def _blocks(source: TextSource) -> Iterator[tuple[bytes, int]]:
    """(decompressed bytes, stored bytes read so far)."""
    with source.open() as stored, naming_damage(source.name, source.compression):
        stream = decompressed(stored, source.compression)
        while block := stream.read(READ_BYTES):
            yield block, stored.tell()


def _row_lines(source: TextSource, keys: Sequence[str]) -> Iterator[tuple[bytes, int]]:
    """Rows as JSON lines, gathered in blocks."""
    lines: list[bytes] = []
    size = 0
    with source.open() as stored:
        rows: Iterator[Any] = (
            source.rows(keys, 0)
            if source.rows is not None
            else (dict(zip(keys, map(_text, row))) for row in read_rows(stored, source.name, keys, 0))
        )
        for row in rows:
            lines.append(_row_line(row, keys))
            size += len(lines[-1])
            if size >= READ_BYTES:
                yield b"".join(lines), 0
                lines, size = [], 0
    if lines:
        yield b"".join(lines), 0


def _text(value: bytes | None) -> str | None:
    return None if value is None else value.decode("utf-8", "surrogateescape")


def _row_line(row: Mapping[str, Any], keys: Sequence[str]) -> bytes:
    """The wanted keys only; a row without one of them keeps its names, for the message."""
    wanted: dict[str, Any] = {key: row[key] for key in keys if key in row}
    if len(wanted) < len(keys):
        wanted = dict.fromkeys(row)
    try:
        return orjson.dumps(wanted, option=orjson.OPT_APPEND_NEWLINE)
    except TypeError:
        return json.dumps(wanted, default=repr).encode() + b"\n"  # lone surrogates, values that JSON does not have
