"""Writing Megatron's indexed data sets (layout: format.py)."""

from __future__ import annotations

import os
from array import array
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

import numpy as np
import xxhash

from megatronish.data.indexed.format import (
    DTYPES,
    HEADER,
    MAGIC,
    MAX_SEQUENCE_TOKENS,
    VERSION,
    bin_path,
    dtype_code,
    idx_path,
)
from megatronish.errors import DataError

if TYPE_CHECKING:
    import numpy.typing as npt


class IndexedWriter:
    """Streams documents to `PREFIX.bin`; `finalize` writes `PREFIX.idx`. Memory: 12 bytes per sequence, 8 per document.

    Files are written in place: write to a private folder and rename (see preprocessing/publish.py). `xxh3` (128 bits) and `sizes`
    describe the finished files by suffix.
    """

    def __init__(self, prefix: str | os.PathLike[str], dtype: npt.DTypeLike) -> None:
        self.dtype_code = dtype_code(dtype)
        self.dtype = DTYPES[self.dtype_code]
        self.prefix = Path(prefix)
        self.tokens = 0
        self.xxh3: dict[str, str] = {}
        self.sizes: dict[str, int] = {}
        self._lengths = array("i")
        self._offsets = array("q")
        self._boundaries = array("q", [0])
        assert self._lengths.itemsize == 4 and self._offsets.itemsize == 8
        self._file: BinaryIO = open(bin_path(prefix), "wb")  # noqa: SIM115  # closed by finalize or close
        self._hash = xxhash.xxh3_128()

    @property
    def documents(self) -> int:
        """Documents closed so far."""
        return len(self._boundaries) - 1

    def add_sequence(self, tokens: npt.ArrayLike) -> None:
        """Appends one sequence to the open document. Raises DataError if too long or if a token does not fit."""
        array_in = np.asarray(tokens)
        if array_in.size > MAX_SEQUENCE_TOKENS:
            raise DataError(
                f"document {self.documents} has {array_in.size:,} tokens in one sequence; the .idx format stores lengths "
                f"as int32 (at most {MAX_SEQUENCE_TOKENS:,}). Split the document, for example with --doc-separator."
            )
        if array_in.size == 0:
            return
        if self.dtype.kind in "iu":
            limits = np.iinfo(self.dtype)
            if int(array_in.min()) < limits.min or int(array_in.max()) > limits.max:
                raise DataError(
                    f"document {self.documents} holds token ids {int(array_in.min())}..{int(array_in.max())}, "
                    f"outside {self.dtype}; use a wider dtype"
                )
        raw = np.ascontiguousarray(array_in, dtype=self.dtype).tobytes()
        self._offsets.append(self.tokens * self.dtype.itemsize)
        self._lengths.append(int(array_in.size))
        self._file.write(raw)
        self._hash.update(raw)
        self.tokens += int(array_in.size)

    def end_document(self) -> None:
        """Closes the open document (it may be empty)."""
        self._boundaries.append(len(self._lengths))

    def add_document(self, tokens: npt.ArrayLike) -> None:
        """Appends a document of one sequence; an empty one becomes a document without a sequence."""
        self.add_sequence(tokens)
        self.end_document()

    def append_tokens(self, tokens: np.ndarray) -> None:
        """Appends tokens of this dtype as they are; `append_lengths` then divides them into sequences."""
        assert tokens.dtype == self.dtype
        raw = np.ascontiguousarray(tokens).tobytes()
        self._file.write(raw)
        self._hash.update(raw)
        self.tokens += tokens.size

    def append_lengths(self, lengths: np.ndarray, sequences: np.ndarray) -> None:
        """Closes documents of `sequences[i]` sequences each, whose lengths follow each other in `lengths`."""
        total = int(lengths.sum(dtype=np.int64))
        starts = self.tokens - total + np.cumsum(lengths, dtype=np.int64) - lengths
        self._lengths.frombytes(lengths.astype(np.int32).tobytes())
        self._offsets.frombytes((starts * self.dtype.itemsize).astype(np.int64).tobytes())
        ends = len(self._lengths) - int(sequences.sum()) + np.cumsum(sequences, dtype=np.int64)
        self._boundaries.frombytes(ends.astype(np.int64).tobytes())

    def finalize(self) -> None:
        """Writes the index, flushes both files to the disk and closes them."""
        if self._boundaries[-1] != len(self._lengths):
            self.end_document()
        _sync_close(self._file)
        header = HEADER.pack(MAGIC, VERSION, self.dtype_code, len(self._lengths), len(self._boundaries))
        parts = [header]
        for values, kind in ((self._lengths, "<i4"), (self._offsets, "<i8"), (self._boundaries, "<i8")):
            parts.append(np.frombuffer(values, dtype=values.typecode).astype(kind).tobytes())
        index_hash = xxhash.xxh3_128()
        with open(idx_path(self.prefix), "wb") as index:
            for part in parts:
                index.write(part)
                index_hash.update(part)
            index.flush()
            os.fsync(index.fileno())
        self.xxh3 = {"bin": self._hash.hexdigest(), "idx": index_hash.hexdigest()}
        self.sizes = {"bin": self.tokens * self.dtype.itemsize, "idx": sum(map(len, parts))}

    def close(self) -> None:
        """Closes the .bin without an index (after a failure)."""
        self._file.close()


def write_index(path: Path, dtype: npt.DTypeLike, lengths: Callable[[], Iterator[np.ndarray]]) -> tuple[int, str]:
    """Writes an .idx of documents of one sequence each, in memory that does not grow with them, and syncs it.

    lengths: makes the int32 tokens of each document, in order, in arrays; a length of 0 is a document without a
    sequence. Returns the file's size and its xxh3 (128 bits, hexadecimal).
    """
    code = dtype_code(dtype)
    size = DTYPES[code].itemsize
    documents = sequences = 0
    for part in lengths():
        documents, sequences = documents + len(part), sequences + int(np.count_nonzero(part))
    digest = xxhash.xxh3_128()
    with open(path, "wb") as file:

        def write(raw: bytes) -> None:
            file.write(raw)
            digest.update(raw)

        write(HEADER.pack(MAGIC, VERSION, code, sequences, documents + 1))
        for part in lengths():
            write(part[part > 0].astype("<i4").tobytes())
        offset = 0
        for part in lengths():
            ends = offset + np.cumsum(part[part > 0], dtype=np.int64) * size
            if ends.size:
                write(np.concatenate(([offset], ends[:-1])).astype("<i8").tobytes())
                offset = int(ends[-1])
        write(bytes(8))
        boundary = 0
        for part in lengths():
            if part.size:
                ends = boundary + np.cumsum(part > 0, dtype=np.int64)
                write(ends.astype("<i8").tobytes())
                boundary = int(ends[-1])
        file.flush()
        os.fsync(file.fileno())
        size_of_file = os.fstat(file.fileno()).st_size
    return size_of_file, digest.hexdigest()


def _sync_close(file: BinaryIO) -> None:
    file.flush()
    os.fsync(file.fileno())
    file.close()
