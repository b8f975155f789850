"""Batches of packed samples by csrc/data: one call from the mapped tokens to the arrays of the batch.

Where the library is not built, or the tokens are not integers of MMIDIDX, batches.py makes the same arrays with numpy.
"""

from __future__ import annotations

import ctypes
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from megatronish.data.indexed.format import INTEGER_CODES, dtype_code

LIBRARY = Path(__file__).resolve().parents[2] / "_data.so"
# Document bounds for which a batch makes room at first: twice the average, and some.
MORE_BOUNDS = 64


class _Stream(ctypes.Structure):
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
    """The library's function, loaded when first asked for; None where it is not built."""
    try:
        function = ctypes.CDLL(str(LIBRARY)).megatronish_packed_batch
    except (OSError, AttributeError):
        return None
    pointer, number = ctypes.c_void_p, ctypes.c_int64
    function.argtypes = [pointer, pointer, number, number, pointer, pointer, pointer, pointer, number]
    function.restype = number
    return function


class NativeStream:
    """A token stream (packing.TokenStream) as the library sees it. Arrays: contiguous int64, and the mapped tokens."""

    def __init__(self, tokens: np.ndarray, stream_starts: np.ndarray, source_starts: np.ndarray) -> None:
        self._fill = packed_batch()
        self._kept = (tokens, stream_starts, source_starts)
        addresses = (array.ctypes.data for array in self._kept)
        self._stream = _Stream(*addresses, len(source_starts), dtype_code(tokens.dtype))
        self._address = ctypes.addressof(self._stream)
        self._density = 2 * len(source_starts) / max(1, int(stream_starts[-1]))

    def batch(self, begins: list[int], length: int, document_mask: bool) -> dict[str, Any]:
        """`batch_of` (batches.py) of the windows of length + 1 tokens from each of `begins`.

        Raises IndexError for a window that is not within the stream.
        """
        count, size = len(begins), len(begins) * length
        places = (ctypes.c_int64 * count)(*begins)
        both = np.empty((2, count, length), np.int64)
        tokens = _address(both)
        wanted = [self._address, places, count, length, tokens, tokens + 8 * size]
        batch: dict[str, Any] = {"tokens": both[0], "labels": both[1]}
        if not document_mask:
            if self._fill(*wanted, None, None, 0) < 0:
                raise self._outside(begins, length)
            return batch
        room = int(size * self._density) + MORE_BOUNDS
        while True:
            flat = np.empty(size + room + 1, np.int32)
            positions = _address(flat)
            bounds = self._fill(*wanted, positions, positions + 4 * size, room)
            if bounds < 0:
                raise self._outside(begins, length)
            if bounds <= room:
                break
            room = bounds
        batch["positions"] = flat[:size].reshape(count, length)
        batch["cu_seqlens"] = flat[size : size + bounds]
        batch["max_seqlen"] = flat.item(size + room)
        return batch

    def _outside(self, begins: list[int], length: int) -> IndexError:
        return IndexError(f"windows of {length + 1} tokens from {begins}: not all within the stream")


def _address(array: np.ndarray) -> int:
    """Where a new array lies; `array.ctypes.data` takes three times as long."""
    return ctypes.addressof(ctypes.c_char.from_buffer(array))  # type: ignore[arg-type]  # it is a writable buffer


def native_stream(tokens: np.ndarray, stream_starts: np.ndarray, source_starts: np.ndarray) -> NativeStream | None:
    """The stream for the library, or None where it cannot read it."""
    if packed_batch() is None or len(tokens) == 0 or dtype_code(tokens.dtype) not in INTEGER_CODES:
        return None
    return NativeStream(tokens, stream_starts, source_starts)
