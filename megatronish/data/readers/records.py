"""Records to texts: JSON lines, separated text and rows of values, with every fault named and counted, in bounded memory."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, BinaryIO

import orjson

from megatronish.errors import DataError

BYTE_ORDER_MARK = b"\xef\xbb\xbf"
READ_BYTES = 1 << 20
# A record (a line, a text between separators, a text file) has to be in memory; a longer one is a fault.
MAX_RECORD_BYTES = 1 << 28
ON_ERROR = ("fail", "skip", "replace")
MAX_RECORDED_REJECTS = 20
SURROGATES = re.compile("[\ud800-\udfff]")
TOO_LONG = f"longer than {MAX_RECORD_BYTES >> 20} MB, the limit for one record"
SKIP_HINT = "--on-error skip skips such documents"
CHOOSE_KEY = "Choose with --json-keys (of a stream: data.text_key)"


class RecordFault(Exception):
    """What is wrong with one record; the reader continues after it."""


@dataclass
class RecordCounts:
    """What reading has found. `records` counts lines or rows, blank ones included."""

    records: int = 0
    blank_lines: int = 0
    rejected: int = 0
    replaced: int = 0
    duplicate_keys: int = 0
    first_duplicate: int = -1

    def add(self, part: RecordCounts) -> None:
        """Adds the counts of another part, `first_duplicate` apart."""
        for name in ("records", "blank_lines", "rejected", "replaced", "duplicate_keys"):
            setattr(self, name, getattr(self, name) + getattr(part, name))


class RecordReader:
    """Reads the records of one part of an input as tuples of texts, one text per key.

    on_fault(number, reason) is called for each faulty record, which is then skipped; it may raise instead. Numbers are
    those of `TextSource.place`, counted from `first`. repair: invalid UTF-8 and lone surrogates become U+FFFD and raw control
    characters in JSON strings are kept, instead of being faults. part, parts: of lines and rows only those whose index
    modulo `parts` is `part` are parsed. `position` counts the bytes of the lines read.
    """

    def __init__(
        self,
        keys: Sequence[str],
        on_fault: Callable[[int, str], None],
        repair: bool = False,
        first: int = 0,
        part: int = 0,
        parts: int = 1,
    ) -> None:
        self.keys = tuple(keys)
        self.counts = RecordCounts(records=first)
        self.position = 0
        self._on_fault = on_fault
        self._repair = repair
        self._part, self._parts = part, parts
        self._quoted = tuple(orjson.dumps(key) for key in self.keys)

    def json_lines(self, name: str, stream: BinaryIO, size: int | None, begins: bool) -> Iterator[tuple[str, ...]]:
        """Lines of the next `size` bytes (None: to the end). begins: the part starts its file, so may hold a BOM."""
        counts, loads, keys = self.counts, orjson.loads, self.keys
        key, quoted = keys[0], self._quoted[0]
        first = counts.records + 1
        size = size if size is not None else 1 << 62
        while self.position < size:
            line = stream.readline(MAX_RECORD_BYTES + 1)
            if not line:
                return
            self.position += len(line)
            counts.records += 1
            if len(line) > MAX_RECORD_BYTES and not line.endswith(b"\n"):
                self.position += _skip_line(stream)
                self._fault(counts.records, TOO_LONG)
                continue
            if self._parts > 1 and self._elsewhere():
                continue
            if begins and counts.records == first:
                line = line.removeprefix(BYTE_ORDER_MARK)
            if len(keys) == 1:
                # The common case, kept short: valid JSON, the key once, a string. Everything else is parsed carefully.
                try:
                    text = loads(line)[key]
                    if type(text) is str and line.count(quoted) < 2:
                        begins = False
                        yield (text,)
                        continue
                except (ValueError, KeyError, TypeError, IndexError):
                    pass
            texts = self._careful_line(name, line, begins)
            if texts is not None or line.strip():
                begins = False
            if texts is not None:
                yield texts

    def _elsewhere(self) -> bool:
        """Whether the present record belongs to another part."""
        return (self.counts.records - 1) % self._parts != self._part

    def _careful_line(self, name: str, line: bytes, begins: bool) -> tuple[str, ...] | None:
        if not line.strip():
            self.counts.blank_lines += 1
            return None
        if begins and line.lstrip().startswith(b"["):
            raise DataError(
                f"{name}: a JSON array; one JSON object on each line is needed (convert with: jq -c '.[]' {name})"
            )
        try:
            return self._object(line)
        except RecordFault as fault:
            self._fault(self.counts.records, str(fault))
            return None

    def _object(self, line: bytes) -> tuple[str, ...]:
        """By Python's own parser, which names every fault, accepts NaN and shows duplicate keys."""
        top: list[tuple[str, Any]] = []

        def keep(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
            top[:] = pairs  # the outermost object comes last
            return dict(pairs)

        try:
            record = json.loads(self.decode(line), object_pairs_hook=keep, strict=not self._repair)
        except RecursionError:
            raise RecordFault("JSON nested too deeply") from None
        except ValueError as error:
            raise RecordFault(f"not JSON: {error}") from None
        if not isinstance(record, dict):
            raise RecordFault(f"a JSON object is needed, found {type(record).__name__}")
        if len(top) > len(record) and any(sum(name == key for name, _ in top) > 1 for key in self.keys):
            if not self.counts.duplicate_keys:
                self.counts.first_duplicate = self.counts.records
            self.counts.duplicate_keys += 1
        return tuple(self._text_of(record, key) for key in self.keys)

    def _text_of(self, record: Mapping[str, Any], key: str) -> str:
        if key not in record:
            raise RecordFault(f"no key {key!r}; keys are {sorted(record)}. {CHOOSE_KEY}")
        text = record[key]
        if not isinstance(text, str):
            raise RecordFault(f"the value of {key!r} is {json.dumps(text, default=repr)[:40]}, not a string")
        if not text.isascii() and (found := SURROGATES.search(text)):
            if not self._repair:
                raise RecordFault(f"the value of {key!r} has a lone surrogate at character {found.start()}")
            self.counts.replaced += 1
            text = SURROGATES.sub("\ufffd", text)
        return text

    def texts(
        self, stream: BinaryIO, size: int | None, begins: bool, separator: bytes | None
    ) -> Iterator[tuple[str, ...]]:
        """Texts between separators; without one, the rest of the stream is one text, numbered -1."""
        pieces = _all(stream) if separator is None else _separated(stream, size, separator)
        for offset, raw in pieces:
            if raw is None:
                self._fault(offset, TOO_LONG)
                continue
            body = raw.removeprefix(BYTE_ORDER_MARK) if begins and offset <= 0 else raw
            try:
                text = self.decode(body)
            except RecordFault as fault:
                self._fault(offset, str(fault))
                continue
            yield (text,)

    def rows(self, rows: Iterable[tuple[bytes | None, ...] | Mapping[str, Any]]) -> Iterator[tuple[str, ...]]:
        """Rows: undecoded values in the order of the keys, or mappings."""
        for row in rows:
            self.counts.records += 1
            if self._parts > 1 and self._elsewhere():
                continue
            try:
                if isinstance(row, tuple):
                    yield tuple(map(self._value, row, self.keys))
                else:
                    yield tuple(self._text_of(row, key) for key in self.keys)
            except RecordFault as fault:
                self._fault(self.counts.records, str(fault))

    def _value(self, raw: bytes | None, key: str) -> str:
        if raw is None:
            raise RecordFault(f"the value of {key!r} is null, not a string")
        return self.decode(raw)

    def decode(self, raw: bytes) -> str:
        """UTF-8 text. Raises RecordFault, or repairs."""
        try:
            return raw.decode("utf-8")
        except UnicodeDecodeError as error:
            if self._repair:
                self.counts.replaced += 1
                return raw.decode("utf-8", errors="replace")
            raise RecordFault(f"not UTF-8 at byte {error.start} (0x{raw[error.start]:02x})") from None

    def _fault(self, number: int, reason: str) -> None:
        self._on_fault(number, reason)
        self.counts.rejected += 1


def _skip_line(stream: BinaryIO) -> int:
    """Reads to the end of a line without keeping it; returns the bytes skipped."""
    skipped = 0
    while part := stream.readline(READ_BYTES):
        skipped += len(part)
        if part.endswith(b"\n"):
            break
    return skipped


def _all(stream: BinaryIO) -> Iterator[tuple[int, bytes | None]]:
    raw = stream.read(MAX_RECORD_BYTES + 1)
    yield -1, raw if len(raw) <= MAX_RECORD_BYTES else None


def _separated(stream: BinaryIO, size: int | None, separator: bytes) -> Iterator[tuple[int, bytes | None]]:
    """(offset, text) between separators, None for a text that is too long. Nothing after the last separator is no text."""
    left = size if size is not None else 1 << 62
    overlap = len(separator) - 1
    pending = bytearray()
    offset = searched = 0
    dropping = False
    while left > 0 and (block := stream.read(min(READ_BYTES, left))):
        left -= len(block)
        pending += block
        if pending.find(separator, searched) < 0:
            searched = max(0, len(pending) - overlap)
            if len(pending) > MAX_RECORD_BYTES:
                dropping = True
                dropped = len(pending) - overlap
                del pending[:dropped]
                offset += dropped
                searched = 0
            continue
        *complete, rest = bytes(pending).split(separator)
        for text in complete:
            yield offset, None if dropping else text
            dropping = False
            offset += len(text) + len(separator)
        pending = bytearray(rest)
        searched = max(0, len(pending) - overlap)
    if pending or dropping:
        yield offset, None if dropping else bytes(pending)
