"""A run's data, opened: its data sets, which documents train and validate, the order of samples, and their description."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Literal

from megatronish.config.data import DataConfig
from megatronish.data.indexed.manifest import TokenizerRecord
from megatronish.data.loader import Batch
from megatronish.data.readers.inputs import is_stream
from megatronish.data.samples.blend import BlendedDataset, apportion
from megatronish.data.samples.bucketing import BucketedDataset, UnpackedDataset
from megatronish.data.samples.dataset import (
    IndexedDataset,
    check_dataset_fits,
    check_tokenizer_fits,
    combined_fingerprint,
    open_dataset,
)
from megatronish.data.samples.megatron_order import (
    DEFAULT_SPLIT,
    MegatronBlendedDataset,
    MegatronDataset,
    wanted_samples,
)
from megatronish.data.samples.packing import PackedDataset
from megatronish.data.samples.source import SampleSource
from megatronish.data.samples.splits import Split, split_documents, split_in_order
from megatronish.data.samples.validation import ValidationLoader
from megatronish.data.streams.streaming import DocumentStream, StreamOptions, open_stream
from megatronish.data.tokenizers.tokenizer import load_tokenizer
from megatronish.errors import DataError


@dataclass(frozen=True)
class TrainingData:
    """What `open_training_data` returns. `sources` are samples of the data sets and streams, in the order of data.path;
    `train` is made of them. No documents of a stream are held out. All data share one tokenizer; `tokenizer_file` is None
    for the byte tokenizer.

    `fingerprint` is the contents' hash, `order` names the settings that determine the samples of each step: a resumed run
    must agree in both.
    """

    datasets: tuple[IndexedDataset, ...]
    splits: tuple[Split, ...]
    sources: tuple[SampleSource, ...]
    train: SampleSource
    tokenizer_record: TokenizerRecord
    tokenizer_file: Path | None
    fingerprint: str
    order: dict[str, str]

    @property
    def num_held_out(self) -> int:
        """Documents held out for validation."""
        return sum(len(split.validation) for split in self.splits)

    def describe(self, samples: int) -> list[str]:
        """Lines with each data set's size and how often a run of this many samples reads it."""
        splits = iter(self.splits)
        sizes = [
            "streamed; nothing held out"
            if source.streamed
            else f"{source.tokens_per_epoch:,} training tokens, {count / source.samples_per_epoch:.2f} epochs in {count:,} "
            f"samples; {len(next(splits).validation):,} documents held out"
            for source, count in zip(self.sources, self.train.counts(samples), strict=True)
        ]
        if len(sizes) == 1:
            return [f"data {self.sources[0].name}: {sizes[0]}", *self.train.describe()]
        lines = [f"data: {samples:,} samples from {len(sizes)} data sets"]
        width = max(len(source.name) for source in self.sources)
        for source, count, size in zip(self.sources, self.train.counts(samples), sizes, strict=True):
            lines.append(f"  {source.name:{width}}  {count / max(samples, 1):7.2%} of the samples, {size}")
        return lines + self.train.describe()

    def validation_batches(
        self, micro_batch_size: int, rank: int, size: int, document_mask: bool, max_windows: int | None
    ) -> Iterator[Batch]:
        """One rank's batches of the held-out documents of all data sets, equal numbers on every rank.

        max_windows: over all data sets, in proportion to their held-out tokens, at least one each.
        """
        parts = [(d, s.validation) for d, s in zip(self.datasets, self.splits, strict=True) if len(s.validation)]
        tokens = [int(d.reader.document_lengths[ids].sum()) for d, ids in parts]
        parts = [part for part, count in zip(parts, tokens, strict=True) if count]
        limits: list[int | None] = [None] * len(parts)
        if max_windows is not None and parts:
            shares = [Fraction(count, sum(tokens)) for count in tokens if count]
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
    prefixes = [corpus.path for corpus in config.corpora if not is_stream(corpus.path)]
    datasets = [open_dataset(path, unit, config.tokenizer) for path in prefixes]
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
    parts = list(zip(datasets, splits, strict=True))
    if config.order == "megatron":
        sources, train = _megatron_sources(parts, weights, seq_length, seed, samples)
    else:
        sources, train = _shuffled_sources(config, parts, streams, weights, seq_length, seed, group)
    with_tokenizer = datasets[0] if datasets else streams[0]
    return TrainingData(
        datasets=tuple(datasets),
        splits=tuple(splits),
        sources=tuple(sources),
        train=train,
        tokenizer_record=with_tokenizer.tokenizer_record,
        tokenizer_file=with_tokenizer.tokenizer_file,
        fingerprint=combined_fingerprint([d.fingerprint for d in datasets] + [s.identity for s in streams.values()]),
        order=_order_settings(config, weights, samples, group),
    )


def _streams(
    config: DataConfig, datasets: list[IndexedDataset], seq_length: int, vocab_size: int, seed: int
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


def split_of(config: DataConfig, num_documents: int) -> Split:
    """The split of a data set's documents (sequences, in Megatron's order) under a run's settings."""
    ratios = config.split or (DEFAULT_SPLIT if config.order == "megatron" else None)
    if ratios is not None:
        return split_in_order(num_documents, ratios)
    return split_documents(num_documents, config.validation_fraction, config.test_fraction)


def _shuffled_sources(
    config: DataConfig,
    parts: list[tuple[IndexedDataset, Split]],
    streams: dict[int, DocumentStream],
    weights: list[float] | None,
    seq_length: int,
    seed: int,
    group: int,
) -> tuple[list[SampleSource], SampleSource]:
    """The source of each location of data.path, and one of all of them."""
    kind = PackedDataset if config.pack else UnpackedDataset
    sources: list[SampleSource] = [kind(dataset.reader, split.train, seq_length, seed) for dataset, split in parts]
    for index, stream in streams.items():  # in increasing order: each is inserted at its index in data.path
        sources.insert(index, stream)
    train = sources[0]
    if streams or len(sources) > 1:
        # Of packed samples shares of samples are shares of tokens; unpacked ones have their documents' lengths.
        sizes = [s.tokens_per_epoch if config.pack else s.samples_per_epoch for s in sources]
        train = BlendedDataset(sources, weights or ([1] if streams else sizes), seed)
    return sources, train if config.pack else BucketedDataset(train, group, config.pad_multiple, seed)


def _megatron_sources(
    parts: list[tuple[IndexedDataset, Split]], weights: list[float] | None, seq_length: int, seed: int, samples: int
) -> tuple[list[SampleSource], SampleSource]:
    """The source of each data set in Megatron's order, and one of all of them."""
    sources = [
        MegatronDataset(dataset.reader, split.train, seq_length, seed, count)
        for (dataset, split), count in zip(parts, wanted_samples(weights, len(parts), samples), strict=True)
    ]
    if len(sources) == 1 and weights is None:
        return list(sources), sources[0]
    return list(sources), MegatronBlendedDataset(sources, weights, samples)


def _order_settings(config: DataConfig, weights: list[float] | None, samples: int, group: int) -> dict[str, str]:
    """Setting by dotted name, as text: what determines the samples of a step besides data, seed and sequence length."""
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
        settings["samples of the run"] = str(samples)
    if not config.pack:
        settings["samples of an optimizer step"] = str(group)
    return settings
