"""tools/bench_ops.py on a small case: the figures are those of the operators that it names."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from megatronish.ops.extension import EXTENSION

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.slow
@pytest.mark.skipif(not EXTENSION.cpu, reason=EXTENSION.cpu_problem or "built")
def test_bench_ops(tmp_path: Path) -> None:
    figures, picture = tmp_path / "bench.json", tmp_path / "bench.png"
    small = [
        "--ops",
        "swiglu",
        "--dtypes",
        "bf16",
        "--widths",
        "256",
        "--mib",
        "1",
        "--copy-mib",
        "1",
        "--repeats",
        "3",
    ]
    command = [
        sys.executable,
        "tools/bench_ops.py",
        "--device",
        "cpu",
        *small,
        "--json",
        str(figures),
        "--plot",
        str(picture),
    ]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert [line.split()[:3] for line in result.stdout.splitlines()[1:]] == [
        ["swiglu", way, "bf16"] for way in ("fwd", "bwd")
    ]
    results = json.loads(figures.read_text())
    assert {(r["implementation"], r["direction"]) for r in results} == {
        (name, way) for name in ("fused", "eager", "compiled") for way in ("fwd", "bwd")
    }
    for r in results:
        # One bf16 rounding has an rms of 1.65e-3; the eager composition has two or three.
        assert 1.4e-3 < r["error"] < (3.5e-3 if r["implementation"] == "eager" else 1.8e-3)
        passes = 3 if r["direction"] == "fwd" else 5
        moved = passes * r["rows"] * r["width"] * 2
        assert r["rows"] == 2048 and r["gb_per_s"] == pytest.approx(moved / r["microseconds"] / 1e3)
    assert picture.read_bytes()[:4] == b"\x89PNG"
