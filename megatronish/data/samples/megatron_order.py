"""The order of samples of megatron-core's GPTDataset and BlendedDataset (0.16), sample for sample, without their cache files.

GPTDataset shuffles the documents of all epochs together (the last epoch apart, if less than 80 % of it is wanted), cuts the stream
into samples, and shuffles those; so the order depends on the number of samples that a run asks for, and a longer run sees other data from the
start. It treats sequences as documents: pass readers of unit "sequence". Source: megatron/core/datasets/{gpt_dataset,
blended_dataset,blended_megatron_dataset_builder}.py and helpers.cpp, as behaviour; NumPy guarantees that RandomState's stream does not change.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from megatronish.data.indexed.format import IndexedReader
from megatronish.data.samples.blend import BlendedDataset
from megatronish.data.samples.packing import DocumentTable, documents_at, samples_in
from megatronish.data.samples.rows import SampleRows
from megatronish.data.samples.source import SampleSource
from megatronish.data.samples.token_stream import TokenStream
from megatronish.errors import DataError

DEFAULT_SPLIT = "969,30,1"
# Up to this share of the last epoch, its documents are not shuffled among those of the epochs before.
SEPARATE_SHARE = 0.80
# mid_level_dataset_surplus: each data set of a blend is built this much larger than needed.
SURPLUS = 0.005


class MegatronDataset(SampleSource):
    """The samples of GPTDataset(indices=sequence_ids, num_samples=...) for training. They end.

    reader: of unit "sequence"; sequence_ids: int64[k], increasing; num_samples: how many are wanted, None: one epoch.
    `size` samples exist, at least as many. Raises DataError for a split too small for one sample.
    """

    def __init__(
        self, reader: IndexedReader, sequence_ids: np.ndarray, seq_length: int, seed: int, num_samples: int | None
    ) -> None:
        if reader.unit != "sequence":
            raise ValueError(f"{reader.prefix} is opened by {reader.unit}; this order treats sequences as documents")
        self.reader = reader
        self.name = reader.prefix
        self.seq_length = seq_length
        self.seed = seed
        self.num_samples = num_samples
        lengths = reader.sequence_lengths[sequence_ids]
        self.tokens_per_epoch = int(lengths.sum(dtype=np.int64))
        self.samples_per_epoch = samples_in(self.tokens_per_epoch, seq_length, len(sequence_ids), reader)
        self._sequence_ids = sequence_ids
        self._documents = DocumentTable(reader, sequence_ids, keep_empty=True)
        wanted = 1 if num_samples is None else num_samples * seq_length + 1
        self.epochs = max(1, -(-wanted // self.tokens_per_epoch))
        self.size = (self.epochs * self.tokens_per_epoch - 1) // seq_length
        self._stream, self._order = self._build()

    def __getstate__(self) -> dict[str, object]:
        return {key: value for key, value in self.__dict__.items() if key not in ("_stream", "_order")}

    def __setstate__(self, state: dict[str, object]) -> None:
        self.__dict__.update(state)
        self._stream, self._order = self._build()

    def _build(self) -> tuple[TokenStream, np.ndarray]:
        random = np.random.RandomState(self.seed)
        before_last = ((self.epochs - 1) * self.tokens_per_epoch - 1) // self.seq_length
        apart = (
            self.epochs > 1
            and self.num_samples is not None
            and self.num_samples - before_last < int(SEPARATE_SHARE * self.samples_per_epoch)
        )
        count = len(self._sequence_ids)
        documents = []
        for epochs in [self.epochs - 1, 1] if apart else [self.epochs]:
            documents.append(np.tile(np.arange(count, dtype=np.int64), epochs))
            random.shuffle(documents[-1])
        samples = []
        for begin, end in [(0, before_last), (before_last, self.size)] if apart else [(0, self.size)]:
            samples.append(np.arange(begin, end, dtype=np.int64))
            random.shuffle(samples[-1])
        return self._documents.permuted(np.concatenate(documents)), np.concatenate(samples)

    @property
    def identity(self) -> str:
        """Hash of what the samples depend on, the number wanted among it."""
        return self._documents.identity("megatron", self.seq_length, self.seed, self.num_samples or 0)

    def _begins(self, numbers: np.ndarray) -> list[int]:
        """Where samples begin in the token stream. Raises DataError beyond the last one."""
        if len(numbers) and not (int(numbers.min()) >= 0 and int(numbers.max()) < self.size):
            raise DataError(
                f"{self.name}: sample {int(numbers.max()):,} of {self.size:,}: in Megatron's order a run has as many samples as it asked for"
            )
        return (self._order[numbers] * self.seq_length).tolist()

    def batch(self, numbers: np.ndarray, document_mask: bool) -> dict[str, Any]:
        """See SampleSource. Raises DataError beyond the last sample."""
        return self._stream.batch(self._begins(numbers), self.seq_length, document_mask)

    def rows(self, numbers: np.ndarray) -> SampleRows:
        """See SampleSource. Raises DataError beyond the last sample."""
        return self._stream.rows(self._begins(numbers), self.seq_length + 1)

    def documents(self, number: int) -> tuple[str, list[int] | None]:
        """See SampleSource; the documents are the data set's sequences."""
        (begin,) = self._begins(np.array([number]))
        return self.name, documents_at(self.reader, self._stream.sources(begin, self.seq_length + 1))


def wanted_samples(weights: Sequence[float] | None, corpora: int, total: int) -> list[int | None]:
    """How many samples megatron-core builds of each data set of a blend for a run of `total`: None is one epoch."""
    if weights is None:
        return [total] if corpora == 1 else [None] * corpora
    return [math.ceil(math.ceil(total * weight) * (1 + SURPLUS)) for weight in normalized(weights)]


def normalized(weights: Sequence[float]) -> list[float]:
    """Weights divided by their sum in float64, as megatron-core does it."""
    array = np.array(weights, dtype=np.float64)
    return (array / np.sum(array)).tolist()


class MegatronBlendedDataset(BlendedDataset):
    """The samples of BlendedDataset over MegatronDataset: at each step the data set that lags its weight most.

    weights: as given by the user; None: in proportion to the data sets' sizes, one epoch. Memory: 10 bytes per sample; takes about
    a microsecond per data set and sample. Raises DataError if the data hold fewer samples than the run wants.
    """

    def __init__(self, sources: Sequence[MegatronDataset], weights: Sequence[float] | None, total: int) -> None:
        sizes = [source.size for source in sources]
        super().__init__(sources, list(weights or sizes), seed=0)
        if weights is None:
            if total > sum(sizes):
                raise DataError(
                    f"the run takes {total:,} samples, the {len(sources)} data sets hold {sum(sizes):,} and Megatron's order repeats none "
                    'without weights; give weights, fewer train.steps, or order "shuffled"'
                )
            parts, self.size = normalized(sizes), total
        else:
            parts = normalized(weights)
            self.size = sum(math.ceil(total * weight) for weight in parts)
        self._source_of, self._number_of = greedy_blend(parts, self.size)
        used = np.bincount(self._source_of, minlength=len(sources)).tolist()
        for source, count in zip(sources, used, strict=True):
            if count > source.size:
                raise DataError(
                    f"{source.name} gives {count:,} samples to the blend but has {source.size:,}; Megatron builds {SURPLUS:.1%} more than "
                    'the weights ask for and stops here too; use order "shuffled"'
                )

    def counts(self, total: int) -> list[int]:
        """How many of the first `total` samples come from each source."""
        return np.bincount(self._source_of[:total], minlength=len(self.sources)).tolist()

    def locate(self, numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Which source each sample comes from, and its number there. Raises DataError beyond the last sample."""
        if len(numbers) and not (int(numbers.min()) >= 0 and int(numbers.max()) < self.size):
            raise DataError(f"sample {int(numbers.max()):,} of {self.size:,} of a blend in Megatron's order")
        return self._source_of[numbers].astype(np.int64), self._number_of[numbers]


def greedy_blend(weights: Sequence[float], size: int) -> tuple[np.ndarray, np.ndarray]:
    """Data set int16[size] and number within it int64[size] of each sample (`build_blending_indices`).

    Sample n goes to the data set whose count is furthest below weight * max(n, 1), the first of equals, in float64.
    """
    source_of, number_of = np.empty(size, dtype=np.int16), np.empty(size, dtype=np.int64)
    counts = [0] * len(weights)
    for n in range(size):
        reached = float(n or 1)
        lags = [weights[i] * reached - counts[i] for i in range(len(weights))]
        chosen = lags.index(max(lags))
        source_of[n] = chosen
        number_of[n] = counts[chosen]
        counts[chosen] += 1
    return source_of, number_of
