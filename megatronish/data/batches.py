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

from megatronish.data.packing import join_pieces
from megatronish.data.samples import Rows

IGNORED_LABEL = -100


def batch_of(rows: Rows, document_mask: bool) -> dict[str, Any]:
    """The arrays of a batch of rows [b, s + 1], freshly allocated.

    With `document_mask` a document's first token is no label. Padding is no label either way.
    """
    count, width = rows.tokens.shape
    length = width - 1
    batch: dict[str, Any] = {
        "tokens": rows.tokens[:, :-1].astype(np.int64),
        "labels": rows.tokens[:, 1:].astype(np.int64),
    }
    if document_mask:
        row, offset = np.divmod(rows.starts, width)
        flat = rows.starts - row  # the rows lose their last token
        batch["labels"].reshape(-1)[flat[offset > 0] - 1] = IGNORED_LABEL
        starts = flat[offset < length]
        bounds = np.empty(len(starts) + 1, dtype=np.int32)
        bounds[:-1], bounds[-1] = starts, count * length
        lengths = bounds[1:] - bounds[:-1]
        batch["positions"] = positions_in_documents(lengths).reshape(count, length)
        batch["cu_seqlens"] = bounds
        batch["max_seqlen"] = int(lengths.max())
    if rows.known is not None:
        batch["labels"][np.arange(length) >= (rows.known - 1)[:, None]] = IGNORED_LABEL
    return batch


def positions_in_documents(lengths: np.ndarray) -> np.ndarray:
    """0, 1, 2, ... for each of the documents of these lengths, one after another, int32[sum of lengths]."""
    longest = np.arange(int(lengths.max(initial=0)), dtype=np.int32)
    return join_pieces(longest, np.zeros(len(lengths), dtype=np.int64), lengths)
