"""The subcommands of tools/preprocess_data.py: inspect, verify, merge, split, decode, train-tokenizer."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import xxhash

from megatronish.data.indexed.format import IndexedReader
from megatronish.data.indexed.manifest import DatasetManifest, manifest_path, read_manifest
from megatronish.data.readers.documents import DocumentReader
from megatronish.data.readers.inputs import find_inputs
from megatronish.data.readers.records import ON_ERROR
from megatronish.data.tokenizers.tokenizer import Tokenizer, load_tokenizer, train_bpe, train_unigram
from megatronish.errors import DataError
from megatronish.preprocessing.progress import Progress
from megatronish.preprocessing.surgery import merge, split

Report = Callable[[str], None]
READ_BYTES = 1 << 24
TOKENS_AT_A_TIME = 1 << 24


def add_command_arguments(parser: argparse.ArgumentParser, name: str) -> None:
    """The arguments of a subcommand."""
    add = parser.add_argument
    if name in ("inspect", "verify"):
        add("prefix", nargs="+", help="path of a data set, without suffix")
    if name == "merge":
        add("--output-prefix", required=True, metavar="PREFIX", help="the data set to make, without suffix")
        add("--input", nargs="+", required=True, metavar="PREFIX", help="data sets, in this order")
        add("--overwrite", action="store_true")
    if name == "split":
        add("prefix", help="path of a data set, without suffix")
        add("--parts", nargs="+", required=True, metavar="NAME=SHARE", help="for example train=0.98 valid=0.02")
        add("--output-prefix", metavar="PREFIX", help="makes PREFIX_NAME (the data set's own)")
        add("--seed", type=int, help="choose documents at random (each part keeps their order); else in order")
        add("--overwrite", action="store_true")
    if name == "decode":
        add("prefix", help="path of a data set, without suffix")
        add("--documents", nargs="+", default=["0"], metavar="N", help="numbers, or ranges such as 10-12 (0)")
        add("--tokens", action="store_true", help="token ids instead of text")
    if name == "train-tokenizer":
        add("--input", nargs="+", required=True, metavar="FILE", help="files as for preprocessing")
        add("--output", required=True, metavar="FILE", help="the tokenizer.json to write")
        add("--vocab-size", type=int, required=True, metavar="N", help="with 256 bytes and the end-of-document token")
        add("--model", choices=("bpe", "unigram"), default="bpe")
        add("--json-keys", nargs="+", default=["text"], metavar="KEY")
        add("--doc-separator", metavar="TEXT", help=r"cut text files into documents at TEXT; \n and \t are understood")
        add("--on-error", choices=ON_ERROR, default="fail")
        add("--sample-bytes", type=int, default=0, metavar="N", help="read about this much, spread evenly (0: all)")
        add("--overwrite", action="store_true")


def run_command(name: str, arguments: argparse.Namespace, report: Report) -> None:
    """Runs a subcommand. Raises DataError, after all results are reported, where something is wrong."""
    if name == "inspect":
        for prefix in arguments.prefix:
            inspect(prefix, report)
    elif name == "verify":
        problems = [problem for prefix in arguments.prefix for problem in verify(prefix, report)]
        if problems:
            raise DataError("; ".join(problems))
    elif name == "merge":
        report(merge(arguments.input, arguments.output_prefix, arguments.overwrite))
    elif name == "split":
        output = arguments.output_prefix or arguments.prefix
        for line in split(arguments.prefix, output, _shares(arguments.parts), arguments.seed, arguments.overwrite):
            report(line)
    elif name == "decode":
        decode(arguments.prefix, arguments.documents, arguments.tokens, report)
    else:
        _train(arguments, report)


def _manifest_of(prefix: str) -> DatasetManifest | None:
    """The manifest, None for a data set that another tool made."""
    return read_manifest(prefix) if manifest_path(prefix).exists() else None


def inspect(prefix: str, report: Report) -> None:
    """Reports the contents of a data set."""
    manifest, reader = _manifest_of(prefix), IndexedReader(prefix)
    lengths = reader.document_lengths
    report(
        f"{prefix}: {reader.num_documents:,} documents in {len(reader.sequence_lengths):,} sequences, {reader.num_tokens:,} "
        f"tokens of {reader.dtype.name}, {reader.num_tokens * reader.dtype.itemsize / 1e6:,.1f} MB"
    )
    if len(lengths):
        marks = np.percentile(lengths, [0, 25, 50, 75, 100]).astype(np.int64).tolist()
        report(f"  tokens per document: mean {lengths.mean():,.1f}; minimum, quartiles and maximum {marks}")
    if manifest is None:
        report("  no manifest: made by another tool; its tokenizer is not known")
        return
    tokenizer = manifest.tokenizer
    report(
        f"  tokenizer: {tokenizer.kind}, vocabulary {tokenizer.vocab_size:,}, end of document "
        f"{tokenizer.eod_id} ({'appended' if manifest.appended_eod else 'not appended'}), SHA-256 {tokenizer.sha256[:16]}"
    )
    report(f"  counts: {', '.join(f'{name} {count:,}' for name, count in manifest.counts.items())}")
    report(f"  made with: {', '.join(f'{name} {value!r}' for name, value in manifest.options.items() if value)}")
    for reject in manifest.rejects[:5]:
        report(f"  rejected {reject['place']}: {reject['reason']}")
    own = _tokenizer_of(prefix, manifest)
    for number in range(min(3, reader.num_documents)):
        report(f"  document {number}: {own.decode(reader.document(number)[:40])!r}")


def verify(prefix: str, report: Report) -> list[str]:
    """Checks structure, hashes and token range of a data set; returns what is wrong, empty if nothing is."""
    manifest, reader = _manifest_of(prefix), IndexedReader(prefix)
    problems = []
    vocab_size = manifest.tokenizer.vocab_size if manifest is not None else None
    largest = -1
    for start in range(0, reader.num_tokens, TOKENS_AT_A_TIME):
        part = reader.tokens_view[start : start + TOKENS_AT_A_TIME]
        largest = max(largest, int(part.max()))
        if int(part.min()) < 0:
            problems.append(f"{prefix}: a negative token id near token {start:,}")
            break
    if vocab_size is not None and largest >= vocab_size:
        problems.append(f"{prefix}: token id {largest}, but the vocabulary ends at {vocab_size - 1}")
    if manifest is None:
        report(f"{prefix}: the index is sound; there is no manifest to compare the contents with")
        return problems
    for name, record in manifest.files.items():
        algorithm = "xxh3" if "xxh3" in record else "sha256"
        actual = _hash(Path(prefix).parent / name, algorithm)
        if actual != record[algorithm]:
            problems.append(f"{name}: {algorithm} is {actual}, the manifest records {record[algorithm]}")
    for count, actual_count in (("documents", reader.num_documents), ("tokens", reader.num_tokens)):
        if manifest.counts[count] != actual_count:
            problems.append(f"{prefix}: {actual_count:,} {count}, the manifest records {manifest.counts[count]:,}")
    if manifest.appended_eod:
        ends = reader.document_starts[1:][reader.document_lengths > 0] - 1
        missing = int((reader.tokens_view[ends] != manifest.tokenizer.eod_id).sum())
        if missing:
            problems.append(f"{prefix}: {missing:,} documents do not end with the end-of-document token")
    if not problems:
        report(f"{prefix}: equals its manifest: {reader.num_documents:,} documents, {reader.num_tokens:,} tokens")
    return problems


def _hash(path: Path, algorithm: str) -> str:
    import hashlib

    digest = xxhash.xxh3_128() if algorithm == "xxh3" else hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(READ_BYTES):
            digest.update(block)
    return digest.hexdigest()


def _tokenizer_of(prefix: str, manifest: DatasetManifest) -> Tokenizer:
    record = manifest.tokenizer
    source = "bytes" if record.file is None else Path(prefix).parent / record.file
    return load_tokenizer(source, eod_id=record.eod_id)


def decode(prefix: str, wanted: list[str], as_tokens: bool, report: Report) -> None:
    """Prints documents, each as it is and with a line end after it."""
    reader, manifest = IndexedReader(prefix), _manifest_of(prefix)
    if manifest is None and not as_tokens:
        raise DataError(f"{prefix}: no manifest, so no tokenizer to decode with; --tokens prints the ids")
    tokenizer = None if manifest is None else _tokenizer_of(prefix, manifest)
    for number in _numbers(wanted):
        if number >= reader.num_documents:
            raise DataError(f"--documents {number}: {prefix} has {reader.num_documents:,} documents, from 0")
        ids = reader.document(number)
        report(" ".join(map(str, ids.tolist())) if as_tokens or tokenizer is None else tokenizer.decode(ids))


def _numbers(wanted: list[str]) -> Iterator[int]:
    for part in wanted:
        first, _, last = part.partition("-")
        if not first.isdigit() or not (last or "0").isdigit():
            raise DataError(f"--documents {part}: give numbers from 0, or ranges such as 10-12")
        yield from range(int(first), int(last or first) + 1)


def _shares(parts: list[str]) -> dict[str, float]:
    shares = {}
    for part in parts:
        name, _, share = part.partition("=")
        try:
            shares[name] = float(share)
        except ValueError:
            raise DataError(f"--parts {part}: write NAME=SHARE, such as train=0.98") from None
    if len(shares) != len(parts) or not all(name and "/" not in name for name in shares):
        raise DataError(f"--parts {' '.join(parts)}: each part needs a name of its own")
    return shares


def _train(arguments: argparse.Namespace, report: Report) -> None:
    output = Path(arguments.output)
    if output.exists() and not arguments.overwrite:
        raise DataError(f"{output}: the file exists; use --overwrite, or another --output")
    separator = (arguments.doc_separator or "").replace("\\n", "\n").replace("\\t", "\t") or None
    reader = DocumentReader(find_inputs(arguments.input), arguments.json_keys, separator, arguments.on_error)
    progress = Progress("reading for the tokenizer")
    train = train_bpe if arguments.model == "bpe" else train_unigram
    tokenizer = train(_sampled(reader, arguments.sample_bytes, progress), arguments.vocab_size)
    output.parent.mkdir(parents=True, exist_ok=True)
    saved = tokenizer.save(output.parent / f".{output.name}.{xxhash.xxh3_64_hexdigest(str(output).encode())}")
    assert saved is not None
    saved.replace(output)
    report(f"{output}: {arguments.model}, {tokenizer.vocab_size:,} entries, {progress.seconds:.1f} s")


def _sampled(reader: DocumentReader, sample_bytes: int, progress: Progress) -> Iterator[str]:
    """All texts, or those that keep the share read at `sample_bytes` of the input as stored."""
    share = min(1.0, sample_bytes / reader.total_bytes) if sample_bytes and reader.total_bytes else 1.0
    taken = seen = 0
    documents = 0
    for document in reader:
        for text in document.texts:
            size = len(text.encode("utf-8"))
            if taken <= seen * share:
                taken += size
                documents += 1
                yield text
            seen += size
        progress.update(documents, taken, None, reader.bytes_read / max(1, reader.total_bytes))
    if not taken:
        raise DataError("no document with text in the input; nothing was written")
