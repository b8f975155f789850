"""metrics.jsonl is read, with a last line that a crash cut short, smoothed without delay, and drawn."""

import json
import math
import struct
import subprocess
import sys
from pathlib import Path

import pytest

from megatronish.errors import UserError
from megatronish.training.monitoring.curves import draw_curves, read_curves, short_count, smooth
from tests.runs import small_run

ROOT = Path(__file__).resolve().parents[3]


def write_metrics(folder, steps=40, torn=True):
    lines = []
    for step in range(1, steps + 1):
        record = {"step": step, "loss": 5 - step / 20, "lr": 1e-3, "grad_norm": 1.0, "tokens": 64 * step}
        lines.append(json.dumps({**record, "tokens_per_second": 900.0 + step}))
        if step % 10 == 0:
            loss = math.nan if step == 40 else abs(step - 20) / 10 + 3
            lines.append(json.dumps({"step": step, "validation_loss": loss, "validation_tokens": 9}))
    folder.mkdir(exist_ok=True)
    (folder / "metrics.jsonl").write_text("\n".join(lines) + ('\n{"step": 41, "los' if torn else "\n"))


def png_size(path):
    raw = path.read_bytes()
    assert raw[:8] == b"\x89PNG\r\n\x1a\n"
    return struct.unpack(">II", raw[16:24])


def test_reads_points_in_order_and_the_best(tmp_path):
    write_metrics(tmp_path)
    curves = read_curves(tmp_path)
    assert curves.steps == list(range(1, 41)) and curves.losses[-1] == 3.0 and curves.speeds[0] == 901.0
    assert curves.validation_steps == [10, 20, 30, 40]
    assert curves.best == (20, 3.0), "a non-finite loss is not the best"
    assert curves.tokens == 64 * 40


def test_smoothing_has_no_delay_and_ignores_non_finite_values():
    line = [3.0 * i for i in range(20)]
    assert smooth(line, 7) == pytest.approx(line), "a straight line is unchanged"
    assert smooth([0, 0, 9, 0, 0], 3) == pytest.approx([0, 3, 3, 3, 0])
    assert smooth([1.0, math.nan, 3.0], 3) == pytest.approx([1, 2, 3])
    assert math.isnan(smooth([math.nan, 1.0], 3)[0])
    assert smooth([4.0, 5.0], 1) == [4.0, 5.0] and smooth([], 5) == []


def test_draws_with_and_without_optional_values(tmp_path):
    bare = tmp_path / "bare"
    bare.mkdir()
    (bare / "metrics.jsonl").write_text('{"step": 1, "loss": 2.0, "lr": 0.0, "grad_norm": null}\n')
    assert png_size(draw_curves(bare)) > (1000, 500)
    full = tmp_path / "full"
    write_metrics(full)
    small_run("data/set", full).save(full / "run.json")
    numbers = {"step": 40, "bits_per_byte": 1.5, "gzip_bits_per_byte": 1.9, "xz_bits_per_byte": 1.7}
    (full / "evaluation.json").write_text(json.dumps(numbers))
    picture = draw_curves(full, tmp_path / "c.svg").read_text()
    for text in (
        "full",
        "optimizer step",
        "loss (nats per token)",
        "best validation: 3.000 at step 20",
        "gzip -9    1.900",
    ):
        assert f"<!-- {text}" in picture  # matplotlib draws letters as paths and names them in a comment


def test_messages(tmp_path):
    with pytest.raises(UserError, match=r"metrics.jsonl does not exist: give the folder of a run"):
        draw_curves(tmp_path)
    (tmp_path / "metrics.jsonl").write_text('{"step": 4')
    with pytest.raises(UserError, match="holds no loss yet"):
        draw_curves(tmp_path)
    write_metrics(tmp_path)
    with pytest.raises(UserError, match=r"no picture format is called '.txt': use .png, .svg or .pdf"):
        draw_curves(tmp_path, tmp_path / "x.txt")
    with pytest.raises(UserError, match="cannot be written: No such file or directory"):
        draw_curves(tmp_path, tmp_path / "no" / "x.png")
    (tmp_path / "evaluation.json").write_text('{"step": 1}')
    with pytest.raises(UserError, match=r"evaluation.json cannot be read \(KeyError\('bits_per_byte'\)\)"):
        draw_curves(tmp_path)


def test_short_counts():
    assert [short_count(n) for n in (12, 1234, 4_003_072, 7.24e9, 1.5e12)] == ["12", "1.23k", "4M", "7.24B", "1.5T"]


def test_the_tool(tmp_path):
    write_metrics(tmp_path)
    command = [sys.executable, str(ROOT / "tools" / "analyze_checkpoints.py"), "--run-dir"]
    done = subprocess.run([*command, str(tmp_path)], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout) == (
        0,
        f"wrote {tmp_path / 'loss.png'}\n{tmp_path} has no checkpoint yet: no spectra\n",
    )
    missing = subprocess.run([*command, str(tmp_path / "none")], capture_output=True, text=True, timeout=120)
    assert missing.returncode == 2 and missing.stderr.startswith("error: ") and missing.stderr.count("\n") == 1
