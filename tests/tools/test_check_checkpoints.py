"""tools/check_checkpoints.py: what it finds, and manifests for checkpoints that have none."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from megatronish.checkpoint.store import CheckpointStore
from tests.saves import save_alone
from tools import check_checkpoints


def check(*words: str, monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(sys, "argv", ["check_checkpoints.py", *words])
    try:
        return check_checkpoints.main()
    except SystemExit as ended:
        return int(ended.code or 0)


def test_good_damaged_and_adopted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def write(folder: Path) -> None:
        (folder / "state.json").write_text("{}")
        (folder / "weights").write_text("w")

    store = CheckpointStore(tmp_path, 5)
    first, second = (Path(save_alone(store, step, write).path) for step in (5, 10))
    assert check(str(tmp_path), monkeypatch=monkeypatch) == 0
    assert "2 of 2 checkpoints are good" in capsys.readouterr().out
    (second / "weights").write_text("v")
    assert check(str(tmp_path), monkeypatch=monkeypatch) == 1
    printed = capsys.readouterr().out
    assert f"{first}: good" in printed and f"{second}: DAMAGED" in printed
    assert "    weights has other contents than were written\n" in printed and "1 of 2 checkpoints are good" in printed
    (first / "manifest.json").unlink()
    assert check(str(first), monkeypatch=monkeypatch) == 1
    assert "has no manifest.json" in capsys.readouterr().out
    assert check("--adopt", str(first), str(second), monkeypatch=monkeypatch) == 0
    assert check(str(tmp_path), monkeypatch=monkeypatch) == 0
    assert check("--adopt", str(tmp_path), monkeypatch=monkeypatch) == 0
    capsys.readouterr()
    (tmp_path / "none").mkdir()
    assert check(str(tmp_path / "none"), monkeypatch=monkeypatch) == 2
    assert "none: holds no checkpoint" in capsys.readouterr().err
    (first / "state.json").unlink()
    assert check("--adopt", str(first), monkeypatch=monkeypatch) == 2
    assert "is not a checkpoint with a state.json" in capsys.readouterr().err
