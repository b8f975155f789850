"""Documents laid end to end, and the windows of them that become samples.

`TokenStream.batch` is one call of csrc/data from the mapped tokens to the arrays of a batch. Where the library is not built,
or the tokens are not integers of MMIDIDX, numpy makes the same arrays.
"""

from __future__ import annotations

import ctypes
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from megatronish.data.indexed.format import INTEGER_CODES, IndexedReader, dtype_code
from megatronish.data.samples.rows import SampleRows, join_pieces

LIBRARY = Path(__file__).resolve().parents[2] / "_data.so"
# Room that a batch has at first for document bounds: twice the average, and this many more.
EXTRA_BOUNDS = 64


class _NativeStream(ctypes.Structure):
    """`Stream` of csrc/data/packed_batch.cpp."""

    _fields_ = [
        ("tokens", ctypes.c_void_p),
        ("stream_starts", ctypes.c_void_p),
        ("source_starts", ctypes.c_void_p),
        ("documents", ctypes.c_int64),
        ("token_kind", ctypes.c_int64),
    ]


@cache
def packed_batch() -> Any:
    """The library's function, loaded at its first use; None where it is not built."""
    try:
        function = ctypes.CDLL(str(LIBRARY)).megatronish_packed_batch
    except (OSError, AttributeError):
        return None
    pointer, number = ctypes.c_void_p, ctypes.c_int64
    function.argtypes = [pointer, pointer, number, number, pointer, pointer, pointer, pointer, number]
    function.restype = number
    return function


class TokenStream:
    """Documents laid end to end. `stream_starts` int64[documents + 1]: where they begin, in tokens.

    reader: of the mapped tokens. source_starts, lengths: int64[documents], of each document in the reader's tokens.
    """

    def __init__(self, reader: IndexedReader, source_starts: np.ndarray, lengths: np.ndarray) -> None:
        self._tokens = reader.tokens_view
        self._source_starts = source_starts
        self.stream_starts = np.zeros(len(lengths) + 1, dtype=np.int64)
        np.cumsum(lengths, out=self.stream_starts[1:])
        self._fill = packed_batch()
        if len(self._tokens) == 0 or dtype_code(self._tokens.dtype) not in INTEGER_CODES:
            self._fill = None
        arrays = (self._tokens, self.stream_starts, self._source_starts)
        addresses = (array.ctypes.data for array in arrays)
        self._native = _NativeStream(*addresses, len(source_starts), dtype_code(self._tokens.dtype))
        self._bounds_per_token = 2 * len(source_starts) / max(1, int(self.stream_starts[-1]))

    @classmethod
    def of(cls, reader: IndexedReader, document_ids: np.ndarray) -> TokenStream:
        """The documents of these numbers in this order."""
        starts = reader.document_starts[document_ids]
        return cls(reader, starts, reader.document_starts[document_ids + 1] - starts)

    def batch(self, begins: list[int], length: int, document_mask: bool) -> dict[str, Any]:
        """The batch (rows.py) of the windows of length + 1 tokens from each of `begins`.

        Raises IndexError for a window that is not within the stream.
        """
        if self._fill is None:
            return self.rows(begins, length + 1).batch(document_mask)
        count, size = len(begins), len(begins) * length
        both = np.empty((2, count, length), np.int64)
        batch: dict[str, Any] = {"tokens": both[0], "labels": both[1]}
        tokens = _address(both)
        arguments = [
            ctypes.addressof(self._native),
            (ctypes.c_int64 * count)(*begins),
            count,
            length,
            tokens,
            tokens + 8 * size,
        ]
        if not document_mask:
            if self._fill(*arguments, None, None, 0) < 0:
                raise _outside(begins, length)
            return batch
        room = int(size * self._bounds_per_token) + EXTRA_BOUNDS
        while True:
            flat = np.empty(size + room + 1, np.int32)
            positions = _address(flat)
            bounds = self._fill(*arguments, positions, positions + 4 * size, room)
            if bounds < 0:
                raise _outside(begins, length)
            if bounds <= room:
                break
            room = bounds
        batch["positions"] = flat[:size].reshape(count, length)
        batch["cu_seqlens"] = flat[size : size + bounds]
        batch["max_seqlen"] = flat.item(size + room)
        return batch

    def rows(self, positions: list[int], length: int) -> SampleRows:
        """The windows of `length` tokens from each of `positions`, as they are stored."""
        begins = np.array(positions, dtype=np.int64)
        first = np.searchsorted(self.stream_starts, begins, side="right") - 1
        pieces = np.searchsorted(self.stream_starts, begins + length, side="left") - first
        piece_of_row = np.cumsum(pieces) - pieces
        rows = np.arange(len(begins)) * length
        documents = np.repeat(first - piece_of_row, pieces)
        documents += np.arange(len(documents))
        starts = self.stream_starts[documents]
        starts += np.repeat(rows - begins, pieces)
        sources = self._source_starts[documents]
        sources[piece_of_row] += rows - starts[piece_of_row]  # a row begins inside its first document
        starts[piece_of_row] = rows
        lengths = np.empty_like(starts)
        np.subtract(starts[1:], starts[:-1], out=lengths[:-1])
        lengths[-1:] = len(begins) * length - starts[-1:]
        return SampleRows(join_pieces(self._tokens, sources, lengths).reshape(len(begins), length), starts)

    def sources(self, begin: int, length: int) -> np.ndarray:
        """Starts, in the reader's tokens, of the documents of which a window has tokens, int64[documents], in order."""
        first, last = np.searchsorted(self.stream_starts, (begin + 1, begin + length), side="left")
        return self._source_starts[first - 1 : last]


def _outside(begins: list[int], length: int) -> IndexError:
    return IndexError(f"windows of {length + 1} tokens from {begins}: not all within the stream")


def _address(array: np.ndarray) -> int:
    """Address of a new array; `array.ctypes.data` takes three times as long."""
    return ctypes.addressof(ctypes.c_char.from_buffer(array))  # type: ignore[arg-type]  # it is a writable buffer
