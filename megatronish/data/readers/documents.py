"""The documents of sources of every format, from any position, one after another in this process."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from megatronish.data.readers.compression import BUFFER_BYTES, decompressed, naming_damage
from megatronish.data.readers.inputs import TextSource, check_keys
from megatronish.data.readers.parquet import read_rows
from megatronish.data.readers.records import MAX_RECORDED_REJECTS, SKIP_HINT, RecordCounts, RecordReader
from megatronish.errors import DataError


class StreamPosition(NamedTuple):
    """Where a document begins in a source: its number, and of JSON lines the byte of the decompressed text."""

    document: int = 0
    byte: int = 0


START = StreamPosition()


def read_records(
    source: TextSource, stored: Any, reader: RecordReader, separator: bytes | None = None, start: StreamPosition = START
) -> Iterator[tuple[str, ...]]:
    """The texts of a source from a position on. stored: what `source.open` gives.

    Seeking is free in plain JSON lines and costs at most a row group in Parquet; compressed files are decompressed, and
    other tables read, up to the position.
    """
    if source.rows is not None:
        yield from reader.rows(source.rows(reader.keys, start.document))
    elif source.format == "parquet":
        yield from reader.rows(read_rows(stored, source.name, reader.keys, start.document))
    else:
        with naming_damage(source.name, source.compression):
            stream = decompressed(stored, source.compression)
            if source.compression:
                _skip(stream, start.byte, source.name)
            elif start.byte:
                stream.seek(start.byte)
            if source.format == "jsonl":
                yield from reader.json_lines(source.name, stream, None, begins=start.byte == 0)
            else:
                yield from reader.texts(stream, None, True, separator)


def _skip(stream: Any, count: int, name: str) -> None:
    while count:
        skipped = len(stream.read(min(count, BUFFER_BYTES)))
        if not skipped:
            raise DataError(f"{name}: shorter than when it was read before; start again without the saved state")
        count -= skipped


@dataclass(frozen=True)
class Document:
    """One input document: a text for each key (empty where empty), and the name of its source."""

    texts: tuple[str, ...]
    place: str


class DocumentReader:
    """Iterates over the documents of sources in order; iterating again starts over with fresh counts.

    keys: the keys (columns) whose texts make a document (text files have one text, so need exactly one key).
    separator: cuts text files into documents (it is not part of them); None keeps a file as one.
    on_error: "fail" raises DataError at the first fault, "skip" counts it and continues, "replace" repairs what can be (see
    RecordReader) and skips the rest. A truncated or corrupt compressed file always raises.
    `counts`, the first `rejects` and `bytes_read` (of the sources as stored, for progress) describe what was read so far.
    """

    def __init__(
        self,
        sources: Sequence[TextSource],
        keys: Sequence[str] = ("text",),
        separator: str | None = None,
        on_error: str = "fail",
    ) -> None:
        self.sources = list(sources)
        self.keys = tuple(keys)
        self.separator = separator.encode("utf-8") if separator else None
        self.on_error = on_error
        self.total_bytes = sum(source.size for source in self.sources)
        self._reset()
        check_keys(self.sources, self.keys)

    def _reset(self) -> None:
        self.counts = RecordCounts()
        self.rejects: list[dict[str, str]] = []
        self.bytes_read = 0

    def __iter__(self) -> Iterator[Document]:
        self._reset()
        before = 0
        for source in self.sources:
            on_fault = functools.partial(self._fault, source)
            reader = RecordReader(self.keys, on_fault, repair=self.on_error == "replace")
            with source.open() as stored:
                for texts in read_records(source, stored, reader, self.separator):
                    # A Parquet file is not read in order, so its share is counted at its end.
                    in_order = stored is not None and source.format != "parquet"
                    self.bytes_read = before + (stored.tell() if in_order else 0)
                    yield Document(texts, source.name)
            before += source.size
            self.bytes_read = before
            self.counts.add(reader.counts)

    def _fault(self, source: TextSource, number: int, reason: str) -> None:
        place = source.place(number)
        if self.on_error == "fail":
            raise DataError(f"{place}: {reason} ({SKIP_HINT})")
        if len(self.rejects) < MAX_RECORDED_REJECTS:
            self.rejects.append({"place": place, "reason": reason})
