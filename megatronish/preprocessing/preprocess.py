"""Text to a committed data set: cut into units, encode them in workers, append in order, rename, the manifest last.

A killed run leaves nothing under the final name (or, between the renames, files without a manifest, which no reader accepts),
and its finished units for `resume`. Memory does not grow with the input.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from megatronish.data.indexed.builder import write_index
from megatronish.data.indexed.format import best_dtype, bin_path, idx_path
from megatronish.data.indexed.manifest import DatasetManifest, manifest_path, read_manifest
from megatronish.data.readers.documents import DocumentReader
from megatronish.data.readers.inputs import Row, TextSource, check_keys, find_inputs, is_remote
from megatronish.data.readers.locations import TextLocation, resolve
from megatronish.data.readers.records import SKIP_HINT, RecordReader
from megatronish.data.tokenizers.backends import choose_encoder
from megatronish.data.tokenizers.tokenizer import Tokenizer, gpt2_tokenizer, load_tokenizer, train_bpe
from megatronish.errors import DataError
from megatronish.files import write_atomic
from megatronish.preprocessing.corpus import default_corpus, default_corpus_description
from megatronish.preprocessing.encoding import EncodeJob, UnitResult, read_piece
from megatronish.preprocessing.journal import UnfinishedOutput, read_plan
from megatronish.preprocessing.options import (
    DEFAULT_OUTPUT_PREFIX,
    DEFAULT_VOCAB_SIZE,
    PreprocessOptions,
    check_options,
    shard_bytes,
)
from megatronish.preprocessing.pool import WorkerDied, results
from megatronish.preprocessing.progress import Progress
from megatronish.preprocessing.publish import (
    READY,
    PreprocessResult,
    commit,
    steps_to_commit,
    summary,
    tokenizer_record,
)
from megatronish.preprocessing.units import Planner, WorkUnit

__all__ = [
    "DEFAULT_OUTPUT_PREFIX",
    "DEFAULT_VOCAB_SIZE",
    "PreprocessOptions",
    "PreprocessResult",
    "preprocess",
    "summary",
]

# Text compared with the tokenizer's own library before a faster one is used: some 20 ms of work.
SAMPLE_CHARACTERS = 1 << 15
SAMPLE_DOCUMENT_CHARACTERS = 1 << 12
LENGTHS_AT_A_TIME = 1 << 20


def preprocess(options: PreprocessOptions, report: Callable[[str], None]) -> list[PreprocessResult]:
    """Prepares one data set a JSON key at `OUTPUT_PREFIX_KEY_document`. `report` is called with each line to print.

    Raises DataError for anything the user can put right, OSError when the disk does not serve.
    """
    check_options(options)
    prefixes = output_prefixes(options)
    folder = UnfinishedOutput.folder_of(options.output_prefix)
    _check_unfinished(folder, options)
    if not options.overwrite:
        reuse = not options.inputs or options.resume
        done = [_existing(prefix, options.recorded(key), refuse=not reuse) for key, prefix in prefixes.items()]
        if all(result is not None for result in done):
            return [result for result in done if result is not None]
    sources = find_sources(options, report)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        where = folder.parent
        raise DataError(f"--output-prefix {options.output_prefix}: cannot write in {where}: {error.strerror}") from None
    output = UnfinishedOutput(folder, len(prefixes), sources)
    finished = False
    try:
        results = _Run(options, sources, output, report).run(prefixes)
        finished = True
        return results
    except (DataError, OSError, WorkerDied, KeyboardInterrupt):
        if output.state.units:
            report(f"{output.state.units:,} finished units are kept in {folder}; --resume resumes after them")
        raise
    finally:
        output.close(keep=not finished and output.state.units > 0)


def output_prefixes(options: PreprocessOptions) -> dict[str, str]:
    """The data set of each key."""
    return {key: f"{options.output_prefix}_{key}_document" for key in options.json_keys}


def find_sources(options: PreprocessOptions, report: Callable[[str], None]) -> list[TextSource]:
    """The inputs, in order. Raises DataError for what cannot be read; empty files are reported and left out."""
    if not options.inputs:
        notes: set[str] = set()

        def report_once(line: str) -> None:
            if line not in notes:  # the corpus is read twice: for the tokenizer, and to be encoded
                notes.add(line)
                report(line)

        description = default_corpus_description()
        return [TextSource(" ".join(description.values()), "rows", rows=partial(_default_rows, report_once))]
    sources: list[TextSource] = []
    for remote, patterns in itertools.groupby(options.inputs, is_remote):
        if remote:
            sources += [source for spec in patterns for source in _remote_sources(spec, options.json_keys, report)]
        else:
            sources += find_inputs(list(patterns))
    check_keys(sources, options.json_keys)
    empty = [source.name for source in sources if not source.remote and source.rows is None and source.size == 0]
    if empty:
        report(f"{len(empty):,} empty files left out, such as {empty[0]}")
    return [source for source in sources if source.name not in set(empty)]


def _default_rows(report: Callable[[str], None], keys: Sequence[str], start: int) -> Iterator[Row]:
    return ({"text": text} for _, text in default_corpus(report))


def _remote_sources(spec: str, keys: Sequence[str], report: Callable[[str], None]) -> list[TextSource]:
    """The shards of an `hf://` or http(s) input. With --json-keys left out, the fields of a known data set are joined."""
    try:
        location = resolve(spec)
    except DataError as error:
        raise DataError(f"--input {error}") from None
    name = f"{spec} at {location.revision[:12]}" if location.revision else spec
    report(f"{name}: {len(location.sources):,} shards{f'; licence: {location.licence}' if location.licence else ''}")
    if tuple(keys) != PreprocessOptions.json_keys or location.keys == PreprocessOptions.json_keys:
        return list(location.sources)
    return [replace(source, rows=partial(_joined_rows, source, location)) for source in location.sources]


def _joined_rows(source: TextSource, location: TextLocation, keys: Sequence[str], start: int) -> Iterator[Row]:
    assert source.rows is not None
    for row in source.rows(location.keys, start):
        texts = [row[key] for key in location.keys]
        complete = all(isinstance(text, str) for text in texts)
        yield {"text": "\n\n".join(filter(None, texts)) if complete else None}


def _existing(prefix: str, recorded: dict[str, Any], refuse: bool) -> PreprocessResult | None:
    """The data set at `prefix` if it is complete and made with the same options; None if nothing is there."""
    there = [path for path in (bin_path(prefix), idx_path(prefix), manifest_path(prefix)) if path.exists()]
    if not there:
        return None
    again = "use --overwrite to make it again, or another --output-prefix"
    if manifest_path(prefix) not in there:
        raise DataError(f"{there[0]} exists without a manifest (unfinished, or made by another tool); {again}")
    if refuse:
        raise DataError(f"{prefix}: a data set exists already; {again}")
    manifest = read_manifest(prefix)
    changed = [key for key in sorted({*recorded, *manifest.options}) if recorded.get(key) != manifest.options.get(key)]
    if changed:
        was = ", ".join(f"{key} {manifest.options.get(key)!r} (now {recorded.get(key)!r})" for key in changed)
        raise DataError(f"{prefix}: a data set exists already, made with other options: {was}; {again}")
    return PreprocessResult(prefix, manifest, already_there=True)


def _check_unfinished(folder: Path, options: PreprocessOptions) -> None:
    """Keeps the units of a killed run unless --overwrite is given; the bare command resumes by itself.

    A run that was killed between the renames that end it is completed first. Raises DataError.
    """
    if options.overwrite or read_plan(folder) is None:
        return
    if options.inputs and not options.resume:
        raise DataError(f"{folder}: an unfinished run of this output; --resume resumes it, --overwrite starts again")
    if (folder / READY).exists():
        output = UnfinishedOutput(folder, 0, ())
        commit(folder)
        output.close(keep=False)


def open_tokenizer(options: PreprocessOptions, sources: list[TextSource], report: Callable[[str], None]) -> Tokenizer:
    """The tokenizer that the options name or train."""
    if options.tokenizer_model is not None:
        tokenizer = load_tokenizer(options.tokenizer_model, eod_token=options.eod_token)
        if options.tokenizer_kind not in (None, tokenizer.kind):
            raise DataError(
                f"--tokenizer-model {options.tokenizer_model} is a {tokenizer.kind} tokenizer, but --tokenizer-type asks for "
                f"{options.tokenizer_kind}; leave --tokenizer-type out"
            )
    elif options.vocab_file is not None and options.merge_file is not None:
        tokenizer = gpt2_tokenizer(options.vocab_file, options.merge_file, options.eod_token)
    else:
        tokenizer = _trained(options, sources, report)
    if options.append_eod and tokenizer.eod_id is None:
        raise DataError(
            f"--append-eod: the tokenizer {options.tokenizer_model} names no end-of-document token; name one with --eod-token"
        )
    return tokenizer


def _trained(options: PreprocessOptions, sources: list[TextSource], report: Callable[[str], None]) -> Tokenizer:
    assert options.train_tokenizer is not None
    report(f"training a byte-level BPE tokenizer with a vocabulary of {options.train_tokenizer:,}")
    progress = Progress("reading for the tokenizer", options.log_interval)
    tokenizer = train_bpe(_training_texts(options, sources, progress), options.train_tokenizer)
    report(f"tokenizer trained: {tokenizer.vocab_size:,} tokens, {progress.seconds:.1f} s")
    return tokenizer


def _training_texts(options: PreprocessOptions, sources: list[TextSource], progress: Progress) -> Iterator[str]:
    """Every text of the input, for training a tokenizer. Raises DataError if there is none."""
    reader = DocumentReader(sources, options.json_keys, options.doc_separator, options.on_error)
    text_bytes = documents = 0
    for document in reader:
        for text in document.texts:
            documents += 1
            text_bytes += len(text.encode("utf-8"))
            yield text
        progress.update(
            documents, text_bytes, None, reader.bytes_read / reader.total_bytes if reader.total_bytes else None
        )
    if text_bytes == 0:
        raise DataError("no document with text in the input; nothing was written")


class _Run:
    """One run of `preprocess` into the folder of an unfinished output."""

    def __init__(
        self,
        options: PreprocessOptions,
        sources: list[TextSource],
        output: UnfinishedOutput,
        report: Callable[[str], None],
    ) -> None:
        self._options, self._sources, self._output, self._report = options, sources, output, report
        self._total = sum(source.size for source in sources)
        self._progress = Progress("tokenising", options.log_interval)

    def run(self, prefixes: dict[str, str]) -> list[PreprocessResult]:
        options, output = self._options, self._output
        if not self._sources:
            raise DataError("no document with text in the input; nothing was written")
        resuming = options.resume or not options.inputs
        there = read_plan(output.folder) if resuming and not options.overwrite else None
        kept = output.folder / "trained.tokenizer.json"
        if there is not None and options.train_tokenizer is not None and kept.exists():
            tokenizer: Tokenizer = load_tokenizer(kept)
        else:
            tokenizer = open_tokenizer(options, self._sources, self._report)
        size = shard_bytes(options.shard_size or (there or {}).get("shard_size"), self._total)
        dtype = token_dtype(options.dtype, tokenizer.vocab_size)
        plan = {
            "options": options.recorded(" ".join(options.json_keys)),
            "tokenizer": tokenizer.fingerprint,
            "eod_id": tokenizer.eod_id,
            "dtype": dtype.name,
            "itemsize": dtype.itemsize,
            "shard_size": size,
            "inputs": [source.signature for source in self._sources],
        }
        if there is not None:
            output.resume(plan)
            if output.state.units:
                self._report(f"resuming after {output.state.units:,} finished units")
        else:
            output.begin(plan)
            if options.train_tokenizer is not None:
                tokenizer.save(output.folder / "trained")
        job = self._encode(tokenizer, size, dtype)
        return self._finish(prefixes, tokenizer, job)

    def _encode(self, tokenizer: Tokenizer, size: int, dtype: np.dtype[Any]) -> EncodeJob:
        options, output = self._options, self._output
        planner = Planner(self._sources, options.json_keys, options.separator, size, output.folder)
        units = planner.units(output.state.units, output.state.pieces)
        first = next(units, None)
        sample = [] if first is None else sample_texts(self._sources, first, options)
        job = EncodeJob(
            options,
            tuple(self._sources),
            dtype=dtype.str,
            eod_id=tokenizer.eod_id if options.append_eod else None,
            shard_size=size,
            folder=output.folder,
            encoder=choose_encoder(options.backend, tokenizer, sample, self._report),
        )
        if first is not None:
            all_units = itertools.chain([first], units)
            for unit, result in results(job, all_units, options.workers):
                self._take(unit, result)
        self._show(finish=True)
        return job

    def _take(self, unit: WorkUnit, result: UnitResult) -> None:
        """Commits a unit, or raises the fault that stopped it."""
        output = self._output
        if result.fault is not None:
            source, number, reason = result.fault
            raise DataError(f"{output.place(source, number)}: {reason} ({SKIP_HINT})")
        if result.mismatch is not None:
            self._report(
                f"unit {unit.index}: the fast back end differs from the tokenizer's own library for a text like "
                f"{result.mismatch!r}; the unit was encoded by the latter. Please report it to the back end's authors"
            )
        if result.first_duplicate is not None and not output.state.counts["duplicate_keys"]:
            self._report(
                f"{output.place(*result.first_duplicate)}: a key comes twice in one object; the last one counts"
            )
        output.commit(unit, result)
        self._show()

    def _show(self, finish: bool = False) -> None:
        state = self._output.state
        documents, errors = state.totals[0].documents, state.counts["rejected"]
        text_bytes, tokens = sum(t.text_bytes for t in state.totals), sum(t.tokens for t in state.totals)
        if finish:
            self._progress.finish(documents, text_bytes, tokens, errors)
        else:
            share = min(1.0, state.stored / self._total) if self._total else None
            self._progress.update(documents, text_bytes, tokens, share, errors)

    def _finish(self, prefixes: dict[str, str], tokenizer: Tokenizer, job: EncodeJob) -> list[PreprocessResult]:
        output, state = self._output, self._output.state
        for key, total in zip(prefixes, state.totals, strict=True):
            if total.tokens == 0:
                which = f"key {key!r}: " if len(prefixes) > 1 else ""
                raise DataError(which + _no_documents(output))
        manifests, steps = {}, []
        for number, ((key, prefix), (tokens, lengths)) in enumerate(
            zip(prefixes.items(), output.finish(), strict=True)
        ):
            aside = output.folder / Path(prefix).name
            size, digest = write_index(idx_path(aside), job.dtype, lambda path=lengths: _lengths(path))  # type: ignore[misc]
            files = {
                bin_path(aside).name: {"bytes": tokens.stat().st_size, "xxh3": output.digests[number].hexdigest()},
                idx_path(aside).name: {"bytes": size, "xxh3": digest},
            }
            manifests[prefix] = self._manifest(key, number, tokenizer, job, aside, files)
            steps += steps_to_commit(output.folder, prefix, manifests[prefix], {bin_path(aside).name: tokens.name})
        write_atomic(output.folder / READY, json.dumps(steps))
        commit(output.folder)
        return [PreprocessResult(prefix, manifest, already_there=False) for prefix, manifest in manifests.items()]

    def _manifest(
        self, key: str, number: int, tokenizer: Tokenizer, job: EncodeJob, aside: Path, files: dict[str, dict[str, Any]]
    ) -> DatasetManifest:
        state = self._output.state
        total = state.totals[number]
        record, added = tokenizer_record(tokenizer, aside)
        return DatasetManifest(
            tokenizer=record,
            dtype=np.dtype(job.dtype).name,
            appended_eod=self._options.append_eod,
            counts={
                "documents": total.documents,
                "tokens": total.tokens,
                "text_bytes": total.text_bytes,
                "empty_documents": total.empty,
                "unknown_tokens": total.unknown,
                "blank_lines": state.counts["blank_lines"],
                "rejected_documents": state.counts["rejected"],
                "replaced_documents": state.counts["replaced"],
                "duplicate_keys": state.counts["duplicate_keys"],
                "long_documents": state.counts["long_documents"],
            },
            options=self._options.recorded(key),
            files=files | added,
            rejects=state.rejects,
            shards=state.hashes[number],
            encoder=job.encoder.name,
        )


def sample_texts(sources: list[TextSource], unit: WorkUnit, options: PreprocessOptions) -> list[str]:
    """The beginnings of the first documents of a unit, faulty ones left out."""
    found: list[str] = []
    left = SAMPLE_CHARACTERS
    for piece in unit.pieces:
        reader = RecordReader(options.json_keys, lambda number, reason: None, repair=True)
        for texts in read_piece(sources[piece.source], piece, reader, options.separator):
            for text in texts:
                found.append(text[:SAMPLE_DOCUMENT_CHARACTERS])
                left -= len(found[-1]) + 64
            if left <= 0:
                return found
    return found


def token_dtype(wanted: str, vocab_size: int) -> np.dtype[Any]:
    """The dtype asked for, if the vocabulary fits, or the one that Megatron would take. Raises DataError."""
    if wanted == "auto":
        return best_dtype(vocab_size)
    dtype = np.dtype(wanted).newbyteorder("<")
    if vocab_size - 1 > np.iinfo(dtype).max:
        raise DataError(
            f"--dtype {wanted} holds ids up to {np.iinfo(dtype).max:,}; the vocabulary has {vocab_size:,}: use a wider one"
        )
    return dtype


def _lengths(path: Path) -> Iterator[np.ndarray]:
    """The int32 lengths in a file, an array at a time."""
    with open(path, "rb") as file:
        while raw := file.read(4 * LENGTHS_AT_A_TIME):
            yield np.frombuffer(raw, dtype="<i4")


def _no_documents(output: UnfinishedOutput) -> str:
    counts, rejects = output.state.counts, output.state.rejects
    return (
        f"no document with text in the input ({counts['rejected']} rejected, {counts['blank_lines']} blank lines"
        + (f"; first rejected: {rejects[0]['place']}: {rejects[0]['reason']}" if rejects else "")
        + "); nothing was written"
    )
