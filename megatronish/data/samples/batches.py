"""Rows of samples to the arrays of a batch. The loader makes tensors of them.

Shapes: b micro batch size, s sequence length. A batch is a dict of
    tokens      int64 [b, s]
    labels      int64 [b, s], the next token, or -100 where there is none to learn
and with `document_mask` also
    positions   int32 [b, s], restarting in each document
    cu_seqlens  int32 [n + 1], where the n documents (or parts) begin in the b*s flattened tokens, then b*s
    max_seqlen  int, the longest of them
"""

from __future__ import annotations

from typing import Any

import numpy as np

from megatronish.data.samples.packing import Windows, join_pieces
from megatronish.data.samples.sample import Rows

IGNORED_LABEL = -100


def batch_of(rows: Rows, document_mask: bool) -> dict[str, Any]:
    """The arrays of a batch of rows [b, s + 1], freshly allocated.

    With `document_mask` a document's first token is no label. Padding is no label either way.
    """
    if isinstance(rows, Windows) and (made := rows.batch(document_mask)) is not None:
        return made
    tokens = rows.tokens
    length = tokens.shape[1] - 1
    labels = tokens[:, 1:].astype(np.int64)
    batch: dict[str, Any] = {"tokens": tokens[:, :-1].astype(np.int64), "labels": labels}
    if document_mask:
        batch |= _documents(rows.starts, labels)
    if rows.known is not None:
        labels[np.arange(length) >= (rows.known - 1)[:, None]] = IGNORED_LABEL
    return batch


def _documents(starts: np.ndarray, labels: np.ndarray) -> dict[str, Any]:
    """Positions and bounds of documents; takes their first tokens out of the labels. starts: as in Rows."""
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
    """0, 1, 2, ... for each of the documents of these lengths, one after another, int32[sum of lengths]."""
    longest = np.arange(int(lengths.max(initial=0)), dtype=np.int32)
    return join_pieces(longest, np.zeros(len(lengths), dtype=np.int64), lengths)
