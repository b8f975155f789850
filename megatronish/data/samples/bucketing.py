"""Unpacked samples: one document each, samples of similar length in one batch, so that little of it is padding.

Documents come in permuted order, keyed by (seed, epoch, data set) as in packing.py. Then windows of consecutive samples are
sorted by length and cut into groups of a global batch, and the groups of a window are permuted: all micro batches of an
optimizer step hold samples of similar length, for any number of ranks and micro batch size. (Sorting within windows is also
known as bucketing or smart batching; fairseq and Hugging Face's `group_by_length` do the same.)
"""

from __future__ import annotations

import hashlib

import numpy as np
import numpy.typing as npt

from megatronish.data.indexed.format import IndexedReader
from megatronish.data.samples.packing import KEPT_EPOCHS, DocumentTable, documents_at
from megatronish.data.samples.permutation import keyed_permutation
from megatronish.data.samples.rows import SampleRows, join_pieces
from megatronish.data.samples.source import RecentValues, SampleSource, look_up
from megatronish.errors import DataError

GROUPS_PER_WINDOW = 32
KEPT_WINDOWS = 2


class UnpackedDataset(SampleSource):
    """Samples of one document each; rows are padded with token 0 to the longest that is read with them.

    A document of more than seq_length + 1 tokens becomes several samples that overlap by one token, so that each token but
    the first is a label once. Documents of a single token have no label and are left out. Raises DataError if none is left.
    """

    padded = True

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
        self._orders: RecentValues[np.ndarray] = RecentValues(KEPT_EPOCHS)

    @property
    def identity(self) -> str:
        """Hash of what the samples depend on: the shape of the data set, the split, sequence length and seed."""
        return self._documents.identity("documents", self.seq_length, self.seed)

    def _order(self, epoch: int) -> np.ndarray:
        key = ("unpacked", self.seq_length, self.seed, epoch, self.reader.identity)
        return self._orders.get_or(epoch, lambda _: keyed_permutation(self.samples_per_epoch, *key))

    def _locate(self, numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Where samples begin in the reader's tokens, and their number of tokens, int64[b] each."""
        ordinals = look_up(numbers, self.samples_per_epoch, self._order)
        document = np.searchsorted(self._first_sample, ordinals, side="right") - 1
        skipped = (ordinals - self._first_sample[document]) * self.seq_length
        lengths = np.minimum(self._documents.lengths[document] - skipped, self.seq_length + 1)
        return self._documents.starts[document] + skipped, lengths

    def lengths(self, numbers: np.ndarray) -> np.ndarray:
        """See SampleSource."""
        return self._locate(numbers)[1]

    def documents(self, number: int) -> tuple[str, list[int] | None]:
        """See SampleSource."""
        return self.name, documents_at(self.reader, self._locate(np.array([number], dtype=np.int64))[0])

    def rows(self, numbers: np.ndarray) -> SampleRows:
        """See SampleSource."""
        begins, lengths = self._locate(numbers)
        width = int(lengths.max(initial=2))
        tokens = np.zeros((len(begins), width), dtype=self.reader.dtype)
        tokens[np.arange(width) < lengths[:, None]] = join_pieces(self.reader.tokens_view, begins, lengths)
        return SampleRows(tokens, np.arange(len(begins)) * width, None if (lengths == width).all() else lengths)


class BucketedDataset(SampleSource):
    """The samples of a source in windows sorted by length, see the module.

    group: samples per optimizer step; the order depends on it. pad_multiple: rows are padded to a multiple of this many
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
        self.padded = source.padded
        self.window = GROUPS_PER_WINDOW * group
        self._windows: RecentValues[np.ndarray] = RecentValues(KEPT_WINDOWS)

    @property
    def identity(self) -> str:
        """Hash of the source's identity, the group and the seed."""
        return hashlib.sha256(repr(("bucketed", self.source.identity, self.group, self.seed)).encode()).hexdigest()

    def _sorted(self, window: int) -> np.ndarray:
        """The source's numbers of a window's samples."""
        numbers = np.arange(window * self.window, (window + 1) * self.window, dtype=np.int64)
        by_length = numbers[np.argsort(self.source.lengths(numbers), kind="stable")]
        order = keyed_permutation(GROUPS_PER_WINDOW, "buckets", self.seed, window)
        return by_length.reshape(GROUPS_PER_WINDOW, self.group)[order].reshape(-1)

    def locate(self, numbers: np.ndarray) -> np.ndarray:
        """The source's numbers of samples int64[b]. Raises ValueError below 0."""
        return look_up(numbers, self.window, lambda window: self._windows.get_or(window, self._sorted))

    def lengths(self, numbers: np.ndarray) -> np.ndarray:
        """See SampleSource."""
        return self.source.lengths(self.locate(numbers))

    def rows(self, numbers: np.ndarray) -> SampleRows:
        """See SampleSource; all rows are padded to one length."""
        rows = self.source.rows(self.locate(numbers))
        inputs = rows.tokens.shape[1] - 1
        rounded = -(-inputs // self.pad_multiple) * self.pad_multiple
        return rows.padded(1 + max(inputs, min(rounded, self.seq_length)))

    def documents(self, number: int) -> tuple[str, list[int] | None]:
        """See SampleSource."""
        return self.source.documents(int(self.locate(np.array([number], dtype=np.int64))[0]))

    def counts(self, total: int) -> list[int]:
        """See SampleSource; exact at the end of a window."""
        return self.source.counts(total)
