"""Dry runs of preprocessing: the input that was found, and an estimate from an encoded sample."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from megatronish.data.tokenizers.backends import choose_encoder
from megatronish.preprocessing.options import PreprocessOptions, check_options, shard_bytes
from megatronish.preprocessing.preprocess import (
    find_sources,
    open_tokenizer,
    output_prefixes,
    sample_texts,
    token_dtype,
)
from megatronish.preprocessing.units import Planner


def dry_run(options: PreprocessOptions, report: Callable[[str], None]) -> list[str]:
    """Lines of a report; writes nothing but a temporary folder. Raises DataError for what a run would refuse at its start."""
    check_options(options)
    sources = find_sources(options, report)
    total = sum(source.size for source in sources)
    tokenizer = open_tokenizer(options, sources, report)
    dtype = token_dtype(options.dtype, tokenizer.vocab_size)
    size = shard_bytes(options.shard_size, total)
    with tempfile.TemporaryDirectory() as folder:
        first = next(Planner(sources, options.json_keys, options.separator, size, Path(folder)).units(), None)
        sample = [] if first is None else sample_texts(sources, first, options)
    encoder = choose_encoder(options.backend, tokenizer, sample, report)
    started = time.perf_counter()
    tokens = sum(map(len, encoder.encode(sample)))
    seconds = max(time.perf_counter() - started, 1e-9)
    text_bytes = sum(len(text.encode("utf-8")) for text in sample)
    lines = [
        f"would write {', '.join(output_prefixes(options).values())}",
        f"input: {len(sources):,} files or data sets, {total / 1e6:,.1f} MB as stored, in units of {size / 1e6:.1f} MB",
        f"tokenizer: {tokenizer.kind}, vocabulary {tokenizer.vocab_size:,}, {dtype.name} tokens, encoded by {encoder.name}",
    ]
    if not tokens:
        return [*lines, "no document with text at the beginning of the input"]
    lines.append(
        f"sample: {len(sample):,} beginnings of documents, {text_bytes:,} bytes to {tokens:,} tokens, "
        f"{text_bytes / tokens:.2f} bytes per token, {text_bytes / seconds / 1e6:.1f} MB/s on one core, not warmed up"
    )
    if total and not any(source.compression or source.format in ("parquet", "rows") for source in sources):
        estimate = total * tokens / text_bytes
        lines.append(
            f"estimate, from above (JSON around the text counts): {estimate:,.0f} tokens, "
            f"{estimate * dtype.itemsize / 1e6:,.1f} MB"
        )
    return lines
