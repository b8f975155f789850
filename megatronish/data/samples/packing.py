"""Fixed-length samples packed from documents, in an order that is a pure function of (seed, epoch, data set).

An epoch concatenates its documents in permuted order into a stream of T tokens and cuts sample k as tokens
[k*s, k*s + s], s inputs and one more for the last label, so each of the first (T-1)//s * s tokens is an input once.
The samples of an epoch are permuted too. Sample n of a run is sample n % E of epoch n // E (E samples an epoch):
nothing depends on how long the run is, how it is cut, or what came before.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import numpy as np

from megatronish.data.indexed.format import IndexedReader
from megatronish.data.samples.native import native_stream
from megatronish.data.samples.permutation import keyed_permutation
from megatronish.data.samples.sample import Rows, Sample
from megatronish.errors import DataError

if TYPE_CHECKING:
    import numpy.typing as npt

# Around an epoch's end, readers that run ahead still want the last one.
KEPT_EPOCHS = 2
# Pieces of documents shorter than this on average are gathered token by token, longer ones copied one by one.
GATHERED_TOKENS = 24


class TokenStream:
    """Documents laid end to end: reads any windows of them. `stream_starts` int64[documents + 1] in tokens.

    source_starts, lengths: int64[documents], where each document lies in the reader's tokens.
    """

    def __init__(self, reader: IndexedReader, source_starts: np.ndarray, lengths: np.ndarray) -> None:
        self._tokens = reader.tokens_view
        self._source_starts = source_starts
        self.stream_starts = np.zeros(len(lengths) + 1, dtype=np.int64)
        np.cumsum(lengths, out=self.stream_starts[1:])
        self._native = native_stream(self._tokens, self.stream_starts, source_starts)

    @classmethod
    def of(cls, reader: IndexedReader, document_ids: np.ndarray) -> TokenStream:
        """The documents of these numbers in this order."""
        starts = reader.document_starts[document_ids]
        return cls(reader, starts, reader.document_starts[document_ids + 1] - starts)

    def windows(self, begins: list[int], length: int) -> Windows:
        """The `length` tokens from each of `begins`, as they are stored, and where documents begin in them."""
        return Windows(self, begins, length)

    def batch(self, begins: list[int], length: int, document_mask: bool) -> dict[str, Any] | None:
        """`batch_of` of the windows of length + 1 tokens in one call, or None where csrc/data is not built."""
        return None if self._native is None else self._native.batch(begins, length, document_mask)

    def lay_out(self, positions: list[int], length: int) -> Rows:
        """The windows' tokens and document starts in arrays."""
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
        lengths = lengths_between(starts, len(begins) * length)
        return Rows(join_pieces(self._tokens, sources, lengths).reshape(len(begins), length), starts)

    def sources(self, begin: int, length: int) -> np.ndarray:
        """Where the documents of which a window has tokens begin in the reader's tokens, int64[documents], in order."""
        first, last = np.searchsorted(self.stream_starts, (begin + 1, begin + length), side="left")
        return self._source_starts[first - 1 : last]


class Windows(Rows):
    """Rows of a token stream, laid out when they are looked at: `batch_of` goes straight from the stream to its arrays."""

    __slots__ = ("_laid_out", "begins", "length", "stream")

    def __init__(self, stream: TokenStream, begins: list[int], length: int) -> None:
        self.stream, self.begins, self.length, self.known = stream, begins, length, None
        self._laid_out: Rows | None = None

    def batch(self, document_mask: bool) -> dict[str, Any] | None:
        """As TokenStream's."""
        return self.stream.batch(self.begins, self.length - 1, document_mask)

    def _rows(self) -> Rows:
        if self._laid_out is None:
            self._laid_out = self.stream.lay_out(self.begins, self.length)
        return self._laid_out

    @property
    def tokens(self) -> np.ndarray:  # type: ignore[override]  # a field of Rows, made here on demand
        """[b, length], of the data set's dtype."""
        return self._rows().tokens

    @property
    def starts(self) -> np.ndarray:  # type: ignore[override]
        """As in Rows."""
        return self._rows().starts


def documents_at(reader: IndexedReader, starts: np.ndarray) -> list[int]:
    """The documents that begin at these of the reader's tokens; an empty one is passed over for the one behind it."""
    found = np.searchsorted(reader.document_starts, starts, side="right") - 1
    return [int(document) for document in found]


def lengths_between(starts: np.ndarray, end: int) -> np.ndarray:
    """Differences of rising starts, and of `end` to the last (`np.diff(append=)` at a third of its cost)."""
    lengths = np.empty_like(starts)
    np.subtract(starts[1:], starts[:-1], out=lengths[:-1])
    lengths[-1:] = end - starts[-1:]
    return lengths


def join_pieces(tokens: np.ndarray, begins: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """tokens[begins[i] : begins[i] + lengths[i]] of every i, one after another, in a new array."""
    total = int(lengths.sum())
    if total < len(lengths) * GATHERED_TOKENS:
        places = np.repeat(begins - (np.cumsum(lengths) - lengths), lengths)
        places += np.arange(total)
        return tokens.take(places)
    view = tokens.data
    ends = (begins + lengths).tolist()
    joined = bytearray().join([view[begin:end] for begin, end in zip(begins.tolist(), ends, strict=True)])
    return np.frombuffer(joined, dtype=tokens.dtype)


class PackedDataset:
    """Endless numbered samples of `seq_length` + 1 tokens from the given documents (a SampleSource).

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
        self.samples_per_epoch = (self.tokens_per_epoch - 1) // seq_length
        if self.samples_per_epoch < 1:
            raise DataError(
                f"{reader.prefix}: the {len(documents):,} training documents hold {self.tokens_per_epoch:,} tokens, but one sample "
                f"of sequence length {seq_length:,} needs {seq_length + 1:,}; shorten the sequence or prepare more text"
            )
        self._epochs: OrderedDict[int, tuple[TokenStream, np.ndarray]] = OrderedDict()

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_epochs": OrderedDict()}  # a spawned loader process computes its own

    @property
    def identity(self) -> str:
        """Hash of what the samples depend on: the shape of the data set, the split, sequence length and seed."""
        return self._documents.identity("packed", self.seq_length, self.seed)

    def _epoch(self, epoch: int) -> tuple[TokenStream, np.ndarray]:
        known = self._epochs.get(epoch)
        if known is None:
            key = (self.seed, epoch, self.reader.identity)
            known = (
                self._documents.permuted(keyed_permutation(len(self._documents), "documents", *key)),
                keyed_permutation(self.samples_per_epoch, "samples", self.seq_length, *key),
            )
            self._epochs[epoch] = known
            while len(self._epochs) > KEPT_EPOCHS:
                self._epochs.popitem(last=False)
        return known

    def rows(self, numbers: np.ndarray) -> Rows:
        """Samples int64[b] as tokens [b, s + 1] of the data set's dtype; see SampleSource."""
        if len(numbers) == 1:
            least = most = int(numbers[0])
        else:
            least, most = int(numbers.min()), int(numbers.max())
        if least < 0:
            raise ValueError(f"sample number {least} must not be negative")
        epoch, first = divmod(least, self.samples_per_epoch)
        if first + most - least >= self.samples_per_epoch:  # around the end of an epoch
            return Rows.of([self.sample(number) for number in numbers.tolist()])
        stream, sample_order = self._epoch(epoch)
        if len(numbers) == 1:
            begins = [sample_order.item(first) * self.seq_length]
        else:
            begins = (sample_order[numbers - epoch * self.samples_per_epoch] * self.seq_length).tolist()
        return stream.windows(begins, self.seq_length + 1)

    def lengths(self, numbers: np.ndarray) -> np.ndarray:
        """seq_length + 1 for every sample."""
        return np.full(len(numbers), self.seq_length + 1, dtype=np.int64)

    def sample(self, number: int) -> Sample:
        """Tokens int[s + 1] of sample `number` (from 0, without end) and the offsets in 0..s at which documents begin."""
        return self.rows(np.array([number], dtype=np.int64)).sample(0)

    def documents(self, number: int) -> list[int]:
        """The data set's documents of which sample `number` has tokens, in order."""
        epoch, place = divmod(number, self.samples_per_epoch)
        stream, sample_order = self._epoch(epoch)
        begin = int(sample_order[place]) * self.seq_length
        return documents_at(self.reader, stream.sources(begin, self.seq_length + 1))


class DocumentTable:
    """Where the documents of a split lie, for laying them out in any order. Empty ones are left out, unless `keep_empty`."""

    def __init__(self, reader: IndexedReader, document_ids: np.ndarray, keep_empty: bool = False) -> None:
        one_each = reader.document_starts is reader.sequence_starts
        lengths = reader.sequence_lengths if one_each else reader.document_lengths
        whole = len(document_ids) == len(lengths) and bool((document_ids[1:] > document_ids[:-1]).all())
        lengths = lengths if whole else lengths[document_ids]
        starts = reader.document_starts[:-1] if whole else reader.document_starts[document_ids]
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
        """The documents laid end to end in this order of their places in the table."""
        with ThreadPoolExecutor(1) as other:  # random reads of memory: two threads overlap their waiting
            begun = other.submit(self.starts.take, order)
            lengths = self.lengths.take(order)
            starts = begun.result()
        if self._has_empty:  # they count in the order, and lay out nothing
            starts, lengths = starts[lengths > 0], lengths[lengths > 0]
        return TokenStream(self.reader, starts, lengths)

    def identity(self, *settings: int | str) -> str:
        """Hash of the documents' shape and numbers and of the settings."""
        digest = hashlib.sha256(repr((self.reader.identity, *settings)).encode("utf-8"))
        digest.update(np.ascontiguousarray(self.document_ids, dtype="<i8").data)
        return digest.hexdigest()
