#!/usr/bin/env python
"""Text to a Megatron-format data set (.bin, .idx) with its tokenizer and a manifest.

Without arguments: the source and documentation of this Python installation, with a tokenizer trained on it, at
data/default_text_document. With --input: your own text or JSON lines.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # run from a checkout that is not installed

from megatronish.data.errors import DataError
from megatronish.data.preprocess import (
    DEFAULT_OUTPUT_PREFIX,
    DEFAULT_VOCAB_SIZE,
    PreprocessOptions,
    preprocess,
    summary,
)

# Megatron's names for the tokenizers that --tokenizer-model can hold, and the kind that each must turn out to be.
TOKENIZER_TYPES = {
    "HuggingFaceTokenizer": "huggingface",
    "SentencePieceTokenizer": "sentencepiece",
    "GPTSentencePieceTokenizer": "sentencepiece",
    "Llama2Tokenizer": "sentencepiece",
    "ByteLevelTokenizer": "bytes",
}


def build_parser() -> argparse.ArgumentParser:
    """The command line; names that Megatron's tool has mean the same here."""
    parser = argparse.ArgumentParser(prog="preprocess_data.py", description=__doc__, allow_abbrev=False)
    add = parser.add_argument
    add(
        "--input",
        action="extend",
        nargs="+",
        default=[],
        metavar="FILE",
        help="text, .jsonl, either .gz; globs; repeatable",
    )
    add("--output-prefix", metavar="PREFIX", help=f"writes PREFIX_KEY_document.* (bare: {DEFAULT_OUTPUT_PREFIX})")
    add("--json-keys", nargs="+", default=["text"], metavar="KEY", help="JSON keys to take, one data set each (text)")
    add("--tokenizer-model", metavar="PATH", help="tokenizer.json, its folder, a SentencePiece .model, or `bytes`")
    add(
        "--tokenizer-type",
        choices=sorted(TOKENIZER_TYPES),
        help="checked against --tokenizer-model (Megatron's option)",
    )
    add("--train-tokenizer", type=int, metavar="VOCAB", help=f"train a BPE on the input (bare: {DEFAULT_VOCAB_SIZE})")
    add("--eod-token", metavar="TOKEN", help="the tokenizer's token that ends a document, where it does not say")
    add("--append-eod", action="store_true", help="end each document with that token (bare: yes)")
    add("--doc-separator", metavar="TEXT", help=r"cut text files into documents at TEXT; \n and \t are understood")
    add(
        "--on-error",
        choices=("fail", "skip"),
        default="fail",
        help="at a faulty document: stop, or skip and count (fail)",
    )
    add("--workers", type=int, default=len(os.sched_getaffinity(0)), metavar="N", help="threads (all cores)")
    add("--log-interval", type=int, default=0, metavar="N", help="a line every N documents (by time)")
    add("--overwrite", action="store_true", help="replace a data set that is already there")
    return parser


def options_from(arguments: argparse.Namespace) -> PreprocessOptions:
    """Fills in what the bare command means. Raises DataError for options that do not go together."""
    bare = not arguments.input
    if not bare and not arguments.output_prefix:
        raise DataError("--input needs --output-prefix, where to write")
    wanted = TOKENIZER_TYPES.get(arguments.tokenizer_type)
    if wanted == "bytes" and arguments.tokenizer_model is None:
        arguments.tokenizer_model = "bytes"
    train = arguments.train_tokenizer
    if bare and train is None and arguments.tokenizer_model is None:
        train = DEFAULT_VOCAB_SIZE
    separator = arguments.doc_separator
    if separator is not None:
        separator = separator.replace("\\n", "\n").replace("\\t", "\t")
        if not separator:
            raise DataError("--doc-separator is empty; leave it out to keep each text file as one document")
    return PreprocessOptions(
        inputs=tuple(arguments.input),
        output_prefix=arguments.output_prefix or DEFAULT_OUTPUT_PREFIX,
        json_keys=tuple(arguments.json_keys),
        tokenizer_model=arguments.tokenizer_model,
        tokenizer_kind=wanted,
        train_tokenizer=train,
        eod_token=arguments.eod_token,
        append_eod=arguments.append_eod or bare,
        doc_separator=separator,
        on_error=arguments.on_error,
        workers=arguments.workers,
        overwrite=arguments.overwrite,
        log_interval=arguments.log_interval,
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the tool: 0 done, 2 bad input or disk, 130 interrupted."""
    arguments = build_parser().parse_args(argv)
    # Read by the Rust thread pool of `tokenizers` when it first starts.
    os.environ["RAYON_NUM_THREADS"] = str(max(1, arguments.workers))
    os.environ["TOKENIZERS_PARALLELISM"] = "true"
    try:
        for result in preprocess(options_from(arguments), lambda line: print(line, flush=True)):
            print("\n".join(summary(result)))
        return 0
    except DataError as error:
        print(f"preprocess_data: {error}", file=sys.stderr)
    except OSError as error:
        print(f"preprocess_data: {error.filename or 'output'}: {error.strerror or error}", file=sys.stderr)
    except KeyboardInterrupt:
        print("preprocess_data: interrupted; nothing was written", file=sys.stderr)
        return 130
    return 2


if __name__ == "__main__":
    sys.exit(main())
