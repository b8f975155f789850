"""Megatron's indexed data set, `PREFIX.bin` + `PREFIX.idx` (MMIDIDX version 1): layout and memory-mapped reader (builder.py writes).

`.bin` holds the raw little-endian tokens. `.idx` (little-endian, packed):

    0       9 bytes   b"MMIDIDX\\0\\0"
    9       u64       version, 1
    17      u8        dtype code (DTYPES)
    18      u64       N, number of sequences
    26      u64       D, number of documents + 1
    34      i32[N]    tokens of each sequence
    34+4N   i64[N]    byte offset of each sequence in .bin
    34+12N  i64[D]    document boundaries as sequence numbers, first 0, last N

A document may hold several sequences; an empty document advances the boundaries and adds no sequence.
"""

from __future__ import annotations

import hashlib
import os
import struct
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from megatronish.data.errors import DataError

MAGIC = b"MMIDIDX\x00\x00"
VERSION = 1
HEADER = struct.Struct("<9sQBQQ")
DTYPES: dict[int, np.dtype[Any]] = {
    code: np.dtype(name)
    for code, name in {1: "u1", 2: "i1", 3: "<i2", 4: "<i4", 5: "<i8", 6: "<f8", 7: "<f4", 8: "<u2"}.items()
}
INTEGER_CODES = frozenset({1, 2, 3, 4, 5, 8})
MAX_SEQUENCE_TOKENS = 2**31 - 1
# Megatron's own threshold: it keeps some room below 65,536 for padding the vocabulary.
UINT16_VOCAB_LIMIT = 65_500


def best_dtype(vocab_size: int) -> np.dtype[Any]:
    """Token dtype that Megatron would choose: uint16 below 65,500 entries, else int32."""
    return np.dtype("<u2") if vocab_size < UINT16_VOCAB_LIMIT else np.dtype("<i4")


def dtype_code(dtype: npt.DTypeLike) -> int:
    wanted = np.dtype(dtype).newbyteorder("<")
    for code, known in DTYPES.items():
        if known.newbyteorder("<") == wanted:
            return code
    raise DataError(f"token dtype {np.dtype(dtype)} cannot be stored; use one of {[str(d) for d in DTYPES.values()]}")


def bin_path(prefix: str | os.PathLike[str]) -> Path:
    """`PREFIX.bin`."""
    return Path(f"{os.fspath(prefix)}.bin")


def idx_path(prefix: str | os.PathLike[str]) -> Path:
    """`PREFIX.idx`."""
    return Path(f"{os.fspath(prefix)}.idx")


class IndexedReader:
    """Memory-mapped reader. Index arrays are copied once (in the file they are misaligned); tokens stay mapped.

    Attributes: `dtype`, `sequence_lengths` int32[N], `document_starts` int64[documents + 1] in tokens (so document d
    is tokens [document_starts[d], document_starts[d + 1])), `tokens_view` dtype[tokens].
    Raises DataError, naming the file, if a file is missing, truncated, of another version or inconsistent.
    """

    def __init__(self, prefix: str | os.PathLike[str]) -> None:
        self.prefix = os.fspath(prefix)
        code, lengths, offsets, boundaries = _read_index(idx_path(prefix))
        self.dtype = DTYPES[code]
        self.sequence_lengths = lengths
        self.document_boundaries = boundaries
        starts = np.zeros(len(lengths) + 1, dtype=np.int64)
        np.cumsum(lengths, out=starts[1:])
        self._check_offsets(starts, offsets)
        self.sequence_starts = starts
        self.document_starts = starts[boundaries]
        self.tokens_view = self._map_tokens(int(starts[-1]))
        self._identity: str | None = None

    def _check_offsets(self, starts: np.ndarray, offsets: np.ndarray) -> None:
        wrong = np.flatnonzero(starts[:-1] * self.dtype.itemsize != offsets)
        if wrong.size:
            i = int(wrong[0])
            raise DataError(
                f"{idx_path(self.prefix)}: sequence {i} is at byte {int(offsets[i])} of the .bin, expected "
                f"{int(starts[i]) * self.dtype.itemsize}: sequences must follow each other. The index is corrupt; make it again."
            )

    def _map_tokens(self, tokens: int) -> np.ndarray:
        path = bin_path(self.prefix)
        expected = tokens * self.dtype.itemsize
        try:
            actual = path.stat().st_size
        except FileNotFoundError:
            raise DataError(f"{path}: no such file, though its .idx exists; make the data set again") from None
        if actual != expected:
            raise DataError(
                f"{path}: {actual:,} bytes, but its .idx describes {tokens:,} {self.dtype} tokens = {expected:,} bytes; "
                "the pair is truncated or mixed up; make the data set again"
            )
        if tokens == 0:
            return np.empty(0, dtype=self.dtype)
        return np.memmap(path, dtype=self.dtype, mode="r")

    def __getstate__(self) -> dict[str, str]:
        return {"prefix": self.prefix}  # a loader process maps the files itself; nothing large is pickled

    def __setstate__(self, state: dict[str, str]) -> None:
        self.__init__(state["prefix"])  # type: ignore[misc]

    @property
    def num_documents(self) -> int:
        """Number of documents, empty ones included."""
        return len(self.document_boundaries) - 1

    @property
    def num_tokens(self) -> int:
        """Number of tokens in the .bin."""
        return int(self.sequence_starts[-1])

    @property
    def document_lengths(self) -> np.ndarray:
        """Tokens of each document, int64[documents]."""
        return np.diff(self.document_starts)

    @property
    def identity(self) -> str:
        """Hash of the shape of the data (dtype, document and sequence lengths): keys this data set's orders."""
        if self._identity is None:
            digest = hashlib.sha256(str(self.dtype.str).encode())
            digest.update(np.ascontiguousarray(self.sequence_lengths, dtype="<i4").data)
            digest.update(np.ascontiguousarray(self.document_boundaries, dtype="<i8").data)
            self._identity = digest.hexdigest()
        return self._identity

    def document(self, number: int) -> np.ndarray:
        """Tokens of one document, a read-only view of the mapped file. Raises IndexError outside 0..documents-1."""
        if not 0 <= number < self.num_documents:
            raise IndexError(f"document {number} of {self.prefix}: it has {self.num_documents} documents")
        return self.tokens_view[self.document_starts[number] : self.document_starts[number + 1]]

    def sequence(self, number: int) -> np.ndarray:
        """Tokens of one sequence, a read-only view of the mapped file."""
        if not 0 <= number < len(self.sequence_lengths):
            raise IndexError(f"sequence {number} of {self.prefix}: it has {len(self.sequence_lengths)} sequences")
        return self.tokens_view[self.sequence_starts[number] : self.sequence_starts[number + 1]]


def _read_index(path: Path) -> tuple[int, np.ndarray, np.ndarray, np.ndarray]:
    """Parses and validates an .idx: dtype code, lengths int32[N], byte offsets int64[N], boundaries int64[D]."""
    try:
        size = path.stat().st_size
    except FileNotFoundError:
        raise DataError(f"{path}: no such file; make the data set with: python tools/preprocess_data.py") from None
    with open(path, "rb") as file:
        head = file.read(HEADER.size)
    if len(head) < HEADER.size or not head.startswith(MAGIC):
        raise DataError(f"{path}: not a Megatron index (an .idx begins with {MAGIC!r}; this has {head[:9]!r})")
    _, version, code, sequences, boundaries = HEADER.unpack(head)
    if version != VERSION:
        raise DataError(f"{path}: index version {version}; this reads version {VERSION}")
    if code not in INTEGER_CODES:
        known = {c: str(DTYPES[c]) for c in sorted(INTEGER_CODES)}
        raise DataError(f"{path}: dtype code {code} is not a token type; known: {known}")
    expected = HEADER.size + 12 * sequences + 8 * boundaries
    if size != expected:
        raise DataError(
            f"{path}: {size:,} bytes, but its header ({sequences:,} sequences, {boundaries:,} document boundaries) "
            f"describes {expected:,}; it is truncated or corrupt; make the data set again"
        )
    raw = np.fromfile(path, dtype=np.uint8, offset=HEADER.size)
    lengths = raw[: 4 * sequences].copy().view("<i4")
    offsets = raw[4 * sequences : 12 * sequences].copy().view("<i8")
    document_boundaries = raw[12 * sequences :].copy().view("<i8")
    if sequences and int(lengths.min()) < 0:
        raise DataError(f"{path}: a sequence has negative length {int(lengths.min())}; the index is corrupt")
    if (
        boundaries < 1
        or document_boundaries[0] != 0
        or document_boundaries[-1] != sequences
        or bool((np.diff(document_boundaries) < 0).any())
    ):
        raise DataError(f"{path}: document boundaries do not run from 0 to {sequences} in order; the index is corrupt")
    return code, lengths, offsets, document_boundaries
