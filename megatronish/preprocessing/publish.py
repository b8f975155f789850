"""Renaming finished data sets into place, so that they appear completely or not at all, and their summary."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import xxhash

from megatronish.data.indexed.manifest import DatasetManifest, TokenizerRecord, manifest_path
from megatronish.data.tokenizers.tokenizer import Tokenizer
from megatronish.files import sync

# Lists the renames that end a run; its presence means that everything to be renamed is complete and on the disk.
READY = "ready.json"
TOKENIZER_SUFFIXES = (".tokenizer.json", ".tokenizer.model")


@dataclass(frozen=True)
class PreprocessResult:
    """One finished data set: the path to give as `data.path`, its manifest, and whether it existed before."""

    prefix: str
    manifest: DatasetManifest
    already_there: bool


def tokenizer_record(tokenizer: Tokenizer, aside: Path) -> tuple[TokenizerRecord, dict[str, dict[str, Any]]]:
    """Saves a tokenizer next to a data set; its record, and the entry of its file in the manifest."""
    file = tokenizer.save(aside)
    files = {}
    if file is not None:
        raw = file.read_bytes()
        files[file.name] = {"bytes": len(raw), "xxh3": xxhash.xxh3_128_hexdigest(raw)}
    record = TokenizerRecord(
        kind=tokenizer.kind,
        file=file.name if file is not None else None,
        sha256=tokenizer.fingerprint,
        vocab_size=tokenizer.vocab_size,
        eod_id=tokenizer.eod_id,
    )
    return record, files


def steps_to_commit(
    folder: Path, prefix: str, manifest: DatasetManifest, kept_as: Mapping[str, str] | None = None
) -> list[list[str]]:
    """The renames that bring a data set from `folder` to its name: an old manifest goes first, the new one comes last.

    kept_as: names in `folder` of files that are called otherwise there. Writes the manifest and syncs everything.
    """
    names = {name: (kept_as or {}).get(name, name) for name in manifest.files}
    written = manifest_path(folder / Path(prefix).name)
    written.write_text(manifest.to_json(), encoding="utf-8")
    for name in [*names.values(), written.name]:
        sync(folder / name)
    target = Path(prefix).absolute().parent
    steps = [["remove", written.name, str(target / written.name)]]
    for suffix in TOKENIZER_SUFFIXES:
        stale = f"{Path(prefix).name}{suffix}"
        if stale not in manifest.files:
            steps.append(["remove", written.name, str(target / stale)])
    steps += [["move", kept, str(target / name)] for name, kept in names.items()]
    return [*steps, ["move", written.name, str(target / written.name)]]


def commit(folder: Path) -> None:
    """Takes the steps in `folder`'s READY file; those that a killed run has already taken are recognised and left out."""
    targets = set()
    for action, name, target in json.loads((folder / READY).read_bytes()):
        if not (folder / name).exists():
            continue
        targets.add(Path(target).parent)
        if action == "remove":
            Path(target).unlink(missing_ok=True)
        else:
            if target.endswith(".manifest.json"):
                sync(Path(target).parent)
            os.replace(folder / name, target)
    for path in targets:
        sync(path)


def summary(result: PreprocessResult) -> list[str]:
    """A summary of a data set, in lines."""
    counts, tokenizer = result.manifest.counts, result.manifest.tokenizer
    text_bytes = counts.get("text_bytes")
    text = (
        ""
        if text_bytes is None
        else (f"{text_bytes / 1e6:.1f} MB of text, {text_bytes / max(counts['tokens'], 1):.2f} bytes per token, ")
    )
    lines = [
        f"{result.prefix}: {'exists already' if result.already_there else 'written'}: {counts['documents']:,} documents, "
        f"{counts['tokens']:,} tokens of {result.manifest.dtype}, {text}{tokenizer.kind} vocabulary {tokenizer.vocab_size:,}"
        + (f", encoded by {result.manifest.encoder}" if result.manifest.encoder else "")
    ]
    passed = {
        "empty documents " + ("kept" if result.manifest.options.get("keep_empty") else "dropped"): "empty_documents",
        "blank lines ignored": "blank_lines",
        "faulty documents skipped": "rejected_documents",
        "documents repaired": "replaced_documents",
        "objects with the key twice": "duplicate_keys",
        "documents above --max-doc-bytes": "long_documents",
        "unknown tokens (text that this tokenizer cannot hold is lost)": "unknown_tokens",
    }
    notes = [f"{counts[name]:,} {what}" for what, name in passed.items() if counts.get(name)]
    if notes:
        lines.append(f"  {', '.join(notes)}")
    lines += [f"  skipped {reject['place']}: {reject['reason']}" for reject in result.manifest.rejects[:3]]
    if counts["documents"] == 1:
        lines.append(
            "  one document only: nothing can be held out for validation; --doc-separator cuts a text into documents"
        )
    return lines
