"""A finished data set opened for use: tokens, manifest, tokenizer, held-out text, and whether it fits a model."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np

from megatronish.data.indexed.format import IndexedReader, bin_path, idx_path
from megatronish.data.indexed.manifest import DatasetManifest, TokenizerRecord, manifest_path, read_manifest
from megatronish.data.samples.rows import join_pieces
from megatronish.data.tokenizers.tokenizer import Tokenizer, load_tokenizer, tokenizer_file_at
from megatronish.errors import DataError

if TYPE_CHECKING:
    import numpy.typing as npt

# A data set without hashes is identified by the contents of this many pieces of this many tokens, evenly spread.
SAMPLES, SAMPLED_TOKENS = 256, 512


@dataclass(frozen=True)
class IndexedDataset:
    """What `open_dataset` returns. `prefix` is the path without suffix, such as data/default_text_document."""

    prefix: str
    reader: IndexedReader
    manifest: DatasetManifest

    @property
    def fingerprint(self) -> str:
        """Hash of the tokens, index and tokenizer by content: a resumed run compares it to detect other data."""
        return self.manifest.fingerprint

    @property
    def tokenizer_record(self) -> TokenizerRecord:
        """The tokenizer that made this data set."""
        return self.manifest.tokenizer

    @property
    def tokenizer_file(self) -> Path | None:
        """The tokenizer's file in the data set's folder; None for the byte tokenizer."""
        name = self.manifest.tokenizer.file
        return None if name is None else Path(self.prefix).parent / name

    def tokenizer(self) -> Tokenizer:
        """The tokenizer that made this data set, from its own copy. Raises DataError if that was replaced."""
        record = self.manifest.tokenizer
        source = self.tokenizer_file or "bytes"
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
        """The bytes of documents, concatenated: what gzip and xz compress for comparison with the model."""
        return b"".join(self.document_bytes(document_ids))


def open_dataset(
    prefix: str | os.PathLike[str],
    unit: Literal["document", "sequence"] = "document",
    tokenizer: str | os.PathLike[str] | None = None,
) -> IndexedDataset:
    """Opens a committed data set; unit: see IndexedReader.

    tokenizer: of a data set without a manifest, as Megatron's own tools make it (`load_tokenizer`'s sources).
    Raises DataError if it is missing, unfinished, damaged or of another version.
    """
    name = os.fspath(prefix)
    if tokenizer is not None and not manifest_path(name).exists() and idx_path(name).exists():
        return _open_foreign(name, unit, tokenizer)
    manifest = read_manifest(name)
    reader = IndexedReader(name, unit)
    if reader.dtype.name != manifest.dtype or reader.num_tokens != manifest.counts["tokens"]:
        raise DataError(
            f"{name}.idx describes {reader.num_tokens:,} {reader.dtype.name} tokens, its manifest {manifest.counts['tokens']:,} "
            f"{manifest.dtype}; make the data set again with --overwrite"
        )
    return IndexedDataset(name, reader, manifest)


def combined_fingerprint(fingerprints: Sequence[str]) -> str:
    """One hash for several data sets in this order; of a single one its own."""
    if len(fingerprints) == 1:
        return fingerprints[0]
    return hashlib.sha256(" ".join(fingerprints).encode()).hexdigest()


def _open_foreign(
    name: str, unit: Literal["document", "sequence"], tokenizer: str | os.PathLike[str]
) -> IndexedDataset:
    """A data set of another tool, with the manifest that its files and the tokenizer determine."""
    reader = IndexedReader(name, unit)
    made_with = load_tokenizer(tokenizer)
    path = Path(tokenizer)
    file = None if made_with.kind == "bytes" else os.path.relpath(tokenizer_file_at(path), Path(name).parent)
    begins = np.unique(np.linspace(0, max(0, reader.num_tokens - SAMPLED_TOKENS), SAMPLES).astype(np.int64))
    lengths = np.minimum(SAMPLED_TOKENS, reader.num_tokens - begins)
    sample = join_pieces(reader.tokens_view, begins, lengths)
    largest = int(sample.max()) if len(sample) else 0
    if largest >= made_with.vocab_size:
        raise DataError(
            f"{bin_path(name)} holds token {largest}, the tokenizer {path} has {made_with.vocab_size:,} entries: it is another one's data"
        )
    content = hashlib.sha256(sample.data).hexdigest()
    return IndexedDataset(
        name,
        reader,
        DatasetManifest(
            TokenizerRecord(made_with.kind, file, made_with.fingerprint, made_with.vocab_size, made_with.eod_id),
            dtype=reader.dtype.name,
            appended_eod=_ends_with(reader, made_with.eod_id),
            counts={"documents": reader.num_documents, "tokens": reader.num_tokens},
            options={},
            files={
                bin_path(name).name: {"bytes": bin_path(name).stat().st_size, "sha256": content},
                idx_path(name).name: {"bytes": idx_path(name).stat().st_size, "sha256": reader.identity},
                "tokenizer": {"bytes": 0, "sha256": made_with.fingerprint},
            },
        ),
    )


def _ends_with(reader: IndexedReader, eod_id: int | None) -> bool:
    """Whether the first documents that hold tokens end with the end-of-document token."""
    filled = np.flatnonzero(reader.document_lengths[:1000])[:100]
    ends = reader.tokens_view[reader.document_starts[filled + 1] - 1]
    return eod_id is not None and len(ends) > 0 and bool((ends == eod_id).all())


def check_dataset_fits(
    manifest: DatasetManifest,
    model_vocab_size: int,
    expected_tokenizer_sha256: str | None = None,
    *,
    place: str = "the data set",
) -> None:
    """Refuses a data set that a model cannot train on.

    expected_tokenizer_sha256: the tokenizer of the checkpoint or run that is continued, if any. Raises DataError for an
    empty data set, a vocabulary larger than the model's, or another tokenizer.
    """
    if manifest.counts["tokens"] < 1:
        raise DataError(f"{place} holds no token; prepare it from text that is not empty")
    check_tokenizer_fits(manifest.tokenizer, model_vocab_size, expected_tokenizer_sha256, place=place)


def check_tokenizer_fits(
    tokenizer: TokenizerRecord, model_vocab_size: int, expected_tokenizer_sha256: str | None = None, *, place: str
) -> None:
    """Refuses token ids that the model does not have, or that mean something else than it learned. Raises DataError."""
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
