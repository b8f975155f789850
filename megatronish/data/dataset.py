"""A finished data set opened for use: tokens, manifest, tokenizer, held-out text, and whether it fits a model."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from megatronish.data.errors import DataError
from megatronish.data.indexed import IndexedReader
from megatronish.data.manifest import Manifest, read_manifest
from megatronish.data.tokenizer import Tokenizer, load_tokenizer


@dataclass(frozen=True)
class Dataset:
    """What `open_dataset` gives. `prefix` is the path without suffix, such as data/default_text_document."""

    prefix: str
    reader: IndexedReader
    manifest: Manifest

    @property
    def fingerprint(self) -> str:
        """Hash of the tokens, index and tokenizer by content: a run that resumes on other data can tell by it."""
        return self.manifest.fingerprint

    def tokenizer(self) -> Tokenizer:
        """The tokenizer that made this data set, from its own copy. Raises DataError if that was replaced."""
        record = self.manifest.tokenizer
        source = "bytes" if record.file is None else Path(self.prefix).parent / record.file
        tokenizer = load_tokenizer(source, eod_id=record.eod_id)
        if tokenizer.fingerprint != record.sha256:
            raise DataError(
                f"{source}: SHA-256 {tokenizer.fingerprint[:12]}..., but the manifest of {self.prefix} records "
                f"{record.sha256[:12]}...: the tokenizer was replaced; make the data set again with --overwrite"
            )
        return tokenizer

    def document_bytes(self, document_ids: npt.ArrayLike) -> Iterator[bytes]:
        """The original text of documents as bytes, end-of-document tokens left out (exact for byte-level tokenizers)."""
        tokenizer = self.tokenizer()
        for number in np.asarray(document_ids, dtype=np.int64).tolist():
            yield tokenizer.decode_bytes(self.reader.document(number))

    def held_out_text(self, document_ids: npt.ArrayLike) -> bytes:
        """The bytes of documents, one after another: what gzip and xz get to compress beside the model."""
        return b"".join(self.document_bytes(document_ids))


def open_dataset(prefix: str | os.PathLike[str]) -> Dataset:
    """Opens a committed data set. Raises DataError if it is missing, unfinished, damaged or of another version."""
    name = os.fspath(prefix)
    manifest = read_manifest(name)
    reader = IndexedReader(name)
    if reader.dtype.name != manifest.dtype or reader.num_tokens != manifest.counts["tokens"]:
        raise DataError(
            f"{name}.idx describes {reader.num_tokens:,} {reader.dtype.name} tokens, its manifest {manifest.counts['tokens']:,} "
            f"{manifest.dtype}; make the data set again with --overwrite"
        )
    return Dataset(name, reader, manifest)


def check_dataset_fits(
    manifest: Manifest,
    model_vocab_size: int,
    expected_tokenizer_sha256: str | None = None,
    *,
    place: str = "the data set",
) -> None:
    """Refuses a data set that a model cannot train on.

    expected_tokenizer_sha256: the tokenizer of the checkpoint or run that is continued, if any. Raises DataError for an
    empty data set, a vocabulary larger than the model's, or another tokenizer.
    """
    tokenizer = manifest.tokenizer
    if manifest.counts["tokens"] < 1:
        raise DataError(f"{place} holds no token; prepare it from text that is not empty")
    if tokenizer.vocab_size > model_vocab_size:
        raise DataError(
            f"{place} has token ids up to {tokenizer.vocab_size - 1} (a {tokenizer.kind} vocabulary of {tokenizer.vocab_size:,}), but "
            f"model.vocab_size is {model_vocab_size:,}; set model.vocab_size to {tokenizer.vocab_size} or more, or prepare the data with a "
            "smaller vocabulary"
        )
    if expected_tokenizer_sha256 is not None and expected_tokenizer_sha256 != tokenizer.sha256:
        raise DataError(
            f"{place} was made with another tokenizer (SHA-256 {tokenizer.sha256[:12]}...) than this model was trained with "
            f"({expected_tokenizer_sha256[:12]}...); prepare the data with the model's tokenizer (--tokenizer-model)"
        )
