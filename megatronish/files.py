"""Atomic, synced writes of files, and a check that a path stays in its folder."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary path to write a file to; it is then synced and renamed to `path`, or removed after an exception.

    So a reader sees the old contents of `path` or the new, never a part.
    """
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        yield partial
        sync(partial)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
    sync(path.parent)


def write_atomic(path: Path, text: str) -> None:
    """Replace `path` atomically by a file with `text` (UTF-8)."""
    with replacing(path) as partial:
        partial.write_text(text, encoding="utf-8")


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
    """Whether a relative path, as read from a manifest, stays in the folder that it is joined to."""
    path = PurePosixPath(name)
    plain = bool(name) and str(path) == name and "\\" not in name and "\0" not in name
    return plain and not path.is_absolute() and not {"..", "."} & set(path.parts) and ":" not in path.parts[0]
