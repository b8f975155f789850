"""The manifest of a checkpoint: every file with its size and hash. It is written last, so a folder with one is complete.

Files are verified against the manifest, and the manifest against its own hash. Hashes are 128-bit xxh3. They detect
accidental changes, every single flipped bit included, but not a forger, who could write another manifest. A forged manifest
can do no harm: the names in it cannot leave the folder, and no file of a checkpoint can run code.
"""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import xxhash

from megatronish.errors import UserError
from megatronish.files import is_inside_folder, sync

MANIFEST_FILE = "manifest.json"
FORMAT, VERSION = "megatronish-checkpoint", 1
CHUNK_BYTES = 1 << 22
LOADED_SUFFIXES = (".safetensors", ".pt", ".bin", ".model", ".json")  # of files that a loader might open by pattern


class DamagedCheckpointError(UserError):
    """A checkpoint that differs from what was written; the text names the files.

    certain: reading it again later cannot help.
    """

    def __init__(self, text: str, certain: bool = True) -> None:
        super().__init__(text)
        self.certain = certain


@dataclass(frozen=True)
class FileRecord:
    """Size of a file in bytes, and the 128-bit xxh3 of its contents, in hexadecimal."""

    bytes: int
    xxh3: str


@dataclass(frozen=True)
class CheckpointManifest:
    """The files of a checkpoint by path relative to its folder, without the manifest itself."""

    step: int
    files: Mapping[str, FileRecord]

    @property
    def bytes(self) -> int:
        """Total size of the files."""
        return sum(record.bytes for record in self.files.values())

    def to_text(self) -> str:
        """The contents of the manifest file."""
        content = {
            "format": FORMAT,
            "version": VERSION,
            "step": self.step,
            "files": {name: asdict(record) for name, record in sorted(self.files.items())},
        }
        return json.dumps({**content, "self": _own_hash(content)}, indent=1) + "\n"


def hash_file(path: Path) -> FileRecord:
    """Read a file for its size and hash. Raises OSError."""
    state, size = xxhash.xxh3_128(), 0
    buffer = memoryview(bytearray(CHUNK_BYTES))
    with path.open("rb", buffering=0) as file:
        while count := file.readinto(buffer):
            state.update(buffer[:count])
            size += count
    return FileRecord(size, state.hexdigest())


def write_manifest(folder: Path, step: int, files: Mapping[str, FileRecord] | None = None) -> CheckpointManifest:
    """Write the manifest of `folder` and sync it. Files that are not in `files` are hashed here. Raises OSError."""
    known = dict(files or {})
    for name in sorted(_names_in(folder) - known.keys() - {MANIFEST_FILE}):
        known[name] = hash_file(folder / name)
        sync(folder / name)
    manifest = CheckpointManifest(step, known)
    (folder / MANIFEST_FILE).write_text(manifest.to_text(), encoding="utf-8")
    sync(folder / MANIFEST_FILE)
    return manifest


def read_manifest(folder: Path) -> CheckpointManifest:
    """Read a manifest. Raises DamagedCheckpointError if it is missing, was changed, or names a path outside the folder."""
    path = folder / MANIFEST_FILE
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
        own = raw.pop("self")
        if raw["format"] != FORMAT:
            raise DamagedCheckpointError(f"{path} is not the manifest of a checkpoint")
        if raw["version"] != VERSION:
            raise DamagedCheckpointError(
                f"{path} has version {raw['version']}; this megatronish reads version {VERSION}", certain=False
            )
        if own != _own_hash(raw):
            raise DamagedCheckpointError(f"{path} was changed after it was written")
        files = {
            _inner(path, name): FileRecord(int(item["bytes"]), str(item["xxh3"])) for name, item in raw["files"].items()
        }
        return CheckpointManifest(int(raw["step"]), files)
    except FileNotFoundError:
        raise DamagedCheckpointError(
            f"{folder} has no {MANIFEST_FILE}: it was not finished, was copied in part, or is of a version before manifests "
            f"(if you trust it: python tools/check_checkpoints.py --adopt {folder})",
            certain=False,
        ) from None
    except DamagedCheckpointError:
        raise
    except OSError as error:
        raise DamagedCheckpointError(f"{path} cannot be read ({error.strerror})", certain=False) from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DamagedCheckpointError(f"{path} is torn ({error})") from None


def size_faults(folder: Path, manifest: CheckpointManifest) -> list[str]:
    """Faults that are found without reading the files: missing, of another size, symbolic links, not in the manifest."""
    faults = []
    for name, record in manifest.files.items():
        found = _size(folder, name)
        if found != record.bytes:
            what = f"has {found:,} bytes, not {record.bytes:,}" if isinstance(found, int) else found
            faults.append(f"{name} {what}")
    unknown = sorted(_names_in(folder) - manifest.files.keys() - {MANIFEST_FILE})
    faults += [f"{name} is not in the manifest" for name in unknown if name.endswith(LOADED_SUFFIXES)]
    return faults


def content_faults(folder: Path, manifest: CheckpointManifest, names: Iterable[str]) -> list[str]:
    """The files among `names` that cannot be read or have other contents; each is read once."""
    faults = []
    for name in names:
        try:
            if hash_file(folder / name) != manifest.files[name]:
                faults.append(f"{name} has other contents than were written")
        except OSError as error:
            faults.append(f"{name} cannot be read ({error.strerror})")
    return faults


def first_few(faults: list[str]) -> str:
    """The first three faults, and the number of the others."""
    more = f", and {len(faults) - 3} more" if len(faults) > 3 else ""
    return ", ".join(faults[:3]) + more


def _inner(path: Path, name: str) -> str:
    if not is_inside_folder(name):
        raise DamagedCheckpointError(f"{path} names {name!r}, which is outside its folder; nothing of it is read")
    return name


def _size(folder: Path, name: str) -> int | str:
    """Size of the file in bytes, or its fault. No part of the path may be a symbolic link."""
    path = folder
    for part in PurePosixPath(name).parts:
        path = path / part
        try:
            found = os.lstat(path)
        except OSError as error:
            return "is missing" if isinstance(error, FileNotFoundError) else f"cannot be read ({error.strerror})"
        if stat.S_ISLNK(found.st_mode):
            return "is a link, which may lead outside"
    return found.st_size if stat.S_ISREG(found.st_mode) else "is not a file"


def _names_in(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_symlink() or path.is_file()}


def _own_hash(content: dict[str, Any]) -> str:
    return xxhash.xxh3_128_hexdigest(json.dumps(content, sort_keys=True).encode())
