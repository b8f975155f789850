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
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from megatronish.errors import DataError

if TYPE_CHECKING:
    import numpy.typing as npt

MAGIC = b"MMIDIDX\x00\x00"
VERSION = 1
HEADER = struct.Struct("<9sQBQQ")
DTYPES: dict[int, np.dtype[Any]] = {
    code: np.dtype(name)
    for code, name in {1: "u1", 2: "i1", 3: "<i2", 4: "<i4", 5: "<i8", 6: "<f8", 7: "<f4", 8: "<u2"}.items()
}
INTEGER_CODES = frozenset({1, 2, 3, 4, 5, 8})
MAX_SEQUENCE_TOKENS = 2**31 - 1
# Offsets are compared in pieces that stay in the cache.
CHECKED_AT_ONCE = 1 << 18
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

    unit: what counts as a document; "sequence" takes each sequence for one, as megatron-core's GPTDataset does.
    Attributes: `dtype`, `sequence_lengths` int32[N], `document_starts` int64[documents + 1] in tokens (so document d
    is tokens [document_starts[d], document_starts[d + 1])), `tokens_view` dtype[tokens].
    Raises DataError, naming the file, if a file is missing, truncated, of another version or inconsistent.
    """

    def __init__(self, prefix: str | os.PathLike[str], unit: Literal["document", "sequence"] = "document") -> None:
        self.prefix = os.fspath(prefix)
        self.unit = unit
        code, lengths, boundaries = _read_index(idx_path(prefix))
        self.dtype = DTYPES[code]
        self.sequence_lengths = lengths
        starts = np.zeros(len(lengths) + 1, dtype=np.int64)
        np.cumsum(lengths, out=starts[1:])
        self._check_offsets(starts)
        self.sequence_starts = starts
        if unit == "sequence":
            boundaries = np.arange(len(starts), dtype=np.int64)
        self.document_boundaries = boundaries
        one_each = len(boundaries) == len(starts) and bool((boundaries[1:] > boundaries[:-1]).all())
        self.document_starts = starts if one_each else starts[boundaries]
        self.tokens_view = self._map_tokens(int(starts[-1]))
        self._identity: str | None = None

    def _check_offsets(self, starts: np.ndarray) -> None:
        path, count = idx_path(self.prefix), len(starts) - 1
        with open(path, "rb") as file:
            file.seek(HEADER.size + 4 * count)
            for begin in range(0, count, CHECKED_AT_ONCE):
                expected = starts[begin : min(begin + CHECKED_AT_ONCE, count)] * self.dtype.itemsize
                found = np.fromfile(file, dtype="<i8", count=len(expected))
                if not np.array_equal(found, expected):
                    i = int(np.flatnonzero(found != expected)[0])
                    raise DataError(
                        f"{path}: sequence {begin + i} is at byte {int(found[i])} of the .bin, expected "
                        f"{int(expected[i])}: sequences must follow each other. The index is corrupt; make it again."
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
        # A plain array over the map: each slice of a memmap object costs a microsecond more.
        return np.asarray(np.memmap(path, dtype=self.dtype, mode="r"))

    def __getstate__(self) -> dict[str, Any]:
        return {"prefix": self.prefix, "unit": self.unit}  # a spawned loader process maps the files itself

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["prefix"], state["unit"])  # type: ignore[misc]

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


def _read_index(path: Path) -> tuple[int, np.ndarray, np.ndarray]:
    """Parses and validates an .idx but for its byte offsets: dtype code, lengths int32[N], boundaries int64[D]."""
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
        other = ", or a multimodal data set's (a mode for each sequence), which this does not read"
        raise DataError(
            f"{path}: {size:,} bytes, but its header ({sequences:,} sequences, {boundaries:,} document boundaries) "
            f"describes {expected:,}; it is truncated or corrupt{other if size == expected + sequences else ''}; make the data set again"
        )
    lengths = np.fromfile(path, dtype="<i4", count=sequences, offset=HEADER.size)
    document_boundaries = np.fromfile(path, dtype="<i8", count=boundaries, offset=HEADER.size + 12 * sequences)
    if sequences and int(lengths.min()) < 0:
        raise DataError(f"{path}: a sequence has negative length {int(lengths.min())}; the index is corrupt")
    if (
        boundaries < 1
        or document_boundaries[0] != 0
        or document_boundaries[-1] != sequences
        or bool((document_boundaries[1:] < document_boundaries[:-1]).any())
    ):
        raise DataError(f"{path}: document boundaries do not run from 0 to {sequences} in order; the index is corrupt")
    return code, lengths, document_boundaries
