"""The work of one unit: read its documents, encode them, write one shard a key. Runs in a worker process."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

import numpy as np
import xxhash

from megatronish.data.indexed.format import MAX_SEQUENCE_TOKENS
from megatronish.data.readers.inputs import TextSource
from megatronish.data.readers.parquet import read_row_groups
from megatronish.data.readers.records import MAX_RECORDED_REJECTS, RecordCounts, RecordReader
from megatronish.data.tokenizers.backends import Encoder, NativeEncoder
from megatronish.preprocessing.options import PreprocessOptions
from megatronish.preprocessing.units import InputPiece, WorkUnit

# A fast back end is compared with the tokenizer's own library on a little text of each stretch of this many bytes.
CHECK_EVERY_BYTES = 8 << 20
CHECK_CHARACTERS = 2048
# Where a long document is cut: at the last line end or blank within this many bytes, else between two characters.
CUT_WINDOW_BYTES = 1 << 16
# Lines are longer than Python's own buffer of 8 KB would serve well.
BUFFER_BYTES = 1 << 18


@dataclass(frozen=True)
class EncodeJob:
    """How every unit is encoded. `dtype` is numpy's name; `eod_id` None appends nothing; `shard_size` in bytes."""

    options: PreprocessOptions
    sources: tuple[TextSource, ...]
    dtype: str
    eod_id: int | None
    shard_size: int
    folder: Path
    encoder: Encoder


@dataclass
class EncodedShard:
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
    """The result of a unit. `records`: records read by source; `rejects`: (source, number, reason) of the first ones.

    Numbers count from the start of this unit's part of the source, except bytes of text, which count from its beginning.
    `fault`: (source, number, reason) that stopped the unit.
    `mismatch`: a text that the fast back end encodes differently; the unit was then encoded by the tokenizer's own library.
    """

    index: int
    shards: list[EncodedShard] = field(default_factory=list)
    records: dict[int, int] = field(default_factory=dict)
    counts: RecordCounts = field(default_factory=RecordCounts)
    long_documents: int = 0
    rejects: list[tuple[int, int, str]] = field(default_factory=list)
    first_duplicate: tuple[int, int] | None = None
    fault: tuple[int, int, str] | None = None
    mismatch: str | None = None


class _Stopped(Exception):
    """A fault under --on-error fail."""


class _Mismatch(Exception):
    """A fast back end that encodes a text of this unit differently."""


def shard_paths(folder: Path, unit: int, key: int) -> tuple[Path, Path]:
    """Files of a shard: raw tokens, and the int32 length of each document."""
    stem = folder / f"shard-{unit:07d}-{key}"
    return stem.with_suffix(".bin"), stem.with_suffix(".len")


def encode_unit(job: EncodeJob, unit: WorkUnit) -> UnitResult:
    """Writes the shards of a unit. A fast back end found wrong on it is replaced by the tokenizer's own library."""
    try:
        return _encode(job, unit, job.encoder)
    except _Mismatch as found:
        result = _encode(job, unit, NativeEncoder(job.encoder.reference))
        result.mismatch = str(found)
        return result


def _encode(job: EncodeJob, unit: WorkUnit, encoder: Encoder) -> UnitResult:
    result = UnitResult(unit.index)
    writers = [_ShardWriter(job, unit.index, number, encoder) for number in range(len(job.options.json_keys))]
    try:
        for piece in unit.pieces:
            for texts in _texts(job, piece, result):
                for writer, text in zip(writers, texts, strict=True):
                    writer.add(text)
        for writer in writers:
            result.shards.append(writer.finish())
    except _Stopped:
        pass
    finally:
        for writer in writers:
            writer.close()
    result.long_documents = sum(writer.long_documents for writer in writers)
    if job.options.long_documents == "skip":
        result.counts.rejected += result.long_documents
    return result


def _texts(job: EncodeJob, piece: InputPiece, result: UnitResult) -> Iterator[tuple[str, ...]]:
    """Documents of a piece, with the counts of reading added to `result`."""
    source, options = job.sources[piece.source], job.options
    before = result.records.get(piece.source, 0)

    def on_fault(number: int, reason: str) -> None:
        if source.format != "text":
            number += before
        elif number >= 0:
            number += piece.offset
        if options.on_error == "fail":
            result.fault = (piece.source, number, reason)
            raise _Stopped
        if len(result.rejects) < MAX_RECORDED_REJECTS:
            result.rejects.append((piece.source, number, reason))

    reader = RecordReader(options.json_keys, on_fault, repair=options.on_error == "replace")
    yield from read_piece(source, piece, reader, options.separator)
    result.records[piece.source] = before + reader.counts.records
    result.counts.add(reader.counts)
    if reader.counts.duplicate_keys and result.first_duplicate is None:
        result.first_duplicate = (piece.source, before + reader.counts.first_duplicate)


def read_piece(
    source: TextSource, piece: InputPiece, reader: RecordReader, separator: bytes | None
) -> Iterator[tuple[str, ...]]:
    """Texts of the documents of a piece of a source."""
    if source.format == "parquet" and not piece.spooled:
        yield from reader.rows(read_row_groups(piece.path, piece.start, piece.end, reader.keys))
        return
    with open(piece.path, "rb", buffering=BUFFER_BYTES) as stream:
        stream.seek(piece.start)
        size = piece.end - piece.start
        if source.format == "text":
            yield from reader.texts(stream, size, piece.offset == 0, separator)
        else:
            yield from reader.json_lines(source.name, stream, size, piece.offset == 0)


class _ShardWriter:
    """Gathers the texts of one key into batches, encodes them and writes tokens and lengths."""

    def __init__(self, job: EncodeJob, unit: int, key: int, encoder: Encoder) -> None:
        self._options, self._encoder = job.options, encoder
        self._texts: list[str] = []
        self._pending = 0
        paths = shard_paths(job.folder, unit, key)
        self._bin, self._len = (_HashedFile(path) for path in paths)
        self._shard = EncodedShard()
        self._dtype = np.dtype(job.dtype)
        self._eod_id = job.eod_id
        self.long_documents = 0
        # Which stretches of the input are compared depends on the position of the unit, not on its worker.
        first = unit * job.shard_size
        crossed = first // CHECK_EVERY_BYTES != (first - job.shard_size) // CHECK_EVERY_BYTES
        self._check_at = 0 if crossed else CHECK_EVERY_BYTES - first % CHECK_EVERY_BYTES

    def add(self, text: str) -> None:
        limit = self._options.max_doc_bytes
        if limit and len(text) * 4 > limit and _size(text) > limit:
            self._add_long(text)
            return
        self._texts.append(text)
        self._pending += len(text) + 64
        if self._pending >= self._encoder.batch_bytes:
            self._flush()

    def _add_long(self, text: str) -> None:
        self.long_documents += 1
        if self._options.long_documents == "skip":
            return
        self._flush()
        parts = [self._encoder.encode([part])[0] for part in split_text(text, self._options.max_doc_bytes)]
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
        if not self._options.keep_empty:
            lengths = lengths[full]
        self._shard.empty += empty
        self._shard.documents += len(lengths)
        self._shard.tokens += tokens.size
        self._shard.text_bytes += size
        self._bin.write(tokens.data)
        self._len.write(lengths.astype("<i4").data)

    def finish(self) -> EncodedShard:
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
