"""The manifest of a checkpoint: every file with its size and hash. It is written last, so a folder with one is complete.

What is read is believed only as far as it agrees with the manifest, and the manifest only as far as it agrees with its own
hash. Hashes are xxh3 of 128 bits: they find accidents, every single flipped bit included, and no forger, who could write
another manifest. What a forger could gain is closed elsewhere: names cannot leave the folder, and no file can run code.
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

from megatronish.checkpoint.paths import STATE_FILE
from megatronish.errors import UserError
from megatronish.files import is_inside_folder, sync

MANIFEST_FILE = "manifest.json"
FORMAT, VERSION = "megatronish-checkpoint", 1
CHUNK_BYTES = 1 << 22
LOADED_SUFFIXES = (".safetensors", ".pt", ".bin", ".model", ".json")  # of what some loader would open


class DamagedCheckpointError(UserError):
    """A checkpoint that is not as it was written; the text names the files. certain: it cannot be good, read again or later."""

    def __init__(self, text: str, certain: bool = True) -> None:
        super().__init__(text)
        self.certain = certain


@dataclass(frozen=True)
class FileRecord:
    """What a file must be. bytes: its size; xxh3: 128 bits of its contents, hexadecimal."""

    bytes: int
    xxh3: str


@dataclass(frozen=True)
class CheckpointManifest:
    """Every file of a checkpoint by its path in the folder, but for the manifest's own."""

    step: int
    files: Mapping[str, FileRecord]

    @property
    def bytes(self) -> int:
        """Of all files."""
        return sum(record.bytes for record in self.files.values())

    def to_text(self) -> str:
        """As it stands in the file."""
        content = {
            "format": FORMAT,
            "version": VERSION,
            "step": self.step,
            "files": {name: asdict(record) for name, record in sorted(self.files.items())},
        }
        return json.dumps({**content, "self": _own_hash(content)}, indent=1) + "\n"


def hash_file(path: Path) -> FileRecord:
    """Size and hash of what a read of the file gives. Raises OSError."""
    state, size = xxhash.xxh3_128(), 0
    buffer = memoryview(bytearray(CHUNK_BYTES))
    with path.open("rb", buffering=0) as file:
        while count := file.readinto(buffer):
            state.update(buffer[:count])
            size += count
    return FileRecord(size, state.hexdigest())


def write_manifest(folder: Path, step: int, files: Mapping[str, FileRecord] | None = None) -> CheckpointManifest:
    """Write the manifest of `folder`, synced; files that are not among `files` are hashed here. Raises OSError."""
    known = dict(files or {})
    for name in sorted(_names_in(folder) - known.keys() - {MANIFEST_FILE}):
        known[name] = hash_file(folder / name)
        sync(folder / name)
    manifest = CheckpointManifest(step, known)
    (folder / MANIFEST_FILE).write_text(manifest.to_text(), encoding="utf-8")
    sync(folder / MANIFEST_FILE)
    return manifest


def read_manifest(folder: Path) -> CheckpointManifest:
    """The manifest of a checkpoint. Raises DamagedCheckpointError when it is missing, not as it was written, or leads outside."""
    path = folder / MANIFEST_FILE
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
        own = raw.pop("self")
        if raw["format"] != FORMAT:
            raise DamagedCheckpointError(f"{path} is no manifest of a checkpoint")
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
    """What is wrong with the files of `folder` that shows without reading them: missing, of another size, links, strangers."""
    faults = []
    for name, record in manifest.files.items():
        found = _size(folder, name)
        if found != record.bytes:
            told = f"has {found:,} bytes, not {record.bytes:,}" if isinstance(found, int) else found
            faults.append(f"{name} {told}")
    strangers = sorted(_names_in(folder) - manifest.files.keys() - {MANIFEST_FILE})
    faults += [f"{name} is not of it" for name in strangers if name.endswith(LOADED_SUFFIXES)]
    return faults


def content_faults(folder: Path, manifest: CheckpointManifest, names: Iterable[str]) -> list[str]:
    """Which of the named files cannot be read or differ in content; each is read once."""
    faults = []
    for name in names:
        try:
            if hash_file(folder / name) != manifest.files[name]:
                faults.append(f"{name} has other contents than were written")
        except OSError as error:
            faults.append(f"{name} cannot be read ({error.strerror})")
    return faults


def verify_files(folder: Path, names: Iterable[str]) -> None:
    """Check a folder whose files `names` (those of them that it has) are about to be read: all sizes, and these contents.

    A folder that was exported, and is no checkpoint, has no manifest to check. Raises DamagedCheckpointError with what is wrong.
    """
    if not any((folder / name).exists() for name in (MANIFEST_FILE, STATE_FILE)):
        return
    manifest = read_manifest(folder)
    faults = size_faults(folder, manifest)
    faults = faults or content_faults(folder, manifest, [name for name in names if name in manifest.files])
    if faults:
        raise DamagedCheckpointError(
            f"{folder} is damaged: {listed(faults)}. Use another checkpoint, or restore this one."
        )


def certainly_damaged(folder: Path, faults: Iterable[str]) -> bool:
    """Whether a checkpoint with these faults cannot be good, or may be, once it can be read."""
    try:
        read_manifest(folder)
    except DamagedCheckpointError as error:
        return error.certain
    return folder.exists() and not any("cannot be read" in fault for fault in faults)


def listed(faults: list[str]) -> str:
    """The first few of them in a sentence."""
    more = f", and {len(faults) - 3} more" if len(faults) > 3 else ""
    return ", ".join(faults[:3]) + more


def _inner(path: Path, name: str) -> str:
    if not is_inside_folder(name):
        raise DamagedCheckpointError(f"{path} names {name!r}, which is outside its folder; nothing of it is read")
    return name


def _size(folder: Path, name: str) -> int | str:
    """Bytes of the file, or what is wrong with it. No part of the path may be a link."""
    path = folder
    for part in PurePosixPath(name).parts:
        path = path / part
        try:
            found = os.lstat(path)
        except OSError as error:
            return "is missing" if isinstance(error, FileNotFoundError) else f"cannot be read ({error.strerror})"
        if stat.S_ISLNK(found.st_mode):
            return "is a link, which may lead outside"
    return found.st_size if stat.S_ISREG(found.st_mode) else "is no file"


def _names_in(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_symlink() or path.is_file()}


def _own_hash(content: dict[str, Any]) -> str:
    return xxhash.xxh3_128_hexdigest(json.dumps(content, sort_keys=True).encode())
