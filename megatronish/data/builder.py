"""Writing Megatron's indexed data sets (layout: indexed.py)."""

from __future__ import annotations

import hashlib
import os
from array import array
from pathlib import Path
from typing import BinaryIO

import numpy as np
import numpy.typing as npt

from megatronish.data.errors import DataError
from megatronish.data.indexed import (
    DTYPES,
    HEADER,
    MAGIC,
    MAX_SEQUENCE_TOKENS,
    VERSION,
    bin_path,
    dtype_code,
    idx_path,
)


class IndexedWriter:
    """Streams documents to `PREFIX.bin`; `finalize` writes `PREFIX.idx`. Memory: 12 bytes a sequence, 8 a document.

    Files are written in place: write to a private folder and rename (see preprocess.py). `sha256` and `sizes`
    describe the finished files by suffix.
    """

    def __init__(self, prefix: str | os.PathLike[str], dtype: npt.DTypeLike) -> None:
        self.dtype_code = dtype_code(dtype)
        self.dtype = DTYPES[self.dtype_code]
        self.prefix = Path(prefix)
        self.tokens = 0
        self.sha256: dict[str, str] = {}
        self.sizes: dict[str, int] = {}
        self._lengths = array("i")
        self._offsets = array("q")
        self._boundaries = array("q", [0])
        assert self._lengths.itemsize == 4 and self._offsets.itemsize == 8
        self._file: BinaryIO = open(bin_path(prefix), "wb")  # noqa: SIM115  # closed by finalize or close
        self._hash = hashlib.sha256()

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

    def finalize(self) -> None:
        """Writes the index, flushes both files to the disk and closes them."""
        if self._boundaries[-1] != len(self._lengths):
            self.end_document()
        _sync_close(self._file)
        header = HEADER.pack(MAGIC, VERSION, self.dtype_code, len(self._lengths), len(self._boundaries))
        parts = [header]
        for values, kind in ((self._lengths, "<i4"), (self._offsets, "<i8"), (self._boundaries, "<i8")):
            parts.append(np.frombuffer(values, dtype=values.typecode).astype(kind).tobytes())
        index_hash = hashlib.sha256()
        with open(idx_path(self.prefix), "wb") as index:
            for part in parts:
                index.write(part)
                index_hash.update(part)
            index.flush()
            os.fsync(index.fileno())
        self.sha256 = {"bin": self._hash.hexdigest(), "idx": index_hash.hexdigest()}
        self.sizes = {"bin": self.tokens * self.dtype.itemsize, "idx": sum(map(len, parts))}

    def close(self) -> None:
        """Closes the .bin without an index (after a failure)."""
        self._file.close()


def _sync_close(file: BinaryIO) -> None:
    file.flush()
    os.fsync(file.fileno())
    file.close()
