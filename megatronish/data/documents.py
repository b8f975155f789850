"""Documents from files: plain text (whole or cut at a separator) and JSON lines, either gzipped, streamed.

Every fault is named by file and line (or byte) and either raised or, with `on_error="skip"`, counted and passed over.
"""

from __future__ import annotations

import glob
import gzip
import json
import os
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

from megatronish.data.errors import DataError

JSON_LINES_SUFFIXES = (".jsonl", ".ndjson", ".json")
UNREADABLE_SUFFIXES = (".parquet", ".zst", ".bz2", ".xz", ".zip", ".tar", ".bin", ".idx")
BYTE_ORDER_MARK = b"\xef\xbb\xbf"
MAX_RECORDED_REJECTS = 20
READ_BYTES = 1 << 20


@dataclass(frozen=True)
class Document:
    """One input document: a text for each key (None where empty), its UTF-8 size, and where it came from."""

    texts: tuple[str, ...]
    place: str


@dataclass
class ReadReport:
    """What reading met: counts, the first rejected documents, and bytes read of the files as stored (for progress)."""

    blank_lines: int = 0
    rejected: int = 0
    rejects: list[dict[str, str]] = field(default_factory=list)
    bytes_read: int = 0


class _Fault(Exception):
    """A fault of one document, at a place; the reader goes on after it when asked to skip."""

    def __init__(self, place: str, reason: str) -> None:
        super().__init__(f"{place}: {reason}")
        self.place = place
        self.reason = reason


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
                    f"--input {match}: {suffix} files are not read; convert to text or JSON lines (plain or .gz)"
                )
            if not os.access(match, os.R_OK):
                raise DataError(f"--input {match}: no permission to read it")
            found.setdefault(match.resolve(), match)
    return list(found.values())


class DocumentReader:
    """Streams the documents of files in order; iterating again starts over with a fresh `report`.

    keys: the JSON keys whose texts make a document (text files have one text, so need exactly one key).
    separator: cuts text files into documents (it is not part of them); None keeps a file whole.
    on_error: "fail" raises DataError at the first fault, "skip" counts it in `report` and goes on. A truncated or
    corrupt .gz always raises.
    """

    def __init__(
        self,
        files: Sequence[Path],
        keys: Sequence[str] = ("text",),
        separator: str | None = None,
        on_error: str = "fail",
    ) -> None:
        self.files = list(files)
        self.keys = tuple(keys)
        self.separator = separator.encode("utf-8") if separator else None
        self.on_error = on_error
        self.report = ReadReport()
        self.total_bytes = sum(path.stat().st_size for path in self.files)
        for path in self.files:
            if len(self.keys) > 1 and not _is_json_lines(path):
                raise DataError(f"--json-keys {' '.join(self.keys)}: {path} is not JSON lines, so has a single text")

    def __iter__(self) -> Iterator[Document]:
        self.report = ReadReport()
        before = 0
        for path in self.files:
            with open(path, "rb") as stored:
                zipped = path.suffix.lower() == ".gz"
                stream: BinaryIO = gzip.GzipFile(fileobj=stored) if zipped else stored  # type: ignore[assignment]
                parse = self._json_lines if _is_json_lines(path) else self._text
                try:
                    for document in parse(path, stream):
                        self.report.bytes_read = before + stored.tell()
                        yield document
                except (EOFError, gzip.BadGzipFile, zlib.error) as error:
                    raise DataError(f"{path}: truncated or corrupt gzip file: {error}") from None
            before += path.stat().st_size
            self.report.bytes_read = before

    def _json_lines(self, path: Path, stream: BinaryIO) -> Iterator[Document]:
        for number, line in enumerate(stream, start=1):
            if number == 1:
                line = line.removeprefix(BYTE_ORDER_MARK)
            if not line.strip():
                self.report.blank_lines += 1
                continue
            if number == 1 and line.lstrip().startswith(b"["):
                raise DataError(
                    f"{path}: a JSON array; one JSON object on each line is needed (convert with: jq -c '.[]' {path.name})"
                )
            yield from self._guarded(lambda line=line, number=number: self._parse_line(path, number, line))  # type: ignore[misc]

    def _parse_line(self, path: Path, number: int, line: bytes) -> Document:
        place = f"{path}, line {number}"
        try:
            record = json.loads(_decode(line, place))
        except RecursionError:
            raise _Fault(place, "JSON nested too deeply") from None
        except ValueError as error:
            raise _Fault(place, f"not JSON: {error}") from None
        if not isinstance(record, dict):
            raise _Fault(place, f"a JSON object is needed, found {type(record).__name__}")
        texts = []
        for key in self.keys:
            if key not in record:
                raise _Fault(place, f"no key {key!r}; keys are {sorted(record)}. Choose with --json-keys")
            text = record[key]
            if not isinstance(text, str):
                raise _Fault(place, f"the value of {key!r} is {json.dumps(text)[:40]}, not a string")
            try:
                text.encode("utf-8")
            except UnicodeEncodeError as error:
                raise _Fault(place, f"the value of {key!r} has a lone surrogate at character {error.start}") from None
            texts.append(text)
        return Document(tuple(texts), place)

    def _text(self, path: Path, stream: BinaryIO) -> Iterator[Document]:
        offset = 0
        for chunk in _separated(stream, self.separator):
            place = str(path) if self.separator is None else f"{path}, byte {offset}"
            body = chunk.removeprefix(BYTE_ORDER_MARK) if offset == 0 else chunk
            offset += len(chunk) + len(self.separator or b"")
            yield from self._guarded(lambda body=body, place=place: Document((_decode(body, place),), place))  # type: ignore[misc]

    def _guarded(self, parse: Callable[[], Document]) -> Iterator[Document]:
        try:
            document = parse()
        except _Fault as fault:
            if self.on_error == "fail":
                raise DataError(f"{fault} (--on-error skip passes over such documents)") from None
            self.report.rejected += 1
            if len(self.report.rejects) < MAX_RECORDED_REJECTS:
                self.report.rejects.append({"place": fault.place, "reason": fault.reason})
            return
        yield document


def _is_json_lines(path: Path) -> bool:
    name = path.with_suffix("") if path.suffix.lower() == ".gz" else path
    return name.suffix.lower() in JSON_LINES_SUFFIXES


def _decode(raw: bytes, place: str) -> str:
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise _Fault(place, f"not UTF-8 at byte {error.start} (0x{raw[error.start]:02x})") from None


def _separated(stream: BinaryIO, separator: bytes | None) -> Iterator[bytes]:
    """Pieces of a stream between separators; memory is bounded by the longest piece."""
    if separator is None:
        yield stream.read()
        return
    pending = b""
    while block := stream.read(READ_BYTES):
        *complete, pending = (pending + block).split(separator)
        yield from complete
    yield pending
