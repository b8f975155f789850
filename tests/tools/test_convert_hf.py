"""tools/convert_hf.py from the command line: its output, and one-line errors."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import pytest

from megatronish.interop import agreement
from tests.hf_models import build
from tools import convert_hf


def run(monkeypatch: pytest.MonkeyPatch, *words: object) -> int:
    monkeypatch.setattr(sys, "argv", ["convert_hf.py", *map(str, words)])
    try:
        return convert_hf.main()
    except SystemExit as stop:
        return int(stop.code or 0)


@pytest.fixture(scope="module")
def hf_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("hf")
    build("qwen3").save_pretrained(folder)
    return folder


def test_import_then_export(
    hf_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch, "import", hf_folder, tmp_path / "ours", "--verify", "always") == 0
    shown = capsys.readouterr().out.splitlines()
    assert shown[0].endswith("ours: qwen3, 76,512 parameters in float32, 1 file(s) of weights")
    assert shown[1].startswith("the model has no tokenizer")
    assert shown[2].startswith("logits agree with transformers to ") and shown[2].endswith(
        "the same best token at 128)"
    )
    assert (
        run(monkeypatch, "export", tmp_path / "ours", tmp_path / "out", "--dtype", "bf16", "--max-shard-size", "0.05MB")
        == 0
    )
    shown = capsys.readouterr().out.splitlines()
    assert shown[0].endswith("qwen3, 76,512 parameters in bfloat16, 4 file(s) of weights")
    assert float(shown[2].split(" to ")[1].split()[0]) < 2e-2  # bf16 keeps 8 bits of a weight


def test_verification_is_optional(
    hf_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(agreement.importlib.util, "find_spec", lambda name: None)
    assert run(monkeypatch, "import", hf_folder, tmp_path / "a") == 0
    assert "not compared with transformers: transformers is not installed" in capsys.readouterr().out
    assert run(monkeypatch, "import", hf_folder, tmp_path / "b", "--verify", "always") == 2
    assert (
        "--verify always: transformers is not installed. The conversion itself is complete." in capsys.readouterr().err
    )
    assert run(monkeypatch, "import", hf_folder, tmp_path / "c", "--verify", "never") == 0
    assert "compared" not in capsys.readouterr().out
    monkeypatch.undo()
    assert "1000.0 GB" in (agreement.why_not(125 * 10**9) or "")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["import", "{hf}/nowhere", "{tmp}/x"], "no such folder"),
        (["import", "{hf}", "{hf}"], "exists and is not empty"),
        (["export", "{tmp}/nowhere", "{tmp}/x"], "no such folder"),
        (["export", "{hf}", "{tmp}/x"], "tools/convert_hf.py import makes a folder of ours"),
        (["export", "{tmp}/ours", "{tmp}/x", "--architecture", "llama"], "but for qk_norm True (there: False)"),
        (["export", "{tmp}/ours", "{tmp}/x", "--max-shard-size", "5"], "'5' is not a size such as 500MB or 5GB"),
        (["export", "{tmp}/torn", "{tmp}/x"], "is torn or not a safetensors file"),
        (["translate", "{hf}", "{tmp}/x"], "invalid choice"),
    ],
)
def test_errors_are_one_line(
    words: list[str],
    message: str,
    hf_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert run(monkeypatch, "import", hf_folder, tmp_path / "ours", "--verify", "never") == 0
    shutil.copytree(tmp_path / "ours", tmp_path / "torn")
    (tmp_path / "torn" / "model.safetensors").write_bytes(b"torn")
    capsys.readouterr()
    assert run(monkeypatch, *[word.format(hf=hf_folder, tmp=tmp_path) for word in words]) == 2
    error = capsys.readouterr().err
    assert message in error and "Traceback" not in error
    assert not (tmp_path / "x").exists()
