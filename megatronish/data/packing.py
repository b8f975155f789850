"""Fixed-length samples packed from documents, in an order that is a pure function of (seed, epoch, data set).

An epoch concatenates its documents in permuted order into a stream of T tokens and cuts sample k as tokens
[k*s, k*s + s], s inputs and one more for the last label, so each of the first (T-1)//s * s tokens is an input once.
The samples of an epoch are permuted too. Sample n of a run is sample n % E of epoch n // E (E samples an epoch):
nothing depends on how long the run is, how it is cut, or what came before.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict

import numpy as np
import numpy.typing as npt

from megatronish.data.errors import DataError
from megatronish.data.indexed import IndexedReader

IGNORED_LABEL = -100
# Around an epoch's end, readers that run ahead still want the last one.
KEPT_EPOCHS = 2
# Up to this many documents a sample, slices are faster than one gather.
FEW_DOCUMENTS = 6


def keyed_permutation(size: int, *key: int | str) -> np.ndarray:
    """Permutation int64[size], a pure function of size and key.

    Sorts random numbers that carry their index in their low bits, so any sorting algorithm gives the same order. The
    numbers are the raw 64-bit stream of Philox (Salmon et al. 2011), which NumPy promises not to change, unlike
    `Generator.permutation`. Two of 10 million entries tie in their upper 40 bits in about 45 cases: no visible bias.
    """
    digest = hashlib.sha256(repr(key).encode("utf-8")).digest()
    generator = np.random.Philox(key=np.frombuffer(digest[:16], dtype="<u8").astype(np.uint64))
    index_bits = np.uint64(max(size - 1, 0).bit_length())
    index_mask = (np.uint64(1) << index_bits) - np.uint64(1)
    tagged = np.asarray(generator.random_raw(size), dtype=np.uint64)
    tagged &= ~index_mask
    tagged |= np.arange(size, dtype=np.uint64)
    tagged.sort()
    tagged &= index_mask
    return tagged.astype(np.int64)


def split_documents(
    num_documents: int, validation_fraction: float, salt: str = "validation"
) -> tuple[np.ndarray, np.ndarray]:
    """Document numbers for training and for validation, each int64 ascending: a pure function of the arguments.

    Validation gets the nearest whole number of documents, but at least one, and leaves at least one, where
    `validation_fraction` > 0 and there are two documents or more. Raises ValueError outside 0 <= fraction < 1.
    """
    if not 0.0 <= validation_fraction < 1.0:
        raise ValueError(f"validation fraction {validation_fraction} must be at least 0 and below 1")
    if validation_fraction == 0.0 or num_documents < 2:
        return np.arange(num_documents, dtype=np.int64), np.empty(0, dtype=np.int64)
    held_out = min(max(1, round(num_documents * validation_fraction)), num_documents - 1)
    order = keyed_permutation(num_documents, "split", salt)
    return np.sort(order[held_out:]), np.sort(order[:held_out])


class TokenStream:
    """Documents laid end to end: reads any window of them. `stream_starts` int64[documents + 1] in tokens."""

    def __init__(self, reader: IndexedReader, document_ids: np.ndarray) -> None:
        self._reader = reader
        self._source_starts = reader.document_starts[document_ids]
        self.stream_starts = np.zeros(len(document_ids) + 1, dtype=np.int64)
        np.cumsum(reader.document_starts[document_ids + 1] - self._source_starts, out=self.stream_starts[1:])

    def window(self, start: int, length: int) -> tuple[np.ndarray, np.ndarray]:
        """Tokens int64[length] from `start`, and where documents begin in it, int64 offsets, the first always 0."""
        first = int(np.searchsorted(self.stream_starts, start, side="right")) - 1
        last = int(np.searchsorted(self.stream_starts, start + length, side="left"))
        edges = self.stream_starts[first : last + 1] - start
        edges[0] = 0
        edges[-1] = length
        sources = self._source_starts[first:last].copy()
        sources[0] += start - self.stream_starts[first]
        if len(sources) <= FEW_DOCUMENTS:
            tokens = np.empty(length, dtype=np.int64)
            view = self._reader.tokens_view
            for source, begin, end in zip(sources.tolist(), edges[:-1].tolist(), edges[1:].tolist(), strict=True):
                tokens[begin:end] = view[source : source + end - begin]
        else:
            places = np.repeat(sources - edges[:-1], np.diff(edges)) + np.arange(length)
            tokens = self._reader.tokens_view[places].astype(np.int64)
        return tokens, edges[:-1]


class PackedDataset:
    """Endless numbered samples of `seq_length` + 1 tokens from the given documents.

    reader: the data set; document_ids: int64[k], those of a split; seq_length: s; seed: with the data set's identity it
    fixes every order. Raises DataError if the documents hold fewer than s + 1 tokens.
    """

    def __init__(self, reader: IndexedReader, document_ids: npt.ArrayLike, seq_length: int, seed: int) -> None:
        documents = np.asarray(document_ids, dtype=np.int64)
        if seq_length < 1:
            raise ValueError(f"sequence length {seq_length} must be at least 1")
        lengths = reader.document_lengths[documents]
        self.reader = reader
        self.document_ids = documents[lengths > 0]
        self.seq_length = seq_length
        self.seed = seed
        self.tokens_per_epoch = int(lengths.sum())
        self.samples_per_epoch = (self.tokens_per_epoch - 1) // seq_length
        if self.samples_per_epoch < 1:
            raise DataError(
                f"{reader.prefix}: the {len(documents):,} training documents hold {self.tokens_per_epoch:,} tokens, but one sample "
                f"of sequence length {seq_length:,} needs {seq_length + 1:,}; shorten the sequence or prepare more text"
            )
        self._epochs: OrderedDict[int, tuple[TokenStream, np.ndarray]] = OrderedDict()

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_epochs": OrderedDict()}  # a loader process computes its own

    def _epoch(self, epoch: int) -> tuple[TokenStream, np.ndarray]:
        known = self._epochs.get(epoch)
        if known is None:
            key = (self.seed, epoch, self.reader.identity)
            order = self.document_ids[keyed_permutation(len(self.document_ids), "documents", *key)]
            known = (
                TokenStream(self.reader, order),
                keyed_permutation(self.samples_per_epoch, "samples", self.seq_length, *key),
            )
            self._epochs[epoch] = known
            while len(self._epochs) > KEPT_EPOCHS:
                self._epochs.popitem(last=False)
        return known

    def sample(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        """Tokens int64[s + 1] of sample `number` (from 0, without end) and the offsets in 0..s at which documents begin.

        The first offset is always 0, even inside a document; offset s says that the last label begins a document.
        """
        if number < 0:
            raise ValueError(f"sample number {number} must not be negative")
        epoch, place = divmod(number, self.samples_per_epoch)
        stream, sample_order = self._epoch(epoch)
        return stream.window(int(sample_order[place]) * self.seq_length, self.seq_length + 1)


def positions_in_documents(document_starts: np.ndarray, length: int) -> np.ndarray:
    """Position of each of `length` tokens within its document, int64[length], given ascending starts (first 0)."""
    starts = document_starts[document_starts < length]
    return np.arange(length, dtype=np.int64) - np.repeat(starts, np.diff(starts, append=length))


def labels_within_documents(tokens: np.ndarray, document_starts: np.ndarray) -> np.ndarray:
    """Next-token labels int64[s] of tokens [s + 1]; -100 where the next token begins another document."""
    labels = tokens[1:].copy()
    labels[document_starts[document_starts > 0] - 1] = IGNORED_LABEL
    return labels
