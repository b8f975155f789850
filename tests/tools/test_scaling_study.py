"""tools/scaling_study.py: tables, pictures, and one message for a wrong argument."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tools.scaling_study import main

ROOT = Path(__file__).resolve().parents[2]


def test_tables(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--table", "best", "traffic", "--models", "s0_300m", "Llama 3 405B", "--gpus", "8"]) == 0
    printed = capsys.readouterr().out.splitlines()
    rows = [line for line in printed if line.startswith("| s0_300m | 8 | dp8 zero")]
    assert len(rows) == 1
    assert any(line.startswith("| Llama 3 405B | 8 | does not fit |") for line in printed)
    assert any(line.startswith("| dp8 zero0 1x256 |") for line in printed)
    heads = [line for line in printed if line.startswith("| layout |")]
    assert all(line.count("|") == heads[0].count("|") for line in printed if line.startswith("| dp8"))


def test_published_table_states_every_run(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--table", "published"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert sum(line.startswith(("| Megatron-LM", "| torchtitan")) for line in lines) == 26
    assert sum(line.endswith("| fit |") for line in lines) == 8


def test_pictures(tmp_path: Path) -> None:
    assert main(["--plot", str(tmp_path / "new"), "--models", "s1_730m", "--gpus", "8", "16"]) == 0
    for name in ("scaling_published.png", "scaling_best.png"):
        assert (tmp_path / "new" / name).read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--table", "best", "--models", "s0_300"], 'unknown "s0_300". Did you mean "s0_300m"?'),
        (["--table", "best", "--gpus", "0"], "--gpus 0: at least 1."),
        (["--table", "best", "--tokens", "100"], "--tokens 100 is less than a sequence"),
    ],
)
def test_bad_arguments(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code != 0
    assert message in capsys.readouterr().err


def test_runs_as_a_script_without_torch() -> None:
    """Nothing of the planner needs torch: with its import forbidden the tool still works."""
    code = (
        "import sys, runpy; sys.modules['torch'] = None; sys.argv = ['scaling_study.py', '--table', 'best', "
        "'--models', 's0_300m', '--gpus', '8']; runpy.run_path('tools/scaling_study.py', run_name='__main__')"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "| s0_300m | 8 |" in done.stdout
