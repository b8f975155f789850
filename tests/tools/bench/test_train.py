"""tools/bench/train.py on a small model: the peers are the same model, the table is complete, the profile adds up."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

from megatronish.ops.extension import EXTENSION

ROOT = Path(__file__).resolve().parents[3]
SMALL = [
    "--layers",
    "2",
    "--hidden",
    "64",
    "--heads",
    "4",
    "--kv-heads",
    "2",
    "--ffn",
    "96",
    "--vocab",
    "128",
    "--tokens",
    "64",
    "--threads",
    "1",
    "--device",
    "cpu",
]


def _bench(*arguments: str) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, "tools/bench/train.py", *SMALL, *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


@pytest.mark.slow
def test_table_figures_and_profile(tmp_path: Path) -> None:
    """litgpt, which the development environment lacks, is reported as missing; its shapes are those of transformers."""
    names = ["megatronish reference", "megatronish fused", "transformers eager", "litgpt eager"]
    figures = tmp_path / "f.json"
    outputs = ["--json", str(figures), "--profile", "--profile-steps", "2"]
    result = _bench("--dtypes", "fp32", "bf16", "--rounds", "3", "--only", *names, *outputs)
    assert result.returncode == 0, result.stderr
    expected = [name for name in names if EXTENSION.cpu or "fused" not in name]
    if importlib.util.find_spec("litgpt") is None:
        expected.remove("litgpt eager")
        assert "left out: litgpt is not installed: pip install litgpt" in result.stdout
    assert result.stdout.count(f"all {len(expected)} agree, every gradient within") == 2
    found = json.loads(figures.read_text())
    assert [(r["dtype"], r["implementation"]) for r in found["results"]] == [
        (dtype, name) for dtype in ("fp32", "bf16") for name in expected
    ]
    first = found["results"][0]
    for r in found["results"]:
        assert r["tokens_per_second"] == pytest.approx(64 / r["median"]) and r["p10"] <= r["median"] <= r["p90"]
        # 5 steps of AdamW on the same data from the same weights: the same path, but for bf16's roundings.
        assert r["last_loss"] == pytest.approx(first["last_loss"], rel=1e-4 if r["dtype"] == "fp32" else 1e-2)
        assert r["last_loss"] != r["first_loss"]
    for name in expected:
        row = found["profile_ms"][f"fp32 {name}"]
        for kind in ("matmul", "attention", "norm + residual", "rope + layout", "swiglu", "cross-entropy", "optimizer"):
            assert row[kind] > 0, (name, kind)
        assert row["fused by compiler"] == 0


def test_a_different_model_is_found_out() -> None:
    """The check of the first step is what makes the comparison one: one projection 2% larger must fail it, though it
    leaves the loss as it is (at the start queries and keys hardly matter)."""
    code = (
        "import sys; import torch, tools.bench.train as b\n"
        "real = b.transformers_names\n"
        "def spoiled(state, config):\n"
        "    theirs = real(state, config)\n"
        "    theirs['model.layers.0.self_attn.q_proj.weight'] = theirs['model.layers.0.self_attn.q_proj.weight'] * 1.02\n"
        "    return theirs\n"
        "b.transformers_names = spoiled\n"
        f"b.main({SMALL} + ['--dtypes', 'fp32', '--rounds', '1', '--only', 'megatronish reference', 'transformers eager'])\n"
    )
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 1
    assert "transformers eager is another model: first loss" in result.stderr
    assert "gradient of model.layers.0.self_attn.k_proj.weight off by 0.02" in result.stderr


def test_messages() -> None:
    result = _bench("--only", "megatronish fast")
    assert result.returncode == 2
    assert "--only: unknown ['megatronish fast']: choose from megatronish fused, " in result.stderr
    result = _bench("--device", "cuda", "--profile")
    assert result.returncode == 2 and "--profile looks at operators on a CPU: add --device cpu" in result.stderr
