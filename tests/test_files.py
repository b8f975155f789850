"""Atomic, synced writes, and paths that stay in their folder."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from megatronish.files import write_atomic


def test_a_file_is_replaced_atomically(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "latest"
    write_atomic(path, "one\n")
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", lambda handle: (_ for _ in ()).throw(OSError("I/O error")))
        with pytest.raises(OSError):
            write_atomic(path, "two\n")
    assert path.read_text() == "one\n"
    write_atomic(path, "three\n")
    assert path.read_text() == "three\n"
    assert os.listdir(tmp_path) == ["latest"]
