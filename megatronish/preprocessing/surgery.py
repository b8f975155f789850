"""Data sets from data sets: several put one after another, one cut into parts. Tokens are copied, never encoded anew."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from megatronish.data.indexed.builder import IndexedWriter
from megatronish.data.indexed.format import IndexedReader, bin_path, idx_path
from megatronish.data.indexed.manifest import DatasetManifest, manifest_path, read_manifest
from megatronish.data.tokenizers.tokenizer import load_tokenizer
from megatronish.errors import DataError
from megatronish.files import write_atomic
from megatronish.preprocessing.publish import READY, commit, steps_to_commit, tokenizer_record

COPY_TOKENS = 1 << 22


def merge(inputs: Sequence[str], output: str, overwrite: bool = False) -> str:
    """Makes `output` of the documents of `inputs` in order, as Megatron's `add_index` does; returns a line about it.

    All must have the same dtype, tokenizer and end-of-document habit; data sets without manifests (Megatron's own) merge to
    one without. Raises DataError.
    """
    _refuse_existing([output], overwrite)
    readers = [IndexedReader(prefix) for prefix in inputs]
    manifests = [read_manifest(prefix) if manifest_path(prefix).exists() else None for prefix in inputs]
    known = [manifest for manifest in manifests if manifest is not None]
    if known and len(known) < len(inputs):
        raise DataError(
            f"merge: {inputs[manifests.index(None)]} has no manifest and others have; their tokenizers may differ"
        )
    for prefix, reader in zip(inputs, readers, strict=True):
        if reader.dtype != readers[0].dtype:
            raise DataError(f"merge: {prefix} holds {reader.dtype.name}, {inputs[0]} {readers[0].dtype.name} tokens")
    for prefix, manifest in zip(inputs, known):
        ours, first = manifest.tokenizer, known[0].tokenizer
        if (ours.sha256, ours.eod_id, manifest.appended_eod) != (first.sha256, first.eod_id, known[0].appended_eod):
            raise DataError(f"merge: {prefix} was made with another tokenizer or ending of documents than {inputs[0]}")
    counts = {
        name: sum(manifest.counts[name] for manifest in known)
        for name in (known[0].counts if known else ())
        if all(name in manifest.counts for manifest in known)
    }
    options: dict[str, Any] = {"merged": [Path(prefix).name for prefix in inputs]}
    rejects = [reject for manifest in known for reject in manifest.rejects]
    record = replace(known[0], counts=counts, options=options, rejects=rejects, shards=[]) if known else None

    def documents() -> Iterator[tuple[IndexedReader, np.ndarray]]:
        for reader in readers:
            yield reader, np.arange(reader.num_documents)

    (line,) = _write([(output, record, documents())], readers[0].dtype, inputs[0])
    return line


def split(
    prefix: str, output: str, shares: dict[str, float], seed: int | None = None, overwrite: bool = False
) -> list[str]:
    """Makes `OUTPUT_NAME` for each share of the documents of a data set; returns a line about each.

    Shares add up to 1 at most (what is left over is left out). Without a seed the parts follow each other; with one,
    documents are drawn at random and keep their order within a part. Raises DataError.
    """
    if any(share <= 0 for share in shares.values()) or sum(shares.values()) > 1 + 1e-9:
        raise DataError(f"--parts: shares must be positive and add up to 1 at most, not {sum(shares.values()):g}")
    reader = IndexedReader(prefix)
    manifest = read_manifest(prefix) if manifest_path(prefix).exists() else None
    outputs = {name: f"{output}_{name}" for name in shares}
    _refuse_existing(list(outputs.values()), overwrite)
    order = np.arange(reader.num_documents)
    if seed is not None:
        order = np.random.default_rng(seed).permutation(order)
    ends = np.round(np.cumsum(list(shares.values())) * reader.num_documents).astype(np.int64).tolist()
    jobs, start = [], 0
    for (name, path), end in zip(outputs.items(), ends, strict=True):
        chosen = np.sort(order[start:end])
        if not len(chosen):
            raise DataError(f"--parts {name}: no document of {reader.num_documents:,} falls to it; give it more")
        record = None
        if manifest is not None:
            options = {"split_of": Path(prefix).name, "part": name, "shares": shares, "seed": seed}
            # What was counted while reading cannot be attributed to documents.
            record = replace(manifest, counts={}, options=options, rejects=[], shards=[])
        jobs.append((path, record, iter([(reader, chosen)])))
        start = end
    return _write(jobs, reader.dtype, prefix)


def _refuse_existing(outputs: Sequence[str], overwrite: bool) -> None:
    for output in outputs:
        there = [path for path in (bin_path(output), idx_path(output), manifest_path(output)) if path.exists()]
        if there and not overwrite:
            raise DataError(f"{there[0]} exists already; use --overwrite, or another --output-prefix")


def _write(
    jobs: Sequence[tuple[str, DatasetManifest | None, Iterator[tuple[IndexedReader, np.ndarray]]]],
    dtype: Any,
    origin: str,
) -> list[str]:
    """Writes data sets aside and renames them; `origin` is a data set with their tokenizer."""
    lines, steps = [], []
    target = Path(jobs[0][0]).absolute().parent
    target.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".unfinished-", dir=target) as name:
        folder = Path(name)
        for output, manifest, parts in jobs:
            aside = folder / Path(output).name
            writer = IndexedWriter(aside, dtype)
            for reader, documents in parts:
                _copy(reader, documents, writer)
            writer.finalize()
            counted = {"documents": writer.documents, "tokens": writer.tokens}
            lines.append(f"{output}: {writer.documents:,} documents, {writer.tokens:,} tokens of {writer.dtype.name}")
            if manifest is None:
                steps += [["move", path.name, str(target / path.name)] for path in (bin_path(aside), idx_path(aside))]
                continue
            kept = manifest.tokenizer
            source = "bytes" if kept.file is None else Path(origin).parent / kept.file
            record, files = tokenizer_record(load_tokenizer(source, eod_id=kept.eod_id), aside)
            files |= {
                path.name: {"bytes": writer.sizes[suffix], "xxh3": writer.xxh3[suffix]}
                for suffix, path in (("bin", bin_path(aside)), ("idx", idx_path(aside)))
            }
            made = replace(manifest, tokenizer=record, counts=manifest.counts | counted, files=files, version=2)
            steps += steps_to_commit(folder, output, made)
        write_atomic(folder / READY, json.dumps(steps))
        commit(folder)
    return lines


def _copy(reader: IndexedReader, documents: np.ndarray, writer: IndexedWriter) -> None:
    """Appends documents with their sequences; runs of consecutive documents are copied in large pieces."""
    boundaries, lengths = reader.document_boundaries, reader.sequence_lengths
    breaks = np.flatnonzero(np.diff(documents) != 1) + 1
    for run in np.split(documents, breaks):
        if not len(run):
            continue
        first, last = int(run[0]), int(run[-1]) + 1
        start, end = int(reader.document_starts[first]), int(reader.document_starts[last])
        for position in range(start, end, COPY_TOKENS):
            writer.append_tokens(reader.tokens_view[position : min(end, position + COPY_TOKENS)])
        writer.append_lengths(lengths[boundaries[first] : boundaries[last]], np.diff(boundaries[first : last + 1]))
