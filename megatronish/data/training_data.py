"""A run's data, opened: its data sets, which documents train and validate, the order of samples, and their description."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Literal

import numpy as np

from megatronish.config.data import DataConfig
from megatronish.data.indexed.manifest import TokenizerRecord
from megatronish.data.loader import Batch
from megatronish.data.readers.sources import is_stream
from megatronish.data.samples.blend import Blend, apportion
from megatronish.data.samples.bucketing import Bucketed, DocumentSamples
from megatronish.data.samples.dataset import (
    Dataset,
    check_dataset_fits,
    check_tokenizer_fits,
    combined_fingerprint,
    open_dataset,
)
from megatronish.data.samples.megatron_order import DEFAULT_SPLIT, MegatronBlend, MegatronSamples, wanted_samples
from megatronish.data.samples.packing import PackedDataset
from megatronish.data.samples.sample import SampleSource
from megatronish.data.samples.splits import Split, split_documents, split_in_order
from megatronish.data.samples.validation import ValidationLoader
from megatronish.data.streams.streaming import DocumentStream, StreamOptions, open_stream
from megatronish.data.tokenizers.tokenizer import load_tokenizer
from megatronish.errors import DataError


@dataclass(frozen=True)
class TrainingData:
    """What `open_training_data` gives. `sources` are samples of the data sets and streams, in the order of data.path, of
    which `train` is made. Nothing is held out of a stream.

    `fingerprint` is the contents' hash, `order` names the settings that fix which samples a step takes: a run that is continued
    must agree in both.
    """

    datasets: tuple[Dataset, ...]
    splits: tuple[Split, ...]
    sources: tuple[SampleSource | DocumentStream, ...]
    train: SampleSource | Blend
    fingerprint: str
    order: dict[str, str]

    @property
    def _tokenizer_of(self) -> Dataset | DocumentStream:
        if self.datasets:
            return self.datasets[0]
        return next(source for source in self.sources if isinstance(source, DocumentStream))

    @property
    def tokenizer_record(self) -> TokenizerRecord:
        """The tokenizer that all data share."""
        return self._tokenizer_of.tokenizer_record

    @property
    def tokenizer_file(self) -> Path | None:
        """Its file; None for the byte tokenizer."""
        return self._tokenizer_of.tokenizer_file

    @property
    def num_held_out(self) -> int:
        """Documents held out for validation."""
        return sum(len(split.validation) for split in self.splits)

    def tokens_of(self, first: int, count: int) -> int:
        """Input tokens of samples first .. first + count - 1."""
        if not isinstance(self.train, Bucketed):
            return count * self.train.seq_length
        numbers = np.arange(first, first + count, dtype=np.int64)
        return int(self.train.lengths(numbers).sum()) - count

    def describe(self, samples: int) -> list[str]:
        """Lines that tell, for a run of so many samples, each data set's size, and how often it is read."""
        splits = iter(self.splits)
        if len(self.sources) == 1:
            return [f"data {self.sources[0].name}: {_size_of(self.sources[0], splits, samples)}", *self._stream_notes()]
        assert isinstance(self.blend, Blend)
        lines = [f"data: {samples:,} samples from {len(self.sources)} data sets"]
        width = max(len(source.name) for source in self.sources)
        for source, count in zip(self.sources, self.blend.counts(samples), strict=True):
            share = f"{count / max(samples, 1):7.2%} of the samples"
            lines.append(f"  {source.name:{width}}  {share}, {_size_of(source, splits, count)}")
        return lines + self._stream_notes()

    def _stream_notes(self) -> list[str]:
        return [line for source in self.sources if isinstance(source, DocumentStream) for line in source.describe()]

    @property
    def blend(self) -> Blend | None:
        """The blend of several data sets, also where its samples are sorted by length."""
        inner = self.train.source if isinstance(self.train, Bucketed) else self.train
        return inner if isinstance(inner, Blend) else None

    def validation_batches(
        self, micro_batch_size: int, rank: int, size: int, document_mask: bool, max_windows: int | None
    ) -> Iterator[Batch]:
        """One rank's batches of the held-out documents of all data sets, equally many on every rank.

        max_windows: of the data sets together, in proportion to their held-out tokens, one each at least.
        """
        parts = [(d, s.validation) for d, s in zip(self.datasets, self.splits, strict=True) if len(s.validation)]
        tokens = [int(d.reader.document_lengths[ids].sum()) for d, ids in parts]
        parts = [part for part, count in zip(parts, tokens, strict=True) if count]
        limits: list[int | None] = [None] * len(parts)
        if max_windows is not None and parts:
            shares = shares_of([count for count in tokens if count])
            limits = [max(1, count) for count in apportion(max_windows, shares)]
        for (dataset, ids), limit in zip(parts, limits, strict=True):
            yield from ValidationLoader(
                dataset.reader,
                ids,
                self.train.seq_length,
                micro_batch_size,
                rank,
                size,
                eod_id=dataset.manifest.tokenizer.eod_id,
                document_mask=document_mask,
                max_windows=limit,
            )


def open_training_data(
    config: DataConfig, *, seq_length: int, vocab_size: int, seed: int, samples: int, group: int
) -> TrainingData:
    """Opens a run's data and checks that the model can read it.

    samples: how many the run takes (fixes Megatron's order, no other); group: samples of an optimizer step (the unit of
    length-sorted batches). Raises DataError for data that are missing, damaged, too few, or of different tokenizers.
    """
    unit: Literal["document", "sequence"] = "sequence" if config.order == "megatron" else "document"
    indexed = [corpus.path for corpus in config.corpora if not is_stream(corpus.path)]
    datasets = [open_dataset(path, unit, config.tokenizer) for path in indexed]
    for dataset in datasets:
        check_dataset_fits(dataset.manifest, vocab_size, place=dataset.prefix)
        if dataset.manifest.tokenizer.sha256 != datasets[0].manifest.tokenizer.sha256:
            raise DataError(
                f"{dataset.prefix} and {datasets[0].prefix} were made with different tokenizers; prepare one of them again with the "
                f"other's (--tokenizer-model {datasets[0].tokenizer_file or 'bytes'})"
            )
    streams = _streams(config, datasets, seq_length, vocab_size, seed)
    splits = [split_of(config, dataset.reader.num_documents) for dataset in datasets]
    weights = [corpus.weight for corpus in config.corpora if corpus.weight is not None] or None
    build = _megatron if config.order == "megatron" else _shuffled
    sources: list[SampleSource | DocumentStream] = []
    train: SampleSource | Blend | None = None
    if datasets:
        own_weights = None if streams else weights
        indexed_sources, train = build(config, datasets, splits, own_weights, seq_length, seed, samples, group)
        sources.extend(indexed_sources)
    for place, stream in streams.items():  # rising places: each lands where data.path has it
        sources.insert(place, stream)
    if streams or train is None:
        train = Blend(sources, weights or [1], seed)
    return TrainingData(
        datasets=tuple(datasets),
        splits=tuple(splits),
        sources=tuple(sources),
        train=train,
        fingerprint=combined_fingerprint([d.fingerprint for d in datasets] + [s.identity for s in streams.values()]),
        order=_order_settings(config, weights, samples, group),
    )


def _streams(
    config: DataConfig, datasets: list[Dataset], seq_length: int, vocab_size: int, seed: int
) -> dict[int, DocumentStream]:
    """The streamed text of data.path by its place there, with the data sets' tokenizer where there are any."""
    places = [place for place, corpus in enumerate(config.corpora) if is_stream(corpus.path)]
    if not places:
        return {}
    first = config.corpora[places[0]]
    if config.order == "megatron" or not config.pack:
        raise DataError(f'{first.path} is streamed, which needs data.order "shuffled" and data.pack true')
    if len(config.corpora) > 1 and first.weight is None:
        raise DataError(
            f"{first.path} is streamed, so how many tokens it has is not known: give a weight before each location of data.path, "
            f'such as [0.7, "{config.corpora[0].path}", 0.3, "{config.corpora[1].path}"]'
        )
    eod_id, tokenizer = None, config.tokenizer
    if datasets and (tokenizer is None or load_tokenizer(tokenizer).fingerprint == datasets[0].tokenizer_record.sha256):
        tokenizer, eod_id = str(datasets[0].tokenizer_file or "bytes"), datasets[0].tokenizer_record.eod_id
    if tokenizer is None:
        raise DataError(
            f"{first.path} is streamed and needs --data.tokenizer: a tokenizer.json, its folder, a .model, or bytes"
        )
    options = StreamOptions(
        tokenizer, seq_length, seed, config.stream_buffer, config.text_key, eod_id=eod_id, on_error=config.on_error
    )
    found = {place: open_stream(config.corpora[place].path, options) for place in places}
    for stream in found.values():
        expected = datasets[0].tokenizer_record.sha256 if datasets else None
        check_tokenizer_fits(stream.tokenizer_record, vocab_size, expected, place=f"data.tokenizer, for {stream.name},")
    return found


def _size_of(source: SampleSource | DocumentStream, splits: Iterator[Split], samples: int) -> str:
    """How large a source is and how often it is read; `splits` are of the indexed ones."""
    if isinstance(source, DocumentStream):
        return "streamed; nothing held out"
    return (
        f"{source.tokens_per_epoch:,} training tokens, {samples / source.samples_per_epoch:.2f} epochs in {samples:,} samples; "
        f"{len(next(splits).validation):,} documents held out"
    )


def split_of(config: DataConfig, num_documents: int) -> Split:
    """The split of a data set of so many documents (sequences, in Megatron's order) under a run's settings."""
    ratios = config.split or (DEFAULT_SPLIT if config.order == "megatron" else None)
    if ratios is not None:
        return split_in_order(num_documents, ratios)
    return split_documents(num_documents, config.validation_fraction, config.test_fraction)


def shares_of(counts: list[int]) -> list[Fraction]:
    """Counts as exact fractions of their sum."""
    return [Fraction(count, sum(counts)) for count in counts]


def _shuffled(
    config: DataConfig,
    datasets: list[Dataset],
    splits: list[Split],
    weights: list[float] | None,
    seq_length: int,
    seed: int,
    samples: int,
    group: int,
) -> tuple[list[SampleSource], SampleSource | Blend]:
    kind = PackedDataset if config.pack else DocumentSamples
    sources: list[SampleSource] = [
        kind(dataset.reader, split.train, seq_length, seed) for dataset, split in zip(datasets, splits, strict=True)
    ]
    train: SampleSource | Blend = sources[0]
    if len(sources) > 1:
        # Of packed samples shares of samples are shares of tokens; unpacked ones have their documents' lengths.
        sizes = [s.tokens_per_epoch if config.pack else s.samples_per_epoch for s in sources]
        train = Blend(sources, weights or sizes, seed)
    if not config.pack:
        train = Bucketed(train, group, config.pad_multiple, seed)
    return sources, train


def _megatron(
    config: DataConfig,
    datasets: list[Dataset],
    splits: list[Split],
    weights: list[float] | None,
    seq_length: int,
    seed: int,
    samples: int,
    group: int,
) -> tuple[list[SampleSource], SampleSource | Blend]:
    wanted = wanted_samples(weights, len(datasets), samples)
    sources = [
        MegatronSamples(dataset.reader, split.train, seq_length, seed, count)
        for dataset, split, count in zip(datasets, splits, wanted, strict=True)
    ]
    if len(sources) == 1 and weights is None:
        return list(sources), sources[0]
    return list(sources), MegatronBlend(sources, weights, samples)


def _order_settings(config: DataConfig, weights: list[float] | None, samples: int, group: int) -> dict[str, str]:
    """Setting by dotted name, as text: what else than data, seed and sequence length fixes the samples of a step."""
    blend = "by tokens" if weights is None else ", ".join(f"{weight:g}" for weight in weights)
    if len(blend) > 200:
        blend = f"{len(weights or [])} weights, {hashlib.sha256(blend.encode()).hexdigest()[:16]}"
    settings = {
        "data.order": config.order,
        "data.pack": str(config.pack).lower(),
        "data.split": config.split or (DEFAULT_SPLIT if config.order == "megatron" else "by fraction"),
        "weights in data.path": blend,
    }
    if settings["data.split"] == "by fraction":
        settings["data.validation_fraction"] = f"{config.validation_fraction:g}"
        settings["data.test_fraction"] = f"{config.test_fraction:g}"
    if config.order == "megatron":
        settings["samples of the whole run"] = str(samples)
    if not config.pack:
        settings["samples of an optimizer step"] = str(group)
    return settings
