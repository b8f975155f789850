"""Fixed-length samples packed from documents, in an order that is a pure function of (seed, epoch, data set).

An epoch concatenates its documents in permuted order into a stream of T tokens and cuts sample k as tokens
[k*s, k*s + s], s inputs and one more for the last label, so each of the first (T-1)//s * s tokens is an input once.
The samples of an epoch are permuted too. Sample n of a run is sample n % E of epoch n // E (E samples per epoch):
nothing depends on how long the run is, how it is split, or what came before.
"""

from __future__ import annotations

import hashlib
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import numpy as np

from megatronish.data.indexed.format import IndexedReader
from megatronish.data.samples.permutation import keyed_permutation
from megatronish.data.samples.rows import SampleRows
from megatronish.data.samples.source import RecentValues, SampleSource
from megatronish.data.samples.token_stream import TokenStream
from megatronish.errors import DataError

if TYPE_CHECKING:
    import numpy.typing as npt

# Near the end of an epoch, processes that prefetch read the next one while others still need the last.
KEPT_EPOCHS = 2


class PackedDataset(SampleSource):
    """Samples of `seq_length` + 1 tokens from the given documents.

    reader: the data set; document_ids: int64[k], those of a split; seq_length: s; seed: with the data set's identity it
    fixes every order. Raises DataError if the documents hold fewer than s + 1 tokens.
    """

    def __init__(self, reader: IndexedReader, document_ids: npt.ArrayLike, seq_length: int, seed: int) -> None:
        documents = np.asarray(document_ids, dtype=np.int64)
        if seq_length < 1:
            raise ValueError(f"sequence length {seq_length} must be at least 1")
        self.reader = reader
        self.name = reader.prefix
        self.seq_length = seq_length
        self.seed = seed
        self._documents = DocumentTable(reader, documents)
        self.tokens_per_epoch = self._documents.tokens
        self.samples_per_epoch = samples_in(self.tokens_per_epoch, seq_length, len(documents), reader)
        self._epochs: RecentValues[tuple[TokenStream, np.ndarray]] = RecentValues(KEPT_EPOCHS)

    @property
    def identity(self) -> str:
        """Hash of what the samples depend on: the shape of the data set, the split, sequence length and seed."""
        return self._documents.identity("packed", self.seq_length, self.seed)

    def _epoch(self, epoch: int) -> tuple[TokenStream, np.ndarray]:
        """The token stream of an epoch and the order of its samples."""
        key = (self.seed, epoch, self.reader.identity)
        return (
            self._documents.permuted(keyed_permutation(len(self._documents), "documents", *key)),
            keyed_permutation(self.samples_per_epoch, "samples", self.seq_length, *key),
        )

    def _windows(self, numbers: np.ndarray) -> tuple[TokenStream, list[int]] | None:
        """The stream of which samples are windows, and where they begin in it; None for samples of several epochs."""
        if len(numbers) == 1:
            least = most = int(numbers[0])
        else:
            least, most = int(numbers.min()), int(numbers.max())
        if least < 0:
            raise ValueError(f"sample number {least} must not be negative")
        epoch, first = divmod(least, self.samples_per_epoch)
        if first + most - least >= self.samples_per_epoch:
            return None
        stream, order = self._epochs.get_or(epoch, self._epoch)
        if len(numbers) == 1:
            return stream, [order.item(first) * self.seq_length]
        return stream, (order[numbers - epoch * self.samples_per_epoch] * self.seq_length).tolist()

    def batch(self, numbers: np.ndarray, document_mask: bool) -> dict[str, Any]:
        """See SampleSource."""
        found = self._windows(numbers)
        if found is None:
            return super().batch(numbers, document_mask)
        stream, begins = found
        return stream.batch(begins, self.seq_length, document_mask)

    def rows(self, numbers: np.ndarray) -> SampleRows:
        """See SampleSource; tokens are of the data set's dtype."""
        found = self._windows(numbers)
        if found is None:
            return SampleRows.of([self.sample(number) for number in numbers.tolist()])
        stream, begins = found
        return stream.rows(begins, self.seq_length + 1)

    def documents(self, number: int) -> tuple[str, list[int] | None]:
        """See SampleSource."""
        found = self._windows(np.array([number]))
        assert found is not None
        stream, (begin,) = found
        return self.name, documents_at(self.reader, stream.sources(begin, self.seq_length + 1))


class DocumentTable:
    """Starts and lengths of the documents of a split. Empty ones are left out, unless `keep_empty`."""

    def __init__(self, reader: IndexedReader, document_ids: np.ndarray, keep_empty: bool = False) -> None:
        one_each = reader.document_starts is reader.sequence_starts
        lengths = reader.sequence_lengths if one_each else reader.document_lengths
        everything = len(document_ids) == len(lengths) and bool((document_ids[1:] > document_ids[:-1]).all())
        lengths = lengths if everything else lengths[document_ids]
        starts = reader.document_starts[:-1] if everything else reader.document_starts[document_ids]
        filled = lengths > 0
        self._has_empty = keep_empty and not filled.all()
        if not (keep_empty or filled.all()):
            document_ids, lengths, starts = document_ids[filled], lengths[filled], starts[filled]
        self.reader = reader
        self.document_ids = document_ids
        self.lengths = lengths
        self.starts = starts
        self.tokens = int(lengths.sum(dtype=np.int64))

    def __len__(self) -> int:
        return len(self.lengths)

    def permuted(self, order: np.ndarray) -> TokenStream:
        """The documents laid end to end in this order of their indices in the table."""
        with ThreadPoolExecutor(1) as other:  # random reads of memory: two threads overlap their waiting
            begun = other.submit(self.starts.take, order)
            lengths = self.lengths.take(order)
            starts = begun.result()
        if self._has_empty:  # they count in the order and have no tokens
            starts, lengths = starts[lengths > 0], lengths[lengths > 0]
        return TokenStream(self.reader, starts, lengths)

    def identity(self, *settings: int | str) -> str:
        """Hash of the documents' shape and numbers and of the settings."""
        digest = hashlib.sha256(repr((self.reader.identity, *settings)).encode("utf-8"))
        digest.update(np.ascontiguousarray(self.document_ids, dtype="<i8").data)
        return digest.hexdigest()


def samples_in(tokens: int, seq_length: int, documents: int, reader: IndexedReader) -> int:
    """Packed samples in the tokens of a split. Raises DataError if there is none."""
    if tokens <= seq_length:
        raise DataError(
            f"{reader.prefix}: the {documents:,} training {reader.unit}s hold {tokens:,} tokens, but one sample of sequence "
            f"length {seq_length:,} needs {seq_length + 1:,}; shorten the sequence or prepare more text"
        )
    return (tokens - 1) // seq_length


def documents_at(reader: IndexedReader, starts: np.ndarray) -> list[int]:
    """The documents that begin at these of the reader's tokens; of several at one token, the one that is not empty."""
    found = np.searchsorted(reader.document_starts, starts, side="right") - 1
    return [int(document) for document in found]
