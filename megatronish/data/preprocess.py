"""Text in, a committed data set out: read, tokenise, write aside, sync, rename, and the manifest last.

A run that is killed leaves nothing under the final name (or, between the renames, files without a manifest, which no
reader accepts). Memory is bounded by a batch of documents and by 20 bytes of index a document.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from megatronish.config.files import sync
from megatronish.data.builder import IndexedWriter
from megatronish.data.corpus import default_corpus, default_corpus_description
from megatronish.data.documents import Document, DocumentReader, ReadReport, find_inputs
from megatronish.data.errors import DataError
from megatronish.data.indexed import best_dtype, bin_path, idx_path
from megatronish.data.manifest import Manifest, TokenizerRecord, manifest_path, read_manifest
from megatronish.data.progress import Progress
from megatronish.data.tokenizer import Tokenizer, load_tokenizer, train_bpe

DEFAULT_OUTPUT_PREFIX = "data/default"
DEFAULT_VOCAB_SIZE = 4096
# Enough work for every thread to amortise a call, little enough to keep memory flat.
BATCH_BYTES = 2_000_000


@dataclass(frozen=True)
class PreprocessOptions:
    """What to prepare. No `inputs` means the embedded default corpus with a tokenizer trained on it.

    Exactly one of `tokenizer_model` (see `load_tokenizer`; `tokenizer_kind` is what it must turn out to be) and
    `train_tokenizer` (vocabulary size) for other inputs.
    """

    inputs: tuple[str, ...] = ()
    output_prefix: str = DEFAULT_OUTPUT_PREFIX
    json_keys: tuple[str, ...] = ("text",)
    tokenizer_model: str | None = None
    tokenizer_kind: str | None = None
    train_tokenizer: int | None = None
    eod_token: str | None = None
    append_eod: bool = False
    doc_separator: str | None = None
    on_error: str = "fail"
    workers: int = 1
    overwrite: bool = False
    log_interval: int = 0

    def recorded(self, key: str) -> dict[str, Any]:
        """The options that shape the result, as the manifest keeps them (not workers, overwriting or logging)."""
        source = {"inputs": list(self.inputs)} if self.inputs else default_corpus_description()
        return {
            **source,
            "json_key": key,
            "tokenizer_model": self.tokenizer_model,
            "train_tokenizer": self.train_tokenizer,
            "eod_token": self.eod_token,
            "append_eod": self.append_eod,
            "doc_separator": self.doc_separator,
            "on_error": self.on_error,
        }


@dataclass(frozen=True)
class PreprocessResult:
    """One finished data set: the path to give as `data.path`, its manifest, and whether it was already there."""

    prefix: str
    manifest: Manifest
    already_there: bool


class DocumentSource(Protocol):
    """Documents that can be read more than once; `total_bytes` is 0 where it is not known beforehand."""

    report: ReadReport
    total_bytes: int

    def __iter__(self) -> Iterator[Document]: ...


class DefaultCorpusSource:
    """The embedded default corpus as a document source."""

    def __init__(self, say: Callable[[str], None]) -> None:
        self.report = ReadReport()
        self.total_bytes = 0
        self._say = say

    def __iter__(self) -> Iterator[Document]:
        self.report = ReadReport()
        for name, text in default_corpus(self._say):
            self.report.bytes_read += len(text.encode("utf-8"))
            yield Document((text,), name)
        self._say = _say_nothing  # the note about a small corpus is for the first pass only
        self.total_bytes = self.report.bytes_read


def preprocess(options: PreprocessOptions, say: Callable[[str], None]) -> list[PreprocessResult]:
    """Prepares one data set a JSON key at `OUTPUT_PREFIX_KEY_document`. `say` takes one line of news at a time.

    Raises DataError for anything the user can put right, OSError when the disk does not serve.
    """
    _check(options)
    prefixes = {key: f"{options.output_prefix}_{key}_document" for key in options.json_keys}
    if not options.overwrite:
        done = [_existing(prefix, options.recorded(key), bool(options.inputs)) for key, prefix in prefixes.items()]
        if all(result is not None for result in done):
            return [result for result in done if result is not None]
    source: DocumentSource = DefaultCorpusSource(say)
    if options.inputs:
        source = DocumentReader(find_inputs(options.inputs), options.json_keys, options.doc_separator, options.on_error)
    folder = Path(options.output_prefix).parent
    try:
        folder.mkdir(parents=True, exist_ok=True)
        staging = Path(tempfile.mkdtemp(prefix=f".{Path(options.output_prefix).name}.unfinished-", dir=folder))
    except OSError as error:
        raise DataError(
            f"--output-prefix {options.output_prefix}: cannot write in {folder}: {error.strerror}"
        ) from None
    try:
        tokenizer = _tokenizer(options, source, say)
        manifests = _write(options, source, tokenizer, staging)
        return [_commit(staging, prefix, manifests[key]) for key, prefix in prefixes.items()]
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _check(options: PreprocessOptions) -> None:
    if options.on_error not in ("fail", "skip"):
        raise DataError(f"--on-error {options.on_error}: choose fail or skip")
    if options.workers < 1:
        raise DataError(f"--workers {options.workers}: at least 1 is needed")
    if len(set(options.json_keys)) != len(options.json_keys) or not options.json_keys:
        raise DataError(f"--json-keys {' '.join(options.json_keys)}: give each key once")
    if options.tokenizer_model is not None and options.train_tokenizer is not None:
        raise DataError("--tokenizer-model and --train-tokenizer exclude each other; give one")
    if options.tokenizer_model is None and options.train_tokenizer is None:
        raise DataError(
            "no tokenizer; give --tokenizer-model (a tokenizer.json, its folder, a SentencePiece .model, or `bytes`) "
            f"or --train-tokenizer VOCABULARY_SIZE (for example {DEFAULT_VOCAB_SIZE})"
        )
    if not Path(options.output_prefix).name:
        raise DataError(f"--output-prefix {options.output_prefix!r}: a file name must follow the folder")


def _existing(prefix: str, recorded: dict[str, Any], refuse: bool) -> PreprocessResult | None:
    """The data set at `prefix` if it is complete and made with the same options; None if nothing is there."""
    there = [path for path in (bin_path(prefix), idx_path(prefix), manifest_path(prefix)) if path.exists()]
    if not there:
        return None
    again = "use --overwrite to make it again, or another --output-prefix"
    if manifest_path(prefix) not in there:
        raise DataError(f"{there[0]} exists without a manifest (unfinished, or made by another tool); {again}")
    if refuse:
        raise DataError(f"{prefix}: a data set is already there; {again}")
    manifest = read_manifest(prefix)
    changed = [key for key in sorted({*recorded, *manifest.options}) if recorded.get(key) != manifest.options.get(key)]
    if changed:
        was = ", ".join(f"{key} {manifest.options.get(key)!r} (now {recorded.get(key)!r})" for key in changed)
        raise DataError(f"{prefix}: a data set is already there, made with other options: {was}; {again}")
    return PreprocessResult(prefix, manifest, already_there=True)


def _tokenizer(options: PreprocessOptions, source: DocumentSource, say: Callable[[str], None]) -> Tokenizer:
    if options.tokenizer_model is not None:
        tokenizer = load_tokenizer(options.tokenizer_model, eod_token=options.eod_token, threads=options.workers)
        if options.tokenizer_kind not in (None, tokenizer.kind):
            raise DataError(
                f"--tokenizer-model {options.tokenizer_model} is a {tokenizer.kind} tokenizer, but --tokenizer-type asks for "
                f"{options.tokenizer_kind}; leave --tokenizer-type out"
            )
    else:
        assert options.train_tokenizer is not None
        say(f"training a byte-level BPE tokenizer with a vocabulary of {options.train_tokenizer:,}")
        progress = Progress("reading for the tokenizer", options.log_interval)
        tokenizer = train_bpe(_texts(source, progress), options.train_tokenizer)
        say(f"tokenizer trained: {tokenizer.vocab_size:,} tokens, {progress.seconds:.1f} s")
    if options.append_eod and tokenizer.eod_id is None:
        raise DataError(
            f"--append-eod: the tokenizer {options.tokenizer_model} names no end-of-document token; name one with --eod-token"
        )
    return tokenizer


def _texts(source: DocumentSource, progress: Progress) -> Iterator[str]:
    """Every text of a source, for training a tokenizer. Raises DataError if there is none."""
    text_bytes = 0
    for documents, document in enumerate(source, start=1):
        for text in document.texts:
            text_bytes += len(text.encode("utf-8"))
            yield text
        progress.update(documents, text_bytes, None, _fraction(source))
    if text_bytes == 0:
        raise DataError(_no_documents(source))


def _fraction(source: DocumentSource) -> float | None:
    return min(1.0, source.report.bytes_read / source.total_bytes) if source.total_bytes else None


def _no_documents(source: DocumentSource) -> str:
    report = source.report
    return (
        f"no document with text in the input ({report.rejected} rejected, {report.blank_lines} blank lines"
        + (f"; first rejected: {report.rejects[0]['place']}: {report.rejects[0]['reason']}" if report.rejects else "")
        + "); nothing was written"
    )


class _KeyOutput:
    """One data set being written: the tokens of one key."""

    def __init__(self, prefix: Path, tokenizer: Tokenizer, append_eod: bool) -> None:
        self.writer = IndexedWriter(prefix, best_dtype(tokenizer.vocab_size))
        self.prefix = prefix
        self.text_bytes = 0
        self.empty_documents = 0
        self.unknown_tokens = 0
        self._unknown_id = tokenizer.unknown_id
        self._ending = np.array([tokenizer.eod_id], dtype=np.int32) if append_eod else None

    def add(self, ids: np.ndarray, size: int, place: str) -> None:
        if ids.size == 0:
            self.empty_documents += 1
            return
        try:
            self.writer.add_document(ids if self._ending is None else np.concatenate((ids, self._ending)))
        except DataError as error:
            raise DataError(f"{place}: {error}") from None
        self.text_bytes += size
        if self._unknown_id is not None:
            self.unknown_tokens += int(np.count_nonzero(ids == self._unknown_id))


def _batches(source: DocumentSource) -> Iterator[list[Document]]:
    batch: list[Document] = []
    size = 0
    for document in source:
        batch.append(document)
        size += sum(map(len, document.texts)) + 64
        if size >= BATCH_BYTES:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _write(
    options: PreprocessOptions, source: DocumentSource, tokenizer: Tokenizer, staging: Path
) -> dict[str, Manifest]:
    """Tokenises every document into `staging` and returns the manifests by key."""
    outputs = {
        key: _KeyOutput(staging / f"{Path(options.output_prefix).name}_{key}_document", tokenizer, options.append_eod)
        for key in options.json_keys
    }
    try:
        _tokenise(source, tokenizer, list(outputs.values()), Progress("tokenising", options.log_interval))
        for output in outputs.values():
            output.writer.finalize()
    finally:
        for output in outputs.values():
            output.writer.close()
    manifests = {}
    for key, output in outputs.items():
        if output.writer.tokens == 0:
            raise DataError(f"key {key!r}: {_no_documents(source)}" if len(outputs) > 1 else _no_documents(source))
        manifests[key] = _manifest(options.recorded(key), source.report, tokenizer, output, options.append_eod)
    return manifests


def _tokenise(source: DocumentSource, tokenizer: Tokenizer, outputs: list[_KeyOutput], progress: Progress) -> None:
    """Encodes batches in one thread (the back ends spread over cores) while this one reads and writes."""
    state = {"documents": 0}

    def store(batch: list[Document], future: Future[list[np.ndarray]]) -> None:
        ids = iter(future.result())
        for document in batch:
            for output, text in zip(outputs, document.texts, strict=True):
                output.add(next(ids), len(text.encode("utf-8")), document.place)
        state["documents"] += len(batch)
        done = (sum(output.text_bytes for output in outputs), sum(output.writer.tokens for output in outputs))
        progress.update(state["documents"], *done, _fraction(source))

    with ThreadPoolExecutor(max_workers=1, thread_name_prefix="encode") as pool:
        waiting: tuple[list[Document], Future[list[np.ndarray]]] | None = None
        for batch in _batches(source):
            following = (batch, pool.submit(tokenizer.encode_batch, [t for document in batch for t in document.texts]))
            if waiting is not None:
                store(*waiting)
            waiting = following
        if waiting is not None:
            store(*waiting)
    progress.finish(
        state["documents"],
        sum(output.text_bytes for output in outputs),
        sum(output.writer.tokens for output in outputs),
    )


def _manifest(
    recorded: dict[str, Any], report: ReadReport, tokenizer: Tokenizer, output: _KeyOutput, append_eod: bool
) -> Manifest:
    writer = output.writer
    tokenizer_file = tokenizer.save(output.prefix)
    files = {
        f"{output.prefix.name}.{suffix}": {"bytes": writer.sizes[suffix], "sha256": writer.sha256[suffix]}
        for suffix in ("bin", "idx")
    }
    if tokenizer_file is not None:
        files[tokenizer_file.name] = {"bytes": tokenizer_file.stat().st_size, "sha256": tokenizer.fingerprint}
    return Manifest(
        tokenizer=TokenizerRecord(
            kind=tokenizer.kind,
            file=tokenizer_file.name if tokenizer_file is not None else None,
            sha256=tokenizer.fingerprint,
            vocab_size=tokenizer.vocab_size,
            eod_id=tokenizer.eod_id,
        ),
        dtype=writer.dtype.name,
        appended_eod=append_eod,
        counts={
            "documents": writer.documents,
            "tokens": writer.tokens,
            "text_bytes": output.text_bytes,
            "empty_documents": output.empty_documents,
            "unknown_tokens": output.unknown_tokens,
            "blank_lines": report.blank_lines,
            "rejected_documents": report.rejected,
        },
        options=recorded,
        files=files,
        rejects=report.rejects,
    )


def _commit(staging: Path, prefix: str, manifest: Manifest) -> PreprocessResult:
    """Moves a finished data set to its name: an old manifest goes first, the new one comes last."""
    target = Path(prefix).parent
    written = manifest_path(staging / Path(prefix).name)
    written.write_text(manifest.to_json(), encoding="utf-8")
    for name in [*manifest.files, written.name]:
        sync(staging / name)
    manifest_path(prefix).unlink(missing_ok=True)
    for suffix in (".tokenizer.json", ".tokenizer.model"):
        stale = Path(f"{prefix}{suffix}")
        if stale.name not in manifest.files:
            stale.unlink(missing_ok=True)
    for name in manifest.files:
        os.replace(staging / name, target / name)
    sync(target)
    os.replace(written, manifest_path(prefix))
    sync(target)
    return PreprocessResult(prefix, manifest, already_there=False)


def _say_nothing(line: str) -> None:
    """Takes a line of news and drops it."""


def summary(result: PreprocessResult) -> Sequence[str]:
    """Lines that tell a user what a data set holds."""
    counts, tokenizer = result.manifest.counts, result.manifest.tokenizer
    lines = [
        f"{result.prefix}: {'already there' if result.already_there else 'written'}: {counts['documents']:,} documents, "
        f"{counts['tokens']:,} tokens of {result.manifest.dtype}, {counts['text_bytes'] / 1e6:.1f} MB of text, "
        f"{counts['text_bytes'] / max(counts['tokens'], 1):.2f} bytes a token, {tokenizer.kind} vocabulary {tokenizer.vocab_size:,}"
    ]
    passed = {
        "empty documents dropped": counts["empty_documents"],
        "blank lines ignored": counts["blank_lines"],
        "faulty documents skipped": counts["rejected_documents"],
        "unknown tokens (text that this tokenizer cannot hold is lost)": counts["unknown_tokens"],
    }
    told = [f"{number:,} {what}" for what, number in passed.items() if number]
    if told:
        lines.append(f"  {', '.join(told)}")
    lines += [f"  skipped {reject['place']}: {reject['reason']}" for reject in result.manifest.rejects[:3]]
    if counts["documents"] == 1:
        lines.append(
            "  one document only: nothing can be held out for validation; --doc-separator cuts a text into documents"
        )
    return lines
