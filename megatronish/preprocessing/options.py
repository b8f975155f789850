"""What a preprocessing run is asked to do, checked before anything is read."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatronish.data.readers.records import MAX_RECORD_BYTES, ON_ERROR
from megatronish.data.tokenizers.backends import BACKENDS
from megatronish.errors import DataError
from megatronish.preprocessing.corpus import default_corpus_description

DEFAULT_OUTPUT_PREFIX = "data/default"
DEFAULT_VOCAB_SIZE = 4096
# A document above this is encoded in parts: tokenizers take up to 150 bytes of memory for each byte of one text.
DEFAULT_MAX_DOC_BYTES = 1 << 20
LONG_DOCUMENTS = ("split", "skip")
TOKEN_DTYPES = ("auto", "uint8", "uint16", "int32", "int64")
# Shards: a hundred and more of them, so that the workers end together, each big enough not to be felt.
SHARDS_AIMED_AT = 128
SHARD_BYTES = (1 << 20, 1 << 26)


@dataclass(frozen=True)
class PreprocessOptions:
    """What to prepare. No `inputs` means the embedded default corpus with a tokenizer trained on it.

    Exactly one of `tokenizer_model` (see `load_tokenizer`; `tokenizer_kind` is what it must turn out to be), `vocab_file`
    with `merge_file` (GPT-2's two files) and `train_tokenizer` (vocabulary size) for other inputs. Sizes are in bytes;
    `shard_size` None takes one that fits the input, `max_doc_bytes` 0 sets no limit.
    """

    inputs: tuple[str, ...] = ()
    output_prefix: str = DEFAULT_OUTPUT_PREFIX
    json_keys: tuple[str, ...] = ("text",)
    tokenizer_model: str | None = None
    tokenizer_kind: str | None = None
    vocab_file: str | None = None
    merge_file: str | None = None
    train_tokenizer: int | None = None
    eod_token: str | None = None
    append_eod: bool = False
    doc_separator: str | None = None
    on_error: str = "fail"
    max_doc_bytes: int = DEFAULT_MAX_DOC_BYTES
    long_documents: str = "split"
    keep_empty: bool = False
    shard_size: int | None = None
    backend: str = "auto"
    dtype: str = "auto"
    workers: int = 1
    overwrite: bool = False
    resume: bool = False
    log_interval: int = 0

    @property
    def separator(self) -> bytes | None:
        """`doc_separator` in UTF-8."""
        return self.doc_separator.encode("utf-8") if self.doc_separator else None

    def recorded(self, key: str) -> dict[str, Any]:
        """The options that shape the result, as the manifest keeps them (not workers, back end, overwriting or logging)."""
        source = {"inputs": list(self.inputs)} if self.inputs else default_corpus_description()
        always = {
            **source,
            "json_key": key,
            "tokenizer_model": self.tokenizer_model,
            "train_tokenizer": self.train_tokenizer,
            "eod_token": self.eod_token,
            "append_eod": self.append_eod,
            "doc_separator": self.doc_separator,
            "on_error": self.on_error,
        }
        # Kept only where they are not the default, so that data sets from before an option compare equal.
        later = ("vocab_file", "merge_file", "max_doc_bytes", "long_documents", "keep_empty", "dtype")
        defaults = PreprocessOptions()
        changed = {name: getattr(self, name) for name in later if getattr(self, name) != getattr(defaults, name)}
        return always | changed


def check_options(options: PreprocessOptions) -> None:
    """Raises DataError for values, or combinations of them, that mean nothing."""
    choices = {
        "--on-error": (options.on_error, ON_ERROR),
        "--long-documents": (options.long_documents, LONG_DOCUMENTS),
        "--backend": (options.backend, BACKENDS),
        "--dtype": (options.dtype, TOKEN_DTYPES),
    }
    for name, (value, known) in choices.items():
        if value not in known:
            raise DataError(f"{name} {value}: choose one of {', '.join(known)}")
    if options.workers < 1:
        raise DataError(f"--workers {options.workers}: at least 1 is needed")
    if options.shard_size is not None and options.shard_size < 1:
        raise DataError(f"--shard-size {options.shard_size}: at least 1 byte is needed")
    if options.max_doc_bytes < 0 or options.max_doc_bytes > MAX_RECORD_BYTES:
        raise DataError(f"--max-doc-bytes {options.max_doc_bytes}: 0 (no limit) to {MAX_RECORD_BYTES:,} bytes")
    if len(set(options.json_keys)) != len(options.json_keys) or not options.json_keys:
        raise DataError(f"--json-keys {' '.join(options.json_keys)}: give each key once")
    _check_tokenizer(options)
    if not Path(options.output_prefix).name:
        raise DataError(f"--output-prefix {options.output_prefix!r}: a file name must follow the folder")


def _check_tokenizer(options: PreprocessOptions) -> None:
    if (options.vocab_file is None) != (options.merge_file is None):
        raise DataError("--vocab-file and --merge-file belong together (GPT-2's vocab.json and merges.txt); give both")
    given = [
        name
        for name, value in (
            ("--tokenizer-model", options.tokenizer_model),
            ("--vocab-file", options.vocab_file),
            ("--train-tokenizer", options.train_tokenizer),
        )
        if value is not None
    ]
    if len(given) > 1:
        raise DataError(f"{' and '.join(given)} exclude each other; give one")
    if not given:
        raise DataError(
            "no tokenizer; give --tokenizer-model (a tokenizer.json, its folder, a SentencePiece .model, a .tiktoken file, or "
            f"`bytes`) or --train-tokenizer VOCABULARY_SIZE (for example {DEFAULT_VOCAB_SIZE})"
        )


def shard_bytes(wanted: int | None, total: int) -> int:
    """The shard size asked for, else one that suits an input of `total` bytes: a function of the input alone."""
    low, high = SHARD_BYTES
    return wanted if wanted is not None else min(high, max(low, total // SHARDS_AIMED_AT))
