"""The work of one unit: read its documents, encode them, write one shard a key. Runs in a worker process."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

import numpy as np
import xxhash

from megatronish.data.indexed.format import MAX_SEQUENCE_TOKENS
from megatronish.data.readers.documents import MAX_RECORDED_REJECTS
from megatronish.data.readers.inputs import Source
from megatronish.data.readers.parquet import read_rows
from megatronish.data.readers.records import Counts, RecordReader
from megatronish.data.tokenizers.backends import Encoder, NativeEncoder
from megatronish.preprocessing.units import Piece, Unit

# A fast back end is compared with the tokenizer's own library on a little text of each stretch of this many bytes.
CHECK_EVERY_BYTES = 8 << 20
CHECK_CHARACTERS = 2048
# Where a long document is cut: at the last line end or blank within this many bytes, else between two characters.
CUT_WINDOW_BYTES = 1 << 16
TELL_SECONDS = 0.2
# Lines are longer than Python's own buffer of 8 KB would serve well.
BUFFER_BYTES = 1 << 18


@dataclass(frozen=True)
class Job:
    """What every unit is done with. `dtype` is numpy's name; `eod_id` None appends nothing; `shard_size` in bytes."""

    sources: tuple[Source, ...]
    keys: tuple[str, ...]
    separator: bytes | None
    on_error: str
    max_doc_bytes: int
    long_documents: str
    keep_empty: bool
    dtype: str
    eod_id: int | None
    shard_size: int
    folder: Path
    encoder: Encoder


@dataclass
class Shard:
    """One key's part of a unit. `lengths_hash` and `hash` are xxh3 (128 bits, hexadecimal) of the two files."""

    documents: int = 0
    tokens: int = 0
    text_bytes: int = 0
    empty: int = 0
    unknown: int = 0
    hash: str = ""
    lengths_hash: str = ""


@dataclass
class UnitResult:
    """What became of a unit. `records`: records read by source; `rejects`: (source, number, reason) of the first ones.

    Numbers count from the start of this unit's part of the source, except bytes of text, which count from its beginning.
    `fault`: (source, number, reason) that stopped the unit. `failure`: an error that a user has to mend.
    `mismatch`: a text that the fast back end encodes differently; the unit was then done by the tokenizer's own library.
    """

    index: int
    shards: list[Shard] = field(default_factory=list)
    records: dict[int, int] = field(default_factory=dict)
    blank_lines: int = 0
    rejected: int = 0
    replaced: int = 0
    duplicate_keys: int = 0
    long_documents: int = 0
    rejects: list[tuple[int, int, str]] = field(default_factory=list)
    first_duplicate: tuple[int, int] | None = None
    fault: tuple[int, int, str] | None = None
    mismatch: str | None = None


@dataclass
class Tally:
    """What a unit has done so far, told now and then."""

    documents: int = 0
    text_bytes: int = 0
    tokens: int = 0
    rejected: int = 0


class _Stopped(Exception):
    """A fault under --on-error fail."""


class _Mismatch(Exception):
    """A fast back end that encodes a text of this unit differently."""


def shard_paths(folder: Path, unit: int, key: int) -> tuple[Path, Path]:
    """Files of a shard: raw tokens, and the int32 length of each document."""
    stem = folder / f"shard-{unit:07d}-{key}"
    return stem.with_suffix(".bin"), stem.with_suffix(".len")


def encode_unit(job: Job, unit: Unit, tell: Callable[[Tally], None]) -> UnitResult:
    """Writes the shards of a unit. A fast back end found wrong on it is replaced by the tokenizer's own library."""
    try:
        return _encode(job, unit, job.encoder, tell)
    except _Mismatch as found:
        result = _encode(job, unit, NativeEncoder(job.encoder.reference), tell)
        result.mismatch = str(found)
        return result


def _encode(job: Job, unit: Unit, encoder: Encoder, tell: Callable[[Tally], None]) -> UnitResult:
    result = UnitResult(unit.index)
    tally = Tally()
    writers = [_ShardWriter(job, unit.index, number, encoder, tally) for number in range(len(job.keys))]
    told = time.monotonic()
    try:
        for piece in unit.pieces:
            for texts in _texts(job, piece, result):
                for writer, text in zip(writers, texts, strict=True):
                    writer.add(text)
                if time.monotonic() - told > TELL_SECONDS:
                    told = time.monotonic()
                    tally.rejected = result.rejected + len(result.rejects)
                    tell(tally)
        for writer in writers:
            result.shards.append(writer.finish())
    except _Stopped:
        pass
    finally:
        for writer in writers:
            writer.close()
    result.long_documents = sum(writer.long_documents for writer in writers)
    if job.long_documents == "skip":
        result.rejected += result.long_documents
    return result


def _texts(job: Job, piece: Piece, result: UnitResult) -> Iterator[tuple[str, ...]]:
    """Documents of a piece, with what reading met added to `result`."""
    before = result.records.get(piece.source, 0)
    relative = job.sources[piece.source].format != "text"

    def on_fault(number: int, reason: str) -> None:
        place = number + (before if relative else piece.offset if number >= 0 else 0)
        if job.on_error == "fail":
            result.fault = (piece.source, place, reason)
            raise _Stopped
        if len(result.rejects) < MAX_RECORDED_REJECTS:
            result.rejects.append((piece.source, place, reason))

    reader = RecordReader(job.keys, on_fault, repair=job.on_error == "replace")
    yield from read_piece(job.sources[piece.source], piece, reader, job.separator)
    _add_counts(result, reader.counts, piece.source, before)


def read_piece(
    source: Source, piece: Piece, reader: RecordReader, separator: bytes | None
) -> Iterator[tuple[str, ...]]:
    """Texts of the documents of a piece of a source."""
    if source.format == "parquet":
        yield from reader.rows(read_rows(piece.path, piece.start, piece.end, reader.keys))
        return
    with open(piece.path, "rb", buffering=BUFFER_BYTES) as stream:
        stream.seek(piece.start)
        size = piece.end - piece.start
        if source.format == "text":
            yield from reader.texts(stream, size, piece.offset == 0, separator)
        else:
            yield from reader.json_lines(source.name, stream, size, piece.offset == 0)


def _add_counts(result: UnitResult, counts: Counts, source: int, before: int) -> None:
    result.records[source] = before + counts.records
    result.blank_lines += counts.blank_lines
    result.rejected += counts.rejected
    result.replaced += counts.replaced
    result.duplicate_keys += counts.duplicate_keys
    if counts.duplicate_keys and result.first_duplicate is None:
        result.first_duplicate = (source, before + counts.first_duplicate)


class _ShardWriter:
    """Gathers the texts of one key into batches, encodes them and writes tokens and lengths."""

    def __init__(self, job: Job, unit: int, key: int, encoder: Encoder, tally: Tally) -> None:
        self._job, self._encoder, self._tally = job, encoder, tally
        self._texts: list[str] = []
        self._pending = 0
        paths = shard_paths(job.folder, unit, key)
        self._bin, self._len = (_HashedFile(path) for path in paths)
        self._shard = Shard()
        self._dtype = np.dtype(job.dtype)
        self._eod_id = job.eod_id
        self.long_documents = 0
        # Which stretches of the input are compared is a matter of where the unit lies, not of who does it.
        first = unit * job.shard_size
        crossed = first // CHECK_EVERY_BYTES != (first - job.shard_size) // CHECK_EVERY_BYTES
        self._check_at = 0 if crossed else CHECK_EVERY_BYTES - first % CHECK_EVERY_BYTES

    def add(self, text: str) -> None:
        limit = self._job.max_doc_bytes
        if limit and len(text) * 4 > limit and _size(text) > limit:
            self._add_long(text)
            return
        self._texts.append(text)
        self._pending += len(text) + 64
        if self._pending >= self._encoder.batch_bytes:
            self._flush()

    def _add_long(self, text: str) -> None:
        self.long_documents += 1
        if self._job.long_documents == "skip":
            return
        self._flush()
        parts = [self._encoder.encode([part])[0] for part in split_text(text, self._job.max_doc_bytes)]
        self._write([np.concatenate(parts)], _size(text))

    def _flush(self) -> None:
        texts, self._texts, self._pending = self._texts, [], 0
        if not texts:
            return
        size = sum(map(_size, texts))
        if self._encoder.checked and self._shard.text_bytes >= self._check_at:
            self._check_at = self._shard.text_bytes + CHECK_EVERY_BYTES
            longest = max(texts[:16], key=len)[:CHECK_CHARACTERS]
            if not self._encoder.agrees(longest):
                raise _Mismatch(longest[:60])
        self._write(self._encoder.encode(texts), size)

    def _write(self, arrays: Sequence[np.ndarray], size: int) -> None:
        lengths = np.fromiter(map(len, arrays), dtype=np.int64, count=len(arrays))
        if int(lengths.max()) >= MAX_SEQUENCE_TOKENS:
            raise AssertionError("a record is at most 2^28 bytes, so fewer tokens")
        full = lengths > 0
        if self._eod_id is None:
            ids = np.concatenate(arrays)
        else:
            ending = np.array([self._eod_id], dtype=arrays[0].dtype)
            ended = [
                part for array, keep in zip(arrays, full.tolist(), strict=True) if keep for part in (array, ending)
            ]
            ids = np.concatenate(ended or arrays)
            lengths[full] += 1
        reference = self._encoder.reference
        assert not ids.size or int(ids.max()) < reference.vocab_size, "an id outside the vocabulary"
        if reference.unknown_id is not None:
            self._shard.unknown += int(np.count_nonzero(ids == reference.unknown_id))
            if reference.unknown_id == self._eod_id:
                self._shard.unknown -= int(full.sum())
        tokens = ids.astype(self._dtype)
        empty = len(lengths) - int(full.sum())
        if not self._job.keep_empty:
            lengths = lengths[full]
        self._shard.empty += empty
        self._shard.documents += len(lengths)
        self._shard.tokens += tokens.size
        self._shard.text_bytes += size
        self._bin.write(tokens.data)
        self._len.write(lengths.astype("<i4").data)
        self._tally.documents += len(arrays)
        self._tally.text_bytes += size
        self._tally.tokens += tokens.size

    def finish(self) -> Shard:
        self._flush()
        self._shard.hash, self._shard.lengths_hash = self._bin.finish(), self._len.finish()
        return self._shard

    def close(self) -> None:
        self._bin.close()
        self._len.close()


class _HashedFile:
    """A file being written, with the hash of what went into it."""

    def __init__(self, path: Path) -> None:
        self._file: BinaryIO = open(path, "wb")  # noqa: SIM115  # closed by its owner
        self._hash = xxhash.xxh3_128()

    def write(self, raw: memoryview) -> None:
        self._file.write(raw)
        self._hash.update(raw)

    def finish(self) -> str:
        self._file.close()
        return self._hash.hexdigest()

    def close(self) -> None:
        self._file.close()


def _size(text: str) -> int:
    return len(text) if text.isascii() else len(text.encode("utf-8"))


def split_text(text: str, limit: int) -> Iterator[str]:
    """Parts of at most `limit` UTF-8 bytes (at least one character) that make up the text, cut after a line or before a blank."""
    raw = text.encode("utf-8")
    start = 0
    while len(raw) - start > limit:
        window = max(start + 1, start + limit - CUT_WINDOW_BYTES)
        end = raw.rfind(b"\n", window, start + limit) + 1
        if end <= start:
            end = raw.rfind(b" ", window, start + limit)
        if end <= start:
            end = start + limit
            while end > start and raw[end] & 0xC0 == 0x80:
                end -= 1
            if end == start:
                end = start + limit
                while end < len(raw) and raw[end] & 0xC0 == 0x80:
                    end += 1
        yield raw[start:end].decode("utf-8")
        start = end
    yield raw[start:].decode("utf-8")
