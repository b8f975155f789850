#!/usr/bin/env python
"""Text to a Megatron-format data set (.bin, .idx) with its tokenizer and a manifest.

Without arguments: the source and documentation of this Python installation, with a tokenizer trained on it, at
data/default_text_document. With --input: your own JSON lines, parquet, text or Hugging Face data sets. A first argument of
inspect, verify, merge, split, decode or train-tokenizer does that instead; see `preprocess_data.py split --help`.
"""

from __future__ import annotations

import argparse
import gc
import os
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # run from a checkout that is not installed
if __name__ == "__main__":
    gc.disable()  # start-up makes many objects and no garbage; looking for some took a fifth of it (pool.py enables it)

from megatronish.data.readers.records import ON_ERROR
from megatronish.data.tokenizers.backends import BACKENDS
from megatronish.errors import DataError
from megatronish.preprocessing.options import (
    DEFAULT_MAX_DOC_BYTES,
    DEFAULT_OUTPUT_PREFIX,
    DEFAULT_VOCAB_SIZE,
    LONG_DOCUMENTS,
    TOKEN_DTYPES,
    PreprocessOptions,
)
from megatronish.preprocessing.pool import WorkerDied
from megatronish.preprocessing.preprocess import preprocess, summary

# Megatron's names for the tokenizers that --tokenizer-model can hold, and the kind that each must turn out to be.
TOKENIZER_TYPES = {
    "HuggingFaceTokenizer": "huggingface",
    "GPT2BPETokenizer": "huggingface",
    "SentencePieceTokenizer": "sentencepiece",
    "GPTSentencePieceTokenizer": "sentencepiece",
    "Llama2Tokenizer": "sentencepiece",
    "ByteLevelTokenizer": "bytes",
}
COMMANDS = {
    "inspect": "What data sets hold: manifest, lengths, the beginning of the first documents.",
    "verify": "Reads data sets completely and compares them with their manifests.",
    "merge": "Puts data sets one after another into one.",
    "split": "Cuts a data set into several, by shares of its documents.",
    "decode": "Prints documents as text.",
    "train-tokenizer": "Trains a tokenizer on text.",
}
SIZE_SUFFIXES = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30}


def size(text: str) -> int:
    """Bytes, with an optional K, M or G (powers of 1024)."""
    number = text.upper().removesuffix("B").rstrip("KMG")
    return int(float(number) * SIZE_SUFFIXES[text.upper().removesuffix("B")[len(number) :]])


def build_parser() -> argparse.ArgumentParser:
    """The command line; names that Megatron's tool has mean the same here."""
    parser = argparse.ArgumentParser(prog="preprocess_data.py", description=__doc__, allow_abbrev=False)
    _add_input(parser.add_argument_group("input"))
    _add_tokenizer(parser.add_argument_group("tokenizer"))
    _add_output(parser.add_argument_group("output"))
    _add_running(parser.add_argument_group("running"))
    return parser


def _add_input(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add(
        "--input",
        action="extend",
        nargs="+",
        default=[],
        metavar="FILE",
        help=".jsonl, .parquet or text (but parquet also .gz, .zst), globs, hf://NAME[:CONFIG][/SPLIT], https://...; repeatable",
    )
    add(
        "--json-keys",
        nargs="+",
        default=["text"],
        metavar="KEY",
        help="keys (columns) to take, one data set each (text)",
    )
    add("--doc-separator", metavar="TEXT", help=r"cut text files into documents at TEXT; \n and \t are understood")
    add(
        "--on-error",
        choices=ON_ERROR,
        default="fail",
        help="at a faulty document: stop, skip and count, or repair (fail)",
    )
    add(
        "--max-doc-bytes",
        type=size,
        default=DEFAULT_MAX_DOC_BYTES,
        metavar="SIZE",
        help="a longer one is long; 0: none (1M)",
    )
    add(
        "--long-documents",
        choices=LONG_DOCUMENTS,
        default="split",
        help="encode in parts, as one document, or skip (split)",
    )
    add("--keep-empty", action="store_true", help="keep empty documents, as documents without tokens")


def _add_tokenizer(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add(
        "--tokenizer-model",
        metavar="PATH",
        help="tokenizer.json, its folder, SentencePiece .model, .tiktoken, or `bytes`",
    )
    add("--tokenizer-type", choices=sorted(TOKENIZER_TYPES), help="checked against the model (Megatron's option)")
    add("--vocab-file", metavar="FILE", help="GPT-2's vocab.json, with --merge-file")
    add("--merge-file", metavar="FILE", help="GPT-2's merges.txt")
    add("--train-tokenizer", type=int, metavar="VOCAB", help=f"train a BPE on the input (bare: {DEFAULT_VOCAB_SIZE})")
    add("--eod-token", metavar="TOKEN", help="the tokenizer's token that ends a document, where it does not name one")
    add("--append-eod", action="store_true", help="end each document with that token (bare: yes)")
    add(
        "--backend", choices=BACKENDS, default="auto", help="library that encodes; auto: gigatoken if its ids are right"
    )


def _add_output(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add("--output-prefix", metavar="PREFIX", help=f"writes PREFIX_KEY_document.* (bare: {DEFAULT_OUTPUT_PREFIX})")
    add("--dtype", choices=TOKEN_DTYPES, default="auto", help="of a token; auto: Megatron's choice")
    add("--overwrite", action="store_true", help="replace an existing data set, or an unfinished run")
    add("--resume", action="store_true", help="resume after the finished part of a run that was stopped")
    add("--dry-run", action="store_true", help="encode a sample, print what the run would write, write nothing")


def _add_running(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    cores = len(os.sched_getaffinity(0))
    add(
        "--workers",
        type=int,
        default=cores,
        metavar="N",
        help="processes (all cores); the output does not depend on it",
    )
    add("--shard-size", type=size, metavar="SIZE", help="bytes of input in a unit of work (by the input's size)")
    add(
        "--partitions",
        type=int,
        default=1,
        metavar="N",
        help="accepted for Megatron's sake: all input is worked on at once",
    )
    add("--log-interval", type=int, default=0, metavar="N", help="a line every N documents (by time)")


def options_from(arguments: argparse.Namespace) -> PreprocessOptions:
    """Fills in what the bare command means. Raises DataError for options that do not go together."""
    bare = not arguments.input
    if not bare and not arguments.output_prefix:
        raise DataError("--input needs --output-prefix, where to write")
    wanted = TOKENIZER_TYPES.get(arguments.tokenizer_type)
    if wanted == "bytes" and arguments.tokenizer_model is None:
        arguments.tokenizer_model = "bytes"
    train = arguments.train_tokenizer
    if bare and train is None and arguments.tokenizer_model is None and arguments.vocab_file is None:
        train = DEFAULT_VOCAB_SIZE
    separator = arguments.doc_separator
    if separator is not None:
        separator = separator.replace("\\n", "\n").replace("\\t", "\t")
        if not separator:
            raise DataError("--doc-separator is empty; leave it out to keep each text file as one document")
    same = (
        "tokenizer_model", "vocab_file", "merge_file", "eod_token", "on_error", "max_doc_bytes", "long_documents", "keep_empty",
        "shard_size", "backend", "dtype", "workers", "overwrite", "resume", "log_interval",
    )  # fmt: skip
    return PreprocessOptions(
        inputs=tuple(arguments.input),
        output_prefix=arguments.output_prefix or DEFAULT_OUTPUT_PREFIX,
        json_keys=tuple(arguments.json_keys),
        tokenizer_kind=wanted,
        train_tokenizer=train,
        append_eod=arguments.append_eod or bare,
        doc_separator=separator,
        **{name: getattr(arguments, name) for name in same},
    )


def report(line: str) -> None:
    """Prints a line."""
    print(line, flush=True)


def prepare(argv: Sequence[str]) -> None:
    """Makes a data set, or prints what a run would write."""
    arguments = build_parser().parse_args(argv)
    # Read by the Rust thread pool of `tokenizers` when it first starts; workers are processes and switch it off.
    os.environ["RAYON_NUM_THREADS"] = str(max(1, arguments.workers))
    os.environ["TOKENIZERS_PARALLELISM"] = "true"
    if arguments.partitions != 1:
        report("--partitions: the input is cut into units of its own accord; the option changes nothing")
    options = options_from(arguments)
    if arguments.dry_run:
        from megatronish.preprocessing.dry_run import dry_run

        report("\n".join(dry_run(options, report)))
        return
    for result in preprocess(options, report):
        report("\n".join(summary(result)))


def command(argv: Sequence[str]) -> None:
    """Runs a subcommand."""
    gc.enable()
    from megatronish.preprocessing.commands import add_command_arguments, run_command

    parser = argparse.ArgumentParser(
        prog=f"preprocess_data.py {argv[0]}", description=COMMANDS[argv[0]], allow_abbrev=False
    )
    add_command_arguments(parser, argv[0])
    run_command(argv[0], parser.parse_args(argv[1:]), report)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the tool: 0 done, 2 bad input or disk, 130 interrupted."""
    argv = sys.argv[1:] if argv is None else argv
    try:
        if argv and argv[0] in COMMANDS:
            command(argv)
        else:
            prepare(argv)
        return 0
    except (DataError, WorkerDied) as error:
        print(f"preprocess_data: {error}", file=sys.stderr)
    except OSError as error:
        print(f"preprocess_data: {error.filename or 'output'}: {error.strerror or error}", file=sys.stderr)
    except KeyboardInterrupt:
        print("preprocess_data: interrupted; nothing was written under the final name", file=sys.stderr)
        return 130
    return 2


if __name__ == "__main__":
    sys.exit(main())
