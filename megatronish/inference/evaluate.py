"""Evaluation on held-out text: loss, perplexity and bits per byte, compared with gzip and xz on the same bytes.

Bits per byte = nats over all tokens (including end-of-document tokens) / ln 2 / bytes of raw text: the length of an
arithmetic code with the model's probabilities, which compares models with any tokenizer, gzip and xz.
"""

from __future__ import annotations

import gzip
import lzma
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import torch

from megatronish.data.indexed.format import IndexedReader
from megatronish.errors import UserError
from megatronish.model.transformer import IGNORED_LABEL, Transformer
from megatronish.ops.cross_entropy import cross_entropy

MAX_LOGITS = {"cpu": 1 << 24, "cuda": 1 << 28}  # elements of the logits of one batch, if it has several windows


@dataclass(frozen=True)
class Window:
    """tokens: int64[n]; labels: int64[n], the next tokens, IGNORED_LABEL for those that another window scores."""

    tokens: np.ndarray
    labels: np.ndarray


@dataclass(frozen=True)
class Score:
    """nats: the sum of -ln p over `tokens` predicted tokens."""

    nats: float
    tokens: int

    @property
    def loss(self) -> float:
        """Nats per token."""
        return self.nats / self.tokens

    @property
    def perplexity(self) -> float:
        """exp(loss); infinity on overflow."""
        return math.exp(self.loss) if self.loss < 700 else math.inf

    def bits_per_byte(self, text_bytes: int) -> float:
        """Bits per byte of raw text."""
        return self.nats / math.log(2) / text_bytes


def sliding_windows(stream: np.ndarray, seq_length: int, stride: int) -> Iterator[Window]:
    """Split stream int64[n + 1] into windows that score each token except the first exactly once.

    Window k ends `stride` tokens after window k - 1 and has up to `seq_length` tokens: a scored token has at least
    seq_length - stride tokens of context, if the stream has them.
    Raises UserError unless 1 <= stride <= seq_length.
    """
    if not 1 <= stride <= seq_length:
        raise UserError(f"stride {stride} must be at least 1 and at most the model's context of {seq_length} tokens")
    total, scored = len(stream) - 1, 0
    while scored < total:
        end = min(total, scored + (stride if scored else seq_length))
        start = max(0, end - seq_length)
        labels = stream[start + 1 : end + 1].copy()
        labels[: scored - start] = IGNORED_LABEL
        yield Window(stream[start:end], labels)
        scored = end


def held_out_streams(
    reader: IndexedReader, document_ids: np.ndarray, start_id: int | None, document_mask: bool
) -> Iterator[np.ndarray]:
    """The token streams, int64[n], to score: the concatenated documents, or each document with `document_mask`.

    `start_id` precedes every stream: the end-of-document token for a single stream, as in training; None for a model
    trained with `document_mask`, which never sees a token before a document; the BOS token of an imported model.
    """
    documents = [reader.document(int(number)).astype(np.int64) for number in document_ids]
    documents = [document for document in documents if len(document)]
    lead = [] if start_id is None else [np.array([start_id], dtype=np.int64)]
    if document_mask:
        yield from (np.concatenate([*lead, document]) for document in documents)
    elif documents:
        yield np.concatenate(lead + documents)


def score_streams(
    model: Transformer,
    streams: Iterable[np.ndarray],
    stride: int,
    *,
    first_is_given: bool,
    vocab_size: int,
    progress: Callable[[int], None] = lambda tokens: None,
) -> Score:
    """Score every token of every stream, in windows of model.config.seq_length tokens.

    first_is_given: the first token of a stream is context and not scored. Otherwise it costs ln(vocab_size), a uniform
    code over the tokenizer's ids. progress: called with the number of tokens of each batch. Raises UserError if there is
    nothing to score, for a stride out of range, and for a non-finite loss.
    """
    nats, count = 0.0, 0
    device, limit = next(model.parameters()).device, model.config.seq_length
    batch_size = max(1, MAX_LOGITS[device.type] // (limit * model.config.vocab_size))

    def windows() -> Iterator[Window]:
        nonlocal nats, count
        for stream in streams:
            if not first_is_given:
                nats, count = nats + math.log(vocab_size), count + 1
            yield from sliding_windows(stream, limit, stride)

    for batch in batched_by_length(windows(), batch_size):
        nats += _batch_nats(model, batch, device)
        scored = sum(int((window.labels != IGNORED_LABEL).sum()) for window in batch)
        count += scored
        progress(scored)
    if count == 0:
        raise UserError("nothing is held out to evaluate on: the documents have no token to predict")
    if not math.isfinite(nats):
        raise UserError(
            f"the model's loss is {nats}: its weights are damaged, training diverged, or fp16 overflowed. Use another "
            "checkpoint or --dtype fp32."
        )
    return Score(nats, count)


def batched_by_length(windows: Iterable[Window], batch_size: int) -> Iterator[list[Window]]:
    """Batches of at most `batch_size` successive windows of equal length."""
    batch: list[Window] = []
    for window in windows:
        if batch and (len(batch) == batch_size or len(batch[0].tokens) != len(window.tokens)):
            yield batch
            batch = []
        batch.append(window)
    if batch:
        yield batch


@torch.inference_mode()
def _batch_nats(model: Transformer, batch: list[Window], device: torch.device) -> float:
    tokens = torch.from_numpy(np.stack([window.tokens for window in batch])).to(device)
    labels = torch.from_numpy(np.stack([window.labels for window in batch])).to(device)
    return cross_entropy(model(tokens), labels, IGNORED_LABEL).item()


def gzip_size(text: bytes) -> int:
    """Size of `text` compressed by `gzip -9`, without a file name in the header."""
    return len(gzip.compress(text, compresslevel=9, mtime=0))


def xz_size(text: bytes) -> int:
    """Size of `text` compressed by `xz -9e`."""
    return len(lzma.compress(text, format=lzma.FORMAT_XZ, check=lzma.CHECK_CRC64, preset=9 | lzma.PRESET_EXTREME))
