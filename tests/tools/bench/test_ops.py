"""tools/bench/ops.py: the figures are those of the operators that it names, and what is wrong or not compiled is not timed."""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from megatronish.ops.extension import EXTENSION
from tools.bench.operators import run as bench_run
from tools.bench.operators.bars import BarResult, judge
from tools.bench.operators.operators import operators
from tools.bench.operators.timing import summarise

ROOT = Path(__file__).resolve().parents[3]
needs_kernels = pytest.mark.skipif(not EXTENSION.cpu, reason=EXTENSION.cpu_problem or "built")


@pytest.fixture(scope="module")
def tool() -> ModuleType:
    spec = importlib.util.spec_from_file_location("bench_ops_tool", ROOT / "tools/bench/ops.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def options(tool: ModuleType) -> argparse.Namespace:
    parsed: argparse.Namespace = tool.parse(
        ["--device", "cpu", "--repeats", "1", "--dtypes", "fp32", "--widths", "128"]
    )
    parsed.copy_mib, parsed.rotate_mib = 1, 0
    return parsed


@pytest.fixture
def quick_compile(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch.compile without its code generator: dynamo's part, limits and all, is the same."""
    compile_ = torch.compile
    monkeypatch.setattr(torch, "compile", lambda function, **how: compile_(function, backend="eager", **how))


def _bench(options: argparse.Namespace) -> bench_run.Bench:
    return bench_run.Bench(options, torch.device("cpu"))


def _timed(bench: bench_run.Bench, direction: str) -> list[str]:
    return [r.implementation for r in bench.report.results if r.direction == direction]


def test_the_command_line_names_every_operator(tool: ModuleType) -> None:
    assert list(operators()) == tool.OPS


@pytest.mark.slow
@needs_kernels
def test_bench_ops(tmp_path: Path) -> None:
    figures = tmp_path / "bench.json"
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
    small += ["--no-host-row", "--bars"]
    command = [sys.executable, "tools/bench/ops.py", "--device", "cpu", *small]
    command += ["--json", str(figures)]
    result = subprocess.run(
        command, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    lines = result.stdout.splitlines()
    assert lines[1] == "not compared: liger, apex, flash-attn, quack (its kernels need a CUDA device)"
    assert [line.split()[:3] for line in lines if line.startswith("swiglu")] == [
        ["swiglu", way, "bf16"] for way in ("fwd", "bwd")
    ]
    assert lines[-1].startswith("bars: ") and "[1/1] swiglu bf16 256" in result.stderr
    found = json.loads(figures.read_text())
    assert found["machine"]["device"] == "cpu" and found["left_out"] == []
    assert {(r["implementation"], r["direction"]) for r in found["results"]} == {
        (name, way) for name in ("fused", "eager", "compiled") for way in ("fwd", "bwd")
    }
    for r in found["results"]:
        # One bf16 rounding has an rms of 1.65e-3; the eager composition has two or three.
        assert 1.4e-3 < r["error"] < (3.5e-3 if r["implementation"] == "eager" else 1.8e-3)
        passes = 3 if r["direction"] == "fwd" else 5
        moved = passes * r["rows"] * r["width"] * 2
        assert r["rows"] == 2048 and r["gb_per_s"] == pytest.approx(moved / r["microseconds"] / 1e3)


@needs_kernels
@pytest.mark.parametrize("op", operators())
def test_every_implementation_of_every_operator_is_right(op: str, options, quick_compile) -> None:  # type: ignore[no-untyped-def]
    """The wider bar of wrong results holds for all; the fused one is within its own, forward and backward."""
    for dtype in ("fp32", "bf16", "fp16"):
        bench = _bench(options)
        bench.run(bench_run.Case(op, dtype, 64, 512))
        assert bench.report.left_out == []
        expected = ["fused", "compiled", *operators()[op].others]
        for direction in operators()[op].directions:
            assert _timed(bench, direction) == expected
        for verdicts in bench.report.verdicts.values():
            assert verdicts[0].what.startswith("error") and verdicts[0].met


@needs_kernels
def test_the_ninth_shape_is_compiled_too(options: argparse.Namespace, quick_compile: None) -> None:
    """dynamo stops at 8 versions of one function and runs it eagerly from then on, unless it starts anew."""
    bench = _bench(options)
    for number in range(1, 12):
        before = torch._dynamo.utils.counters["stats"]["unique_graphs"]
        bench.run(bench_run.Case("rms_norm", "fp32", number, 128))
        assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > before
    assert bench.report.left_out == []
    assert _timed(bench, "fwd").count("compiled") == 11


@needs_kernels
def test_eager_in_the_guise_of_compiled_is_left_out(options, quick_compile, capsys) -> None:  # type: ignore[no-untyped-def]
    bench = _bench(options)
    with torch._dynamo.config.patch(disable=True):
        bench.run(bench_run.Case("swiglu", "fp32", 4, 128))
    assert "compiled" not in _timed(bench, "fwd") + _timed(bench, "bwd")
    # torch's own words in new versions ("found no compiled frames"), ours in older ones
    assert "LEFT OUT swiglu fwd fp32 4x128: compiled: RuntimeError: torch.compile" in capsys.readouterr().out


def _replaced(monkeypatch: pytest.MonkeyPatch, op: str, **changes: Any) -> None:
    table = operators()
    table[op] = replace(table[op], **changes)
    monkeypatch.setattr(bench_run, "operators", lambda: table)


def _unwritten(gate_up: torch.Tensor) -> torch.Tensor:
    gate, up = gate_up.chunk(2, dim=-1)
    y = torch.nn.functional.silu(gate) * up
    return torch.cat((y[:-1], torch.full_like(y[-1:], torch.nan)))


@needs_kernels
@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda gate_up: torch.relu(gate_up.chunk(2, -1)[0]) * gate_up.chunk(2, -1)[1], "relative error"),
        (_unwritten, "relative error nan"),
        (lambda gate_up: torch.ops.megatronish.no_such_operator(gate_up), "no attribute"),
    ],
    ids=["another function", "a row of NaN", "raises"],
)
def test_a_wrong_kernel_is_not_timed(wrong, message, options, quick_compile, monkeypatch, capsys) -> None:  # type: ignore[no-untyped-def]
    _replaced(monkeypatch, "swiglu", fused=wrong)
    options.ops, options.mib, options.host_row = ["swiglu"], 1, False
    assert bench_run.run(options) == 1
    printed = capsys.readouterr().out
    assert printed.count("LEFT OUT swiglu") == 2 and message in printed
    assert all(line.split()[4] == "compiled" for line in printed.splitlines() if line.startswith("swiglu"))


@needs_kernels
def test_a_peer_that_fails_does_not_count(options, quick_compile, monkeypatch, capsys) -> None:  # type: ignore[no-untyped-def]
    def broken(gate_up: torch.Tensor) -> torch.Tensor:
        raise OSError("libtriton.so is broken")

    _replaced(monkeypatch, "swiglu", others={"eager": broken})
    options.ops, options.mib, options.host_row = ["swiglu"], 1, False
    assert bench_run.run(options) == 0
    assert "eager: OSError: libtriton.so is broken" in capsys.readouterr().out


def test_inputs_rotate_over_what_is_asked_for(options: argparse.Namespace) -> None:
    options.rotate_mib = 3
    problem = bench_run.Problem(
        bench_run.Case("rms_norm", "fp32", 2048, 128), operators()["rms_norm"], torch.device("cpu"), options
    )
    calls = problem.calls(lambda x, w: x, "fwd")
    pointers = {call().data_ptr() for call in calls}  # type: ignore[attr-defined]
    assert len(calls) == len(pointers) == 3  # 1 MiB each, and the weight


def test_a_device_that_is_not_there_is_refused(options: argparse.Namespace, capsys: pytest.CaptureFixture[str]) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    options.device = "cuda"
    assert bench_run.run(options) == 2
    assert "--device cuda: there is no CUDA GPU" in capsys.readouterr().err


def test_median_and_spread() -> None:
    timing = summarise([float(i) for i in range(101)])
    assert (timing.seconds, timing.spread) == (50.0, 80 / 50)


def _judge(op: str, direction: str, device: str, dtype: str, width: int, copy: float | None, **us: float) -> list[str]:
    verdicts = judge(
        op,
        direction,
        device,
        dtype,
        width,
        microseconds={name.replace("F_", "F."): value for name, value in us.items()},
        of_copy=copy,
        error=1e-3,
        weight_gradient=True,
    )
    return [str(verdict) for verdict in verdicts[1:]]


def test_bars() -> None:
    assert _judge("rms_norm", "fwd", "cpu", "bf16", 1024, 0.699, fused=10, eager=79, compiled=15) == [
        "copy 0.70 >= 0.70 met",
        "eager 7.90 >= 8x MISSED",
        "compiled 1.50 >= 1.5x met",
    ]
    assert _judge("rms_norm", "fwd", "cpu", "fp32", 1024, 0.5, fused=10, compiled=9) == [
        "copy 0.50 >= 0.60 MISSED",
        "compiled 0.90 >= 0.8x met",
    ]
    assert _judge("rms_norm", "fwd", "cuda", "bf16", 4096, 0.89, fused=10, liger=20, quack=9, compiled=11) == [
        "copy 0.89 >= 0.90 MISSED",
        "quack 0.90 >= 0.97x MISSED",
    ]
    assert _judge("rms_norm", "fwd", "cuda", "bf16", 1024, 0.89, fused=10)[0] == "copy 0.89 >= 0.85 met"
    assert _judge("rms_norm", "bwd", "cuda", "bf16", 2048, 0.7, fused=10, F_rms_norm=31) == [
        "copy 0.70 >= 0.65 met",
        "F.rms_norm 3.10 >= 3x met",
    ]
    assert _judge("rms_norm", "fwd+bwd", "cuda", "bf16", 1024, None, fused=79) == [
        "79 <= 80 us met",
        "liger >= 3x not measured",
    ]


def test_the_bar_of_the_error_is_wider_for_sums_over_rows() -> None:
    def met(direction: str) -> BarResult:
        return judge(
            "rms_norm",
            direction,
            "cpu",
            "fp32",
            128,
            microseconds={"fused": 1.0},
            of_copy=None,
            error=5e-7,
            weight_gradient=True,
        )[0]

    assert (met("fwd").met, met("bwd").met) == (False, True)
