"""The held-out documents as batches, the same at every pass."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt

from megatronish.data.indexed.format import IndexedReader
from megatronish.data.loader import Batch, to_tensors
from megatronish.data.samples.rows import SampleRows
from megatronish.data.samples.token_stream import TokenStream
from megatronish.errors import DataError


class ValidationLoader:
    """The held-out documents in order, each token a label exactly once, the same batches at every pass.

    Documents are laid end to end after one end-of-document token (so that the first token is predicted too; without
    one it is not) and cut into windows that do not overlap. The last is padded with label -100, as are batches that
    give all ranks equal numbers of batches. Window w goes to batch w // (b*dp), rank (w // b) % dp.
    With `document_mask` a document's first token has no label, as in training.

    max_windows: at most this many windows, evenly spread over the text. Raises DataError if there is nothing to
    predict.
    """

    def __init__(
        self,
        reader: IndexedReader,
        document_ids: npt.ArrayLike,
        seq_length: int,
        micro_batch_size: int,
        dp_rank: int = 0,
        dp_size: int = 1,
        *,
        eod_id: int | None = None,
        document_mask: bool = False,
        max_windows: int | None = None,
    ) -> None:
        if not 0 <= dp_rank < dp_size or micro_batch_size < 1 or seq_length < 1:
            raise ValueError(
                f"rank {dp_rank} of {dp_size}, micro batch {micro_batch_size}, sequence length {seq_length}: "
                "sizes must be positive and the rank below its size"
            )
        documents = np.asarray(document_ids, dtype=np.int64)
        documents = documents[reader.document_lengths[documents] > 0]
        self._stream = TokenStream.of(reader, documents)
        self._lead = np.array([] if eod_id is None else [eod_id], dtype=np.int64)
        self._total = int(self._stream.stream_starts[-1]) + len(self._lead)
        if self._total < 2:
            raise DataError(
                f"{reader.prefix}: nothing is held out for validation ({len(documents)} documents); raise the validation fraction, "
                "or prepare the text as more than one document (--doc-separator)"
            )
        windows = -(-(self._total - 1) // seq_length)
        self.window_numbers = np.arange(windows)
        if max_windows is not None and max_windows < windows:
            if max_windows < 1:
                raise ValueError(f"max_windows {max_windows} must be at least 1")
            self.window_numbers = np.arange(max_windows) * windows // max_windows
        self.num_windows = len(self.window_numbers)
        self.seq_length = seq_length
        self.micro_batch_size = micro_batch_size
        self.dp_rank = dp_rank
        self.dp_size = dp_size
        self.document_mask = document_mask

    def __len__(self) -> int:
        """Batches of this (and every) rank in one pass."""
        return -(-self.num_windows // (self.micro_batch_size * self.dp_size))

    def __iter__(self) -> Iterator[Batch]:
        for batch in range(len(self)):
            first = (batch * self.dp_size + self.dp_rank) * self.micro_batch_size
            numbers = self.window_numbers[first : first + self.micro_batch_size].tolist()
            rows = self._rows([*numbers, *[None] * (self.micro_batch_size - len(numbers))])
            yield to_tensors(rows.batch(self.document_mask))

    def _rows(self, numbers: Sequence[int | None]) -> SampleRows:
        """Windows of these numbers, padded to s + 1 tokens; None is padding only."""
        windows = [self._window(number) for number in numbers]
        rows = SampleRows.of([(tokens, starts) for tokens, starts, _ in windows])
        rows.valid_lengths = np.array([length for _, _, length in windows])
        return rows

    def _window(self, number: int | None) -> tuple[np.ndarray, np.ndarray, int]:
        """Tokens int64[s + 1] padded, document starts, and how many tokens are real."""
        if number is None:
            return self._padded(np.empty(0, dtype=np.int64), np.zeros(1, dtype=np.int64))
        begin = number * self.seq_length
        length = min(self.seq_length + 1, self._total - begin)
        lead = self._lead[begin : begin + 1] if begin == 0 else self._lead[:0]
        stored = self._stream.rows([max(begin - len(self._lead), 0)], length - len(lead))
        tokens, starts = stored.sample(0)
        if len(lead):
            starts = np.concatenate(([0], starts[1:] + 1))  # the leading token counts to the first document
        return self._padded(np.concatenate((lead, tokens.astype(np.int64))), starts)

    def _padded(self, tokens: np.ndarray, starts: np.ndarray) -> tuple[np.ndarray, np.ndarray, int]:
        missing = self.seq_length + 1 - len(tokens)
        fill = int(self._lead[0]) if len(self._lead) else 0
        if missing and len(tokens):
            starts = np.concatenate((starts, [len(tokens)]))  # padding is a document of its own: nothing attends to it
        return np.concatenate((tokens, np.full(missing, fill, dtype=np.int64))), starts, len(tokens)
