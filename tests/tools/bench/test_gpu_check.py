"""tools/bench/gpu_check.sh without a GPU: what it refuses, and how it continues after stages that fail, hang or die.

The interpreter that it calls is a stand-in: a shell script that plays each tool's part in a moment.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]
SCRIPT = ROOT / "tools/bench/gpu_check.sh"
pytestmark = pytest.mark.skipif(
    shutil.which("setsid") is None or shutil.which("timeout") is None, reason="needs setsid and timeout (Linux)"
)
# A training run writes a report every 20 ms and never ends; its loader (a child) notes that it lives, too.
STAND_IN = r"""#!/usr/bin/env bash
case "$*" in
  *"import deepspeed"* | *setup.py*) echo built ;;
  *bench/ops.py*) echo "half a table"; echo "Segmentation fault"; exit 139 ;;
  *preprocess_data.py*) echo tokenised ;;
  *"runpy"*)
    while (($#)); do [[ $1 == --train.save_dir ]] && folder=$2; [[ $1 == --kernels.ops ]] && ops=$2; shift; done
    echo "$$" >>"$PLAY/pids"
    [[ $folder == *zero_offload* ]] && { echo "CUDA out of memory"; exit 1; }
    sleep 1000 &
    echo "$!" >>"$PLAY/pids"
    [[ $folder == *zero3* ]] && { echo "still loading"; wait; }
    mkdir -p "$folder"
    for step in 1 2 3 4 5 6 7 8 9; do
      echo "{\"step\": $step, \"loss\": 9.5, \"tokens_per_second\": ${step}00.0, \"step_seconds\": 0.5, \"mfu\": 0.5, \"memory_gib\": $step}"
      sleep 0.02
    done >"$folder/metrics.jsonl"
    wait ;;
  *) exec REAL "$@" ;;
esac
"""


def _run(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    python = folder / "python"
    python.write_text(STAND_IN.replace("REAL", sys.executable))
    python.chmod(0o755)
    return subprocess.run(
        [str(SCRIPT), *arguments],
        cwd=folder,
        env={**os.environ, "PYTHON": str(python), "PLAY": str(folder)},
        capture_output=True,
        text=True,
        timeout=120,
    )


def _alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_every_stage_is_noted_whatever_becomes_of_it(tmp_path: Path) -> None:
    result = _run(tmp_path, "results", "--cpu-rehearsal", "--longest", "3")
    assert result.returncode == 1, result.stderr
    rows = [line.split("\t") for line in (tmp_path / "results/stages.tsv").read_text().splitlines()]
    assert [(name, status) for name, status, *_ in rows] == [
        ("wheels", "SKIPPED"),
        ("build", "OK"),
        ("tests", "SKIPPED"),
        ("bench", "FAILED"),
        ("data", "OK"),
        ("mfu:tiny:fused", "OK"),
        ("mfu:tiny:fused:blocks-compiled", "OK"),
        ("capped:cap", "SKIPPED"),
        ("capped:zero_offload", "FAILED"),
        ("capped:zero3_offload", "TIMEOUT"),
    ]
    messages = {name: text for name, _, _, text in rows}
    assert messages["tests"] == "no GPU"
    assert messages["bench"] == "status 139: Segmentation fault"
    assert messages["capped:zero_offload"] == "status 1: CUDA out of memory"
    assert messages["capped:zero3_offload"] == "over 3 s: still loading"
    summary = (tmp_path / "results/summary.txt").read_text()
    assert all(name in summary and name in result.stdout for name in messages)
    with tarfile.open(tmp_path / "results/logs.tar.gz") as logs:
        bench = logs.extractfile("logs/bench.log")
        assert bench is not None and bench.read() == b"half a table\nSegmentation fault\n"
    (first, second) = map(json.loads, (tmp_path / "results/training.jsonl").read_text().splitlines())
    assert (first["run"], second["run"]) == ("mfu:tiny:fused", "mfu:tiny:fused:blocks-compiled")
    # Ended once four reports are there; the first two are not counted.
    seen = len(first["loss"])
    assert seen >= 4 and first["reports"] == seen - 2 and first["memory_gib"] == seen
    assert first["tokens_per_second"] == 100 * (3 + seen) / 2 and first["mfu"] == 0.5
    pids = [int(text) for text in (tmp_path / "pids").read_text().split()]
    deadline = time.monotonic() + 10  # a killed process takes a moment to go
    while any(map(_alive, pids)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert len(pids) == 7 and not any(map(_alive, pids))


def test_only_the_stages_that_are_named_run(tmp_path: Path) -> None:
    result = _run(tmp_path, "--cpu-rehearsal", "--stages", "wheels,build", str(tmp_path / "out"))
    assert result.returncode == 0, result.stderr
    names = [line.split("\t")[0] for line in (tmp_path / "out/stages.tsv").read_text().splitlines()]
    assert names == ["wheels", "build"]


def test_missing_packages_and_no_wheels_is_a_failure(tmp_path: Path) -> None:
    (tmp_path / "deepspeed.py").write_text("raise ImportError\n")
    result = subprocess.run(
        [str(SCRIPT), "out", "--cpu-rehearsal", "--stages", "wheels"],
        cwd=tmp_path,
        env={**os.environ, "PYTHON": sys.executable, "PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert result.returncode == 1
    assert "deepspeed or pydantic is missing, and there is no --wheelhouse" in result.stdout


@pytest.mark.parametrize(
    ("arguments", "messages"),
    [
        (["--cpu-rehersal"], "unknown option --cpu-rehersal"),
        (["--stages", "build,bnech", "--cpu-rehearsal"], "unknown stage 'bnech'"),
        (["--wheelhouse"], "--wheelhouse needs a value"),
    ],
)
def test_bad_arguments(arguments: list[str], messages: str, tmp_path: Path) -> None:
    result = _run(tmp_path, *arguments)
    assert (result.returncode, result.stdout) == (2, "") and messages in result.stderr


@pytest.mark.skipif(shutil.which("nvidia-smi") is not None, reason="there may be a GPU")
def test_without_a_gpu_it_exits_with_a_message(tmp_path: Path) -> None:
    result = _run(tmp_path, "out")
    assert result.returncode == 2 and "no GPU: nvidia-smi lists none. --cpu-rehearsal" in result.stderr
    assert not (tmp_path / "out").exists()
