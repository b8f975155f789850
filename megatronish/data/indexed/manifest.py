"""`PREFIX.manifest.json`: what a data set is, written last by an atomic rename, so that its presence means "complete"."""

from __future__ import annotations

import glob
import hashlib
import json
import os
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from megatronish.errors import DataError
from megatronish.files import is_inside_folder

FORMAT = "megatronish-dataset"
VERSION = 2
READABLE_VERSIONS = (1, 2)


@dataclass(frozen=True)
class TokenizerRecord:
    """The tokenizer that made a data set. `file` is relative to the manifest, None for the byte tokenizer."""

    kind: str
    file: str | None
    sha256: str
    vocab_size: int
    eod_id: int | None


@dataclass(frozen=True)
class DatasetManifest:
    """Contents of a manifest. `counts`: documents, tokens; text_bytes, empty_documents, unknown_tokens, blank_lines,
    rejected_documents, replaced_documents, duplicate_keys, long_documents where they are known.

    `files` maps a file name (relative to the manifest) to {"bytes": int, "xxh3": str} (128 bits, hexadecimal; version 1 had
    "sha256"); `shards` are the xxh3 of the consecutive parts that the .bin was written in; `rejects` lists the first
    rejected documents as {"place": str, "reason": str}; `options` is what the data set was made with; `encoder` the back
    end (the tokens do not depend on it).
    """

    tokenizer: TokenizerRecord
    dtype: str
    appended_eod: bool
    counts: dict[str, int]
    options: dict[str, Any]
    files: dict[str, dict[str, Any]]
    rejects: list[dict[str, str]] = field(default_factory=list)
    shards: list[str] = field(default_factory=list)
    encoder: str = ""
    format: str = FORMAT
    version: int = VERSION

    @property
    def fingerprint(self) -> str:
        """Hash of the tokens, index and tokenizer by content: a resumed run compares it to detect other data."""
        hashes = sorted(record.get("xxh3") or record["sha256"] for record in self.files.values())
        return hashlib.sha256(" ".join(hashes).encode()).hexdigest()

    def to_json(self) -> str:
        """Stable JSON text: the same data set gives the same bytes."""
        return json.dumps(asdict(self), indent=2, sort_keys=True, ensure_ascii=True) + "\n"


def manifest_path(prefix: str | os.PathLike[str]) -> Path:
    """`PREFIX.manifest.json`."""
    return Path(f"{os.fspath(prefix)}.manifest.json")


def read_manifest(prefix: str | os.PathLike[str]) -> DatasetManifest:
    """Reads and checks `PREFIX.manifest.json`, including that every file it names is there with the recorded size.

    Raises DataError for a missing data set, an unfinished one, or files that do not belong to the manifest.
    """
    path = manifest_path(prefix)
    try:
        content = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise DataError(_missing(prefix)) from None
    except ValueError as error:
        raise DataError(f"{path}: not JSON: {error}; make the data set again") from None
    manifest = _parse(path, content)
    for name, record in manifest.files.items():
        file = path.parent / name
        actual = file.stat().st_size if file.is_file() else None
        if actual != record["bytes"]:
            found = "is missing" if actual is None else f"has {actual:,} bytes"
            raise DataError(
                f"{file}: {found}, but {path.name} records {record['bytes']:,} bytes; the data set is damaged or was "
                "replaced in part; make it again with --overwrite"
            )
    return manifest


def _missing(prefix: str | os.PathLike[str]) -> str:
    name = os.fspath(prefix)
    if Path(f"{name}.bin").exists() or Path(f"{name}.idx").exists():
        return (
            f"{manifest_path(prefix)}: no such file, though {name}.bin or .idx exists: preprocessing did not finish, or another "
            "tool made them; make the data set again with: python tools/preprocess_data.py --output-prefix ... --overwrite"
        )
    near = sorted(Path(name).parent.glob(f"{glob.escape(Path(name).stem)}*.manifest.json"))
    if near:
        meant = str(near[0]).removesuffix(".manifest.json")
        return f"no data set at {name}; did you mean {meant}? (the path has no suffix, and ends in _KEY_document)"
    return (
        f"no data set at {name} ({manifest_path(prefix)} does not exist); make the default one with: "
        "python tools/preprocess_data.py, or your own with --input FILE --output-prefix PREFIX and point data.path at PREFIX_text_document"
    )


def _parse(path: Path, content: Any) -> DatasetManifest:
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise DataError(f'{path}: not a data set\'s manifest (its "format" is not {FORMAT!r})')
    if content.get("version") not in READABLE_VERSIONS:
        raise DataError(f"{path}: manifest version {content.get('version')}; this reads versions {READABLE_VERSIONS}")
    try:
        known = {item.name for item in fields(DatasetManifest)}
        values = {key: value for key, value in content.items() if key in known}
        values["tokenizer"] = TokenizerRecord(**content["tokenizer"])
        for count in (*(record["bytes"] for record in content["files"].values()), content["counts"]["tokens"]):
            if not isinstance(count, int):
                raise TypeError(f"{count!r} is not an integer")
        for record in content["files"].values():
            if not isinstance(record.get("xxh3", record.get("sha256")), str):
                raise KeyError("a file without its hash")
        for name in (*content["files"], values["tokenizer"].file or "none"):
            if not is_inside_folder(name):
                raise DataError(f"{path}: names {name!r}, which is outside its folder; nothing of it is read")
        return DatasetManifest(**values)
    except (KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{path}: incomplete or of another version: {error}; make the data set again") from None
