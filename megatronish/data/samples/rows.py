"""Samples as rows of one array, and the batch that training takes of them.

A sample is n inputs and one more token for the last label, with the offsets in 0..n at which a document begins. The first
offset is always 0, even inside a document; offset n means that the last label begins a document. Packed samples have
n = seq_length; unpacked ones hold one document and are padded.

A batch is a dict (b micro batch size, s sequence length) of
    tokens      int64 [b, s]
    labels      int64 [b, s], the next token, or -100 where there is none to learn
and with `document_mask` also
    positions   int32 [b, s], restarting in each document
    cu_seqlens  int32 [n + 1], where the n documents (or parts) begin in the b*s flattened tokens, then b*s
    max_seqlen  int, the longest of them
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

IGNORED_LABEL = -100
# Pieces of documents shorter than this on average are gathered token by token, longer ones copied one by one.
GATHERED_TOKENS = 24
Sample = tuple[np.ndarray, np.ndarray]  # tokens int[n + 1], offsets int64[k] at which documents begin


@dataclass(slots=True)
class SampleRows:
    """Samples as the rows of one array.

    tokens: integers [b, n + 1]. document_starts: int64[k], increasing: where documents begin, as offsets into the flattened
    tokens; each row's first token is among them. valid_lengths: int64[b], how many tokens of each row are real, the rest
    being padding; None where all are.
    """

    tokens: np.ndarray
    document_starts: np.ndarray
    valid_lengths: np.ndarray | None = None

    @classmethod
    def of(cls, samples: Sequence[Sample]) -> SampleRows:
        """Rows of samples of equal length."""
        tokens = np.stack([tokens for tokens, _ in samples])
        width = tokens.shape[1]
        return cls(tokens, np.concatenate([starts + row * width for row, (_, starts) in enumerate(samples)]))

    @classmethod
    def merged(cls, parts: Sequence[SampleRows], indices: Sequence[np.ndarray]) -> SampleRows:
        """Rows of several parts: row i of part p becomes row indices[p][i]. Shorter rows are padded with token 0."""
        width = max(part.tokens.shape[1] for part in parts)
        count = sum(len(part.tokens) for part in parts)
        tokens = np.zeros((count, width), dtype=np.result_type(*(part.tokens.dtype for part in parts)))
        valid = np.empty(count, dtype=np.int64)
        starts = []
        for part, rows in zip(parts, indices, strict=True):
            own = part.tokens.shape[1]
            tokens[rows, :own] = part.tokens
            valid[rows] = own if part.valid_lengths is None else part.valid_lengths
            row, offset = np.divmod(part.document_starts, own)
            starts.append(rows[row] * width + offset)
        return cls(tokens, np.sort(np.concatenate(starts)), None if (valid == width).all() else valid)

    def padded(self, width: int) -> SampleRows:
        """The same rows padded with token 0 to `width` tokens each."""
        count, own = self.tokens.shape
        if width == own:
            return self
        row, offset = np.divmod(self.document_starts, own)
        valid = np.full(count, own, dtype=np.int64) if self.valid_lengths is None else self.valid_lengths
        tokens = np.zeros((count, width), dtype=self.tokens.dtype)
        tokens[:, :own] = self.tokens
        return SampleRows(tokens, row * width + offset, valid)

    def sample(self, row: int) -> Sample:
        """One row: its tokens, and its document starts relative to its own first token."""
        width = self.tokens.shape[1]
        first, last = np.searchsorted(self.document_starts, (row * width, (row + 1) * width))
        return self.tokens[row], self.document_starts[first:last] - row * width

    def batch(self, document_mask: bool) -> dict[str, Any]:
        """The arrays of a batch of these rows (see the module), newly allocated.

        With `document_mask` the first token of a document is not a label. Padding is never a label.
        """
        length = self.tokens.shape[1] - 1
        labels = self.tokens[:, 1:].astype(np.int64)
        batch: dict[str, Any] = {"tokens": self.tokens[:, :-1].astype(np.int64), "labels": labels}
        if document_mask:
            batch |= _documents(self.document_starts, labels)
        if self.valid_lengths is not None:
            labels[np.arange(length) >= (self.valid_lengths - 1)[:, None]] = IGNORED_LABEL
        return batch


def _documents(starts: np.ndarray, labels: np.ndarray) -> dict[str, Any]:
    """Positions and bounds of documents; masks their first tokens in the labels. starts: SampleRows.document_starts."""
    count, length = labels.shape
    row, offset = np.divmod(starts, length + 1)
    flat = starts - row  # the rows lose their last token
    labels.reshape(-1)[flat[offset > 0] - 1] = IGNORED_LABEL
    inside = flat[offset < length]
    bounds = np.empty(len(inside) + 1, dtype=np.int32)
    bounds[:-1], bounds[-1] = inside, count * length
    lengths = bounds[1:] - bounds[:-1]
    positions = positions_in_documents(lengths).reshape(count, length)
    return {"positions": positions, "cu_seqlens": bounds, "max_seqlen": int(lengths.max())}


def positions_in_documents(lengths: np.ndarray) -> np.ndarray:
    """0, 1, 2, ... for each of the documents of these lengths, concatenated, int32[sum of lengths]."""
    longest = np.arange(int(lengths.max(initial=0)), dtype=np.int32)
    return join_pieces(longest, np.zeros(len(lengths), dtype=np.int64), lengths)


def join_pieces(tokens: np.ndarray, begins: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """Concatenation of tokens[begins[i] : begins[i] + lengths[i]] over i, in a new array."""
    total = int(lengths.sum())
    if total < len(lengths) * GATHERED_TOKENS:
        indices = np.repeat(begins - (np.cumsum(lengths) - lengths), lengths)
        indices += np.arange(total)
        return tokens.take(indices)
    view = tokens.data
    ends = (begins + lengths).tolist()
    joined = bytearray().join([view[begin:end] for begin, end in zip(begins.tolist(), ends, strict=True)])
    return np.frombuffer(joined, dtype=tokens.dtype)
