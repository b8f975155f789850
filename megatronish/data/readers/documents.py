"""Documents of files, one after another in this process: what training a tokenizer and small jobs read."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from megatronish.data.readers.inputs import Source, check_keys, file_source, find_inputs, open_stream, reading
from megatronish.data.readers.parquet import read_rows, row_groups
from megatronish.data.readers.records import RecordReader
from megatronish.errors import DataError

__all__ = ["Document", "DocumentReader", "ReadReport", "find_inputs"]

MAX_RECORDED_REJECTS = 20
SKIP_HINT = "--on-error skip passes over such documents"


@dataclass(frozen=True)
class Document:
    """One input document: a text for each key (empty where empty), and the file that it came from."""

    texts: tuple[str, ...]
    place: str


@dataclass
class ReadReport:
    """What reading met: counts, the first rejected documents, and bytes read of the files as stored (for progress)."""

    blank_lines: int = 0
    rejected: int = 0
    replaced: int = 0
    duplicate_keys: int = 0
    rejects: list[dict[str, str]] = field(default_factory=list)
    bytes_read: int = 0


class DocumentReader:
    """Streams the documents of files in order; iterating again starts over with a fresh `report`.

    keys: the keys (columns) whose texts make a document (text files have one text, so need exactly one key).
    separator: cuts text files into documents (it is not part of them); None keeps a file whole.
    on_error: "fail" raises DataError at the first fault, "skip" counts it in `report` and goes on, "replace" repairs what
    can be (see RecordReader) and skips the rest. A truncated or corrupt compressed file always raises.
    """

    def __init__(
        self,
        files: Sequence[Path],
        keys: Sequence[str] = ("text",),
        separator: str | None = None,
        on_error: str = "fail",
    ) -> None:
        self.sources = [file_source(path) for path in files]
        self.keys = tuple(keys)
        self.separator = separator.encode("utf-8") if separator else None
        self.on_error = on_error
        self.report = ReadReport()
        self.total_bytes = sum(source.size for source in self.sources)
        check_keys(self.sources, self.keys)

    def __iter__(self) -> Iterator[Document]:
        self.report = ReadReport()
        before = 0
        for source in self.sources:
            on_fault = functools.partial(self._fault, source)
            reader = RecordReader(self.keys, on_fault, repair=self.on_error == "replace")
            for texts, position in self._texts(source, reader):
                self.report.bytes_read = before + position
                yield Document(texts, source.name)
            before += source.size
            self.report.bytes_read = before
            self.report.blank_lines += reader.counts.blank_lines
            self.report.rejected += reader.counts.rejected
            self.report.replaced += reader.counts.replaced
            self.report.duplicate_keys += reader.counts.duplicate_keys

    def _texts(self, source: Source, reader: RecordReader) -> Iterator[tuple[tuple[str, ...], int]]:
        if source.format == "parquet":
            groups = len(row_groups(source.name, self.keys).rows)
            for number in range(groups):
                for texts in reader.rows(read_rows(source.name, number, number + 1, self.keys)):
                    yield texts, source.size * number // groups
            return
        with open(source.name, "rb") as stored, reading(source):
            stream = open_stream(source, stored)
            if source.format == "jsonl":
                found = reader.json_lines(source.name, stream, None, begins=True)
            else:
                found = reader.texts(stream, None, True, self.separator)
            for texts in found:
                yield texts, stored.tell()

    def _fault(self, source: Source, number: int, reason: str) -> None:
        place = source.place(number)
        if self.on_error == "fail":
            raise DataError(f"{place}: {reason} ({SKIP_HINT})")
        if len(self.report.rejects) < MAX_RECORDED_REJECTS:
            self.report.rejects.append({"place": place, "reason": reason})
