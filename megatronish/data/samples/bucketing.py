"""Unpacked samples: a document each, those of like length together, so that little is padding.

Documents come in permuted order, keyed by (seed, epoch, data set) as in packing.py. Then windows of consecutive samples are
sorted by length and cut into groups of a global batch, and the groups of a window are permuted: all micro batches of an
optimizer step hold samples of nearly one length, whatever the ranks and the micro batch size. (Sorting within windows is
also known as bucketing or smart batching; fairseq and Hugging Face's `group_by_length` do alike.)
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict

import numpy as np
import numpy.typing as npt

from megatronish.data.indexed.format import IndexedReader
from megatronish.data.samples.packing import KEPT_EPOCHS, DocumentTable, documents_at, join_pieces
from megatronish.data.samples.permutation import keyed_permutation
from megatronish.data.samples.sample import Rows, SampleSource
from megatronish.errors import DataError

GROUPS_A_WINDOW = 32
KEPT_WINDOWS = 2


class DocumentSamples:
    """Endless numbered samples of one document each (a SampleSource), rows padded with token 0 to the longest read together.

    A document of more than seq_length + 1 tokens becomes several samples that overlap by one token, so that each token but
    the first is a label once. One of a single token has nothing to learn and is left out. Raises DataError if none is left.
    """

    def __init__(self, reader: IndexedReader, document_ids: npt.ArrayLike, seq_length: int, seed: int) -> None:
        if seq_length < 1:
            raise ValueError(f"sequence length {seq_length} must be at least 1")
        self.reader = reader
        self.name = reader.prefix
        self.seq_length = seq_length
        self.seed = seed
        self._documents = DocumentTable(reader, np.asarray(document_ids, dtype=np.int64))
        self.tokens_per_epoch = self._documents.tokens
        # -(-(L - 1) // s) samples of a document of L tokens
        parts = (self._documents.lengths.astype(np.int64) - 1 + seq_length - 1) // seq_length
        self._first_sample = np.concatenate(([0], np.cumsum(parts)))
        self.samples_per_epoch = int(self._first_sample[-1])
        if self.samples_per_epoch < 1:
            raise DataError(
                f"{reader.prefix}: none of its {len(self._documents):,} training documents has two tokens or more; "
                "without packing, each needs a token to read and one to predict"
            )
        self._orders: OrderedDict[int, np.ndarray] = OrderedDict()

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_orders": OrderedDict()}

    @property
    def identity(self) -> str:
        """Hash of what the samples depend on: the shape of the data set, the split, sequence length and seed."""
        return self._documents.identity("documents", self.seq_length, self.seed)

    def _order(self, epoch: int) -> np.ndarray:
        known = self._orders.get(epoch)
        if known is None:
            key = ("unpacked", self.seq_length, self.seed, epoch, self.reader.identity)
            known = self._orders[epoch] = keyed_permutation(self.samples_per_epoch, *key)
            while len(self._orders) > KEPT_EPOCHS:
                self._orders.popitem(last=False)
        return known

    def _places(self, numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Where samples begin in the reader's tokens, and their tokens, int64[b] each."""
        numbers = np.asarray(numbers, dtype=np.int64)
        if len(numbers) and int(numbers.min()) < 0:
            raise ValueError(f"sample number {int(numbers.min())} must not be negative")
        epochs, places = np.divmod(numbers, self.samples_per_epoch)
        for epoch in np.unique(epochs).tolist():
            here = epochs == epoch
            places[here] = self._order(epoch)[places[here]]
        document = np.searchsorted(self._first_sample, places, side="right") - 1
        skipped = (places - self._first_sample[document]) * self.seq_length
        lengths = np.minimum(self._documents.lengths[document] - skipped, self.seq_length + 1)
        return self._documents.starts[document] + skipped, lengths

    def lengths(self, numbers: np.ndarray) -> np.ndarray:
        """Real tokens of samples int64[b]: inputs and the one more."""
        return self._places(numbers)[1]

    def documents(self, number: int) -> list[int]:
        """The data set's document of sample `number`."""
        return documents_at(self.reader, self._places(np.array([number], dtype=np.int64))[0])

    def rows(self, numbers: np.ndarray) -> Rows:
        """Samples int64[b] of up to s + 1 tokens; see SampleSource."""
        begins, lengths = self._places(numbers)
        width = int(lengths.max(initial=2))
        tokens = np.zeros((len(begins), width), dtype=self.reader.dtype)
        tokens[np.arange(width) < lengths[:, None]] = join_pieces(self.reader.tokens_view, begins, lengths)
        known = None if (lengths == width).all() else lengths
        return Rows(tokens, np.arange(len(begins)) * width, known)


class Bucketed:
    """The samples of a source in windows sorted by length (a SampleSource). See the module.

    group: samples of an optimizer step; the order depends on it. pad_multiple: rows are padded to a multiple of so many
    inputs, at most seq_length, so that few shapes occur.
    """

    def __init__(self, source: SampleSource, group: int, pad_multiple: int, seed: int) -> None:
        if group < 1 or pad_multiple < 1:
            raise ValueError(f"group {group} and pad multiple {pad_multiple} must be at least 1")
        self.source = source
        self.group = group
        self.pad_multiple = pad_multiple
        self.seed = seed
        self.name = source.name
        self.seq_length = source.seq_length
        self.samples_per_epoch = source.samples_per_epoch
        self.tokens_per_epoch = source.tokens_per_epoch
        self.window = GROUPS_A_WINDOW * group
        self._windows: OrderedDict[int, np.ndarray] = OrderedDict()

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_windows": OrderedDict()}

    @property
    def identity(self) -> str:
        """Hash of the source's identity, the group and the seed."""
        return hashlib.sha256(repr(("bucketed", self.source.identity, self.group, self.seed)).encode()).hexdigest()

    def _window(self, window: int) -> np.ndarray:
        known = self._windows.get(window)
        if known is None:
            numbers = np.arange(window * self.window, (window + 1) * self.window, dtype=np.int64)
            by_length = numbers[np.argsort(self.source.lengths(numbers), kind="stable")]
            order = keyed_permutation(GROUPS_A_WINDOW, "buckets", self.seed, window)
            known = self._windows[window] = by_length.reshape(GROUPS_A_WINDOW, self.group)[order].reshape(-1)
            while len(self._windows) > KEPT_WINDOWS:
                self._windows.popitem(last=False)
        return known

    def places(self, numbers: np.ndarray) -> np.ndarray:
        """The source's numbers of samples int64[b]. Raises ValueError below 0."""
        numbers = np.asarray(numbers, dtype=np.int64)
        if len(numbers) and int(numbers.min()) < 0:
            raise ValueError(f"sample number {int(numbers.min())} must not be negative")
        windows, places = np.divmod(numbers, self.window)
        for window in np.unique(windows).tolist():
            here = windows == window
            places[here] = self._window(window)[places[here]]
        return places

    def lengths(self, numbers: np.ndarray) -> np.ndarray:
        """Real tokens of samples int64[b]: inputs and the one more."""
        return self.source.lengths(self.places(numbers))

    def rows(self, numbers: np.ndarray) -> Rows:
        """Samples int64[b], padded alike; see SampleSource."""
        rows = self.source.rows(self.places(numbers))
        inputs = rows.tokens.shape[1] - 1
        rounded = -(-inputs // self.pad_multiple) * self.pad_multiple
        return rows.padded(1 + max(inputs, min(rounded, self.seq_length)))
