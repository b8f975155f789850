"""Files that appear whole or not at all, and are on the disk when a function returns; names that stay in their folder."""

from __future__ import annotations

import os
from pathlib import Path, PurePosixPath


def write_atomic(path: Path, text: str) -> None:
    """Replace `path` by a file with `text` (UTF-8), so that a reader sees the old or the new one and never half of one."""
    aside = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        aside.write_text(text, encoding="utf-8")
        sync(aside)
        aside.replace(path)
    finally:
        aside.unlink(missing_ok=True)
    sync(path.parent)


def sync(path: Path) -> None:
    """Wait until a file's contents, or the names in a folder, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_tree(folder: Path) -> None:
    """Wait until every file and folder below `folder`, and itself, is on the disk."""
    for path in sorted(folder.rglob("*")):
        sync(path)
    sync(folder)


def is_inside_folder(name: str) -> bool:
    """Whether a path, as a manifest gives it, stays in the manifest's folder whatever it is joined to."""
    path = PurePosixPath(name)
    plain = bool(name) and str(path) == name and "\\" not in name and "\0" not in name
    return plain and not path.is_absolute() and not {"..", "."} & set(path.parts) and ":" not in path.parts[0]
