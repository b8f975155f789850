"""How well a model predicts held-out text: loss, perplexity and bits per byte, beside gzip and xz on the same bytes.

Bits per byte = nats over all tokens, end-of-document tokens among them, / ln 2 / bytes of raw text: the length of an
arithmetic code driven by the model, so models of any tokenizer, gzip and xz are compared on one scale.
"""

from __future__ import annotations

import gzip
import lzma
import math
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import torch

from megatronish.data.indexed.format import IndexedReader
from megatronish.errors import UserError
from megatronish.model.transformer import IGNORED_LABEL, Transformer
from megatronish.ops.cross_entropy import cross_entropy

# The logits of one batch hold at most so many elements, unless a single window has more.
LOGITS_CPU, LOGITS_CUDA = 1 << 24, 1 << 28


@dataclass(frozen=True)
class Window:
    """tokens int64[n] that the model reads; labels int64[n], the token after each, -100 where another window scores it."""

    tokens: np.ndarray
    labels: np.ndarray


@dataclass(frozen=True)
class Score:
    """nats: the sum of -ln p over `tokens` predicted tokens."""

    nats: float
    tokens: int

    @property
    def loss(self) -> float:
        """Nats a token."""
        return self.nats / self.tokens

    @property
    def perplexity(self) -> float:
        """exp(loss); infinity where that is no float."""
        return math.exp(self.loss) if self.loss < 700 else math.inf

    def bits_per_byte(self, text_bytes: int) -> float:
        """Bits a byte of raw text."""
        return self.nats / math.log(2) / text_bytes


def sliding_windows(stream: np.ndarray, seq_length: int, stride: int) -> Iterator[Window]:
    """Cut stream int64[n + 1] into windows so that each of its tokens but the first is scored exactly once.

    Window k ends `stride` tokens behind window k - 1 and reads as many tokens before its end as there are, up to
    `seq_length`: a scored token has seq_length - stride tokens of context or more, where the stream has them.
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
    """The token streams, int64[n], to score: all documents end to end, or one a document with `document_mask`.

    `start_id` comes before the first token of every stream. That of a single stream is the end-of-document token, as in
    training. A model trained with `document_mask` never sees a token before a document's first one: None; an imported one
    may want every document to begin with a token.
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

    first_is_given: the first token of a stream is context and not scored. Otherwise nothing predicts it and it costs
    ln(vocab_size), a uniform code over the tokenizer's ids. progress: called with the number of tokens scored so far.
    Raises UserError when there is nothing to score, for a stride out of range and for a loss that is no number.
    """
    nats, count = 0.0, 0
    device, limit = next(model.parameters()).device, model.config.seq_length
    elements = LOGITS_CUDA if device.type == "cuda" else LOGITS_CPU
    batch_size = max(1, elements // (limit * model.config.vocab_size))

    def windows() -> Iterator[Window]:
        nonlocal nats, count
        for stream in streams:
            if not first_is_given:
                nats, count = nats + math.log(vocab_size), count + 1
            yield from sliding_windows(stream, limit, stride)

    for batch in batched_by_length(windows(), batch_size):
        nats += _batch_nats(model, batch, device)
        count += sum(int((window.labels != IGNORED_LABEL).sum()) for window in batch)
        progress(count)
    if count == 0:
        raise UserError("nothing is held out to evaluate on: the documents hold no token to predict")
    if not math.isfinite(nats):
        raise UserError(
            f"the model's loss is {nats}: its weights are damaged, training diverged, or fp16 overflowed. Use another "
            "checkpoint or --dtype fp32."
        )
    return Score(nats, count)


def batched_by_length(windows: Iterable[Window], batch_size: int) -> Iterator[list[Window]]:
    """Successive windows of equal length, at most `batch_size` together."""
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
    """Bytes that `gzip -9` makes of `text` (without a file name in the header)."""
    return len(gzip.compress(text, compresslevel=9, mtime=0))


def xz_size(text: bytes) -> int:
    """Bytes that `xz -9e` makes of `text`."""
    return len(lzma.compress(text, format=lzma.FORMAT_XZ, check=lzma.CHECK_CRC64, preset=9 | lzma.PRESET_EXTREME))


class ProgressLine:
    """Tells how far a long evaluation is: on a terminal one line rewritten, in a log a line every ten seconds."""

    def __init__(self, total: int, write: Callable[[str], object], live: bool) -> None:
        self._total, self._write, self._live = total, write, live
        self._start = self._last = time.monotonic()

    def __call__(self, done: int) -> None:
        """`done` of the total tokens are scored."""
        now = time.monotonic()
        if now - self._last < (0.2 if self._live else 10.0):
            return
        self._last = now
        share = min(1.0, done / self._total)
        left = (now - self._start) * (1 / share - 1)
        line = f"evaluating: {done:,} of {self._total:,} tokens, {share:.0%}, {left:.0f} s left"
        self._write(f"\r\x1b[K{line}" if self._live else f"{line}\n")

    def close(self) -> None:
        """Clear the live line."""
        if self._live:
            self._write("\r\x1b[K")
