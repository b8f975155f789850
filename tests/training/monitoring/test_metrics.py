"""Metrics: metrics.jsonl, TensorBoard, Weights & Biases, and what the terminal shows."""

from __future__ import annotations

import io
import json
import os
import re
import struct
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from megatronish.config.run import RunConfig
from megatronish.errors import ConfigError
from megatronish.training.monitoring import metrics as monitor_module
from megatronish.training.monitoring.metrics import DeviceMetrics, JsonLines, Monitor, TensorBoard, WandB, clock
from megatronish.training.monitoring.mfu import Peak
from tests.config.raw import read

CPU = torch.device("cpu")


class Terminal(io.StringIO):
    """A stream that claims to be a terminal."""

    def isatty(self) -> bool:
        return True


def run_of(steps: int = 100, **log: Any) -> RunConfig:
    return read(megatronish={"train": {"steps": steps}, "log": {"tensorboard": False, **log}})


def lines_of(run_dir: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture
def now(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """A clock that only a test advances."""
    time = [1000.0]
    monkeypatch.setattr(monitor_module.time, "perf_counter", lambda: time[0])
    return time


def test_metrics_of_a_step(tmp_path: Path, now: list[float]) -> None:
    """Rates by hand: 10 steps with 5,000 tokens in 4 seconds, 6 FLOPs per token, of a peak of 30,000 FLOP/s."""
    monitor = Monitor(run_of(), tmp_path, 0, 6.0, Peak(30_000.0, "test"), CPU, io.StringIO())
    now[0] += 4
    monitor.step(10, loss=2.5, rate=1e-3, grad_norm=0.75, tokens=5_000, new_tokens=5_000)
    (line,) = lines_of(tmp_path)
    exact = {"step": 10, "loss": 2.5, "lr": 1e-3, "grad_norm": 0.75, "tokens": 5_000}
    assert {name: line[name] for name in exact} == exact
    assert (line["tokens_per_second"], line["step_seconds"], line["mfu"]) == (1250.0, 0.4, 0.25)
    assert line["memory_gib"] == pytest.approx(DeviceMetrics(CPU).memory_gib(), rel=0.2)
    assert 0 <= line["host/cpu_percent"] <= 100
    assert line["host/rss_gib"] > 0
    assert "gpu/watts" not in line


def test_no_gradient_norm_and_no_peak(tmp_path: Path, now: list[float]) -> None:
    out = io.StringIO()
    monitor = Monitor(run_of(), tmp_path, 0, 6.0, None, CPU, out)
    now[0] += 1
    monitor.step(1, 2.5, 1e-3, None, 10, 10)
    (line,) = lines_of(tmp_path)
    assert line["grad_norm"] is None and "mfu" not in line
    assert "MFU" not in out.getvalue() and "grad" not in out.getvalue()


def test_rates_exclude_pauses(tmp_path: Path, now: list[float]) -> None:
    """A validation of 100 s between two reports: 1,000 tokens in 2 + 3 seconds of training are 200 per second."""
    out = io.StringIO()
    monitor = Monitor(run_of(), tmp_path, 0, 6.0, None, CPU, out)
    now[0] += 2
    now[0] += 100
    monitor.validation(4, 2.0, 500, 100.0, is_best=True)
    monitor.pause_ends(100.0)
    now[0] += 3
    monitor.step(10, 2.5, 1e-3, 0.5, 1_000, 1_000)
    validation, step = lines_of(tmp_path)
    assert validation == {"step": 4, "validation_loss": 2.0, "validation_tokens": 500, "validation_seconds": 100.0}
    assert (step["tokens_per_second"], step["step_seconds"]) == (200.0, 0.5)
    assert "ETA 0:45" in out.getvalue(), "90 steps at half a second"
    assert "validation at step 4: loss 2.0000 over 500 tokens, best so far\n" in out.getvalue()


def test_eta_after_a_resume_counts_this_process_only(tmp_path: Path, now: list[float]) -> None:
    out = io.StringIO()
    monitor = Monitor(run_of(steps=100), tmp_path, 90, 6.0, None, CPU, out)
    now[0] += 10
    monitor.step(95, 2.5, 1e-3, 0.5, 1_000, 50)
    assert "step 95/100" in out.getvalue() and "ETA 0:10" in out.getvalue()
    assert lines_of(tmp_path)[0]["step_seconds"] == 2.0


def monitored(out: io.StringIO, tmp_path: Path, now: list[float]) -> str:
    """What three steps and a message look like on `out`."""
    monitor = Monitor(run_of(), tmp_path, 0, 6.0, Peak(2e6, "test"), CPU, out)
    for step in (1, 2, 3):
        now[0] += 1
        monitor.advance(step)
        monitor.step(step, 2.5, 1e-3, 0.5, 1_000 * step, 1_000)
        if step == 2:
            monitor.message("saved somewhere")
    monitor.close()
    return out.getvalue()


def test_a_terminal_gets_a_progress_bar(tmp_path: Path, now: list[float]) -> None:
    """Each update overwrites the bar; a message is printed on a line of its own above it; the bar ends with a new line."""
    text = monitored(Terminal(), tmp_path, now)
    bars = [part for part in text.split("\r") if "1/100" in part]
    assert re.search(
        r"1%\|.*\| 1/100, loss 2\.5000 \| 1,000 tokens/s \| MFU 0\.3% \| \d+\.\d\d GiB \| ETA 1:39", bars[-1]
    )
    assert "saved somewhere\n" in text and "3/100, loss 2.5000" in text.split("saved somewhere\n")[1]
    assert text.count("\n") == 3 and text.endswith("\n"), "the first step, the message, the end"


def test_a_log_file_gets_plain_lines(tmp_path: Path, now: list[float]) -> None:
    text = monitored(io.StringIO(), tmp_path, now)
    assert "\r" not in text and "\x1b" not in text
    first, *lines = text.splitlines()
    assert first.startswith("first step done ")
    assert [line.split(" | ")[0] for line in lines] == ["step 1/100", "step 2/100", "saved somewhere", "step 3/100"]
    assert lines[0].startswith(
        "step 1/100 | loss 2.5000 | lr 1.00e-03 | grad norm 0.500 | 1,000 tokens/s | MFU 0.3% | "
    )
    assert lines[0].endswith(" GiB | ETA 1:39")


@pytest.mark.parametrize(
    ("seconds", "shown"), [(0, "0:00"), (59.6, "1:00"), (125, "2:05"), (3599.4, "59:59"), (3661, "1:01:01")]
)
def test_clock(seconds: float, shown: str) -> None:
    assert clock(seconds) == shown


def test_a_resumed_run_drops_what_it_will_write_again(tmp_path: Path) -> None:
    """Lines past the resumed step, a last line truncated by a kill, and lines that are not metrics."""
    path = tmp_path / "metrics.jsonl"
    lines = [json.dumps({"step": step, "loss": float(step)}) for step in (1, 2, 3, 4)]
    path.write_text("\n".join([lines[0], "", lines[1], '{"loss": 3}', "7", lines[2], lines[3], '{"step": 2, "lo']))
    writer = JsonLines(path, resumed_step=2)
    assert [line["step"] for line in lines_of(tmp_path)] == [1, 2]
    writer.write(3, {"loss": 30.0})
    assert [line["loss"] for line in lines_of(tmp_path)] == [1.0, 2.0, 30.0], "written at once, not at the end"
    writer.close()
    JsonLines(path, resumed_step=0).close()
    assert path.read_text() == "", "a run that begins again begins its metrics again"


def test_a_kill_during_the_rewrite_loses_no_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n')

    def broken(handle: int) -> None:
        raise OSError("I/O error")

    monkeypatch.setattr(os, "fsync", broken)
    with pytest.raises(OSError):
        JsonLines(path, resumed_step=1)
    assert path.read_text() == '{"step": 1}\n{"step": 2}\n'


def scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """What TensorBoard shows for a run."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder))
    events.Reload()
    return {tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def test_tensorboard_shows_the_numbers(tmp_path: Path) -> None:
    writer = TensorBoard(tmp_path, resumed_step=0)
    writer.write(10, {"loss": 2.5, "grad_norm": None, "tokens": 5000})
    writer.write(20, {"loss": 2.25, "grad_norm": 0.5})
    writer.close()
    assert scalars(tmp_path) == {"loss": [(10, 2.5), (20, 2.25)], "tokens": [(10, 5000.0)], "grad_norm": [(20, 0.5)]}


@pytest.mark.parametrize("resumed", [10, 0])
def test_tensorboard_drops_steps_that_are_repeated(resumed: int, tmp_path: Path) -> None:
    """After a kill at step 30, from a checkpoint at 10 and from none at all."""
    first = TensorBoard(tmp_path, resumed_step=0)
    for step in (10, 20, 30):
        first.write(step, {"loss": float(step)})
    first.close()
    second = TensorBoard(tmp_path, resumed)
    second.write(20, {"loss": 0.5})
    second.close()
    assert scalars(tmp_path)["loss"] == ([(10, 10.0)] if resumed else []) + [(20, 0.5)]


def log_records(path: Path) -> Iterator[bytes]:
    """Records of a W&B file: a header of 7 bytes, then LevelDB's log format (blocks of 32 KiB; crc, length, type)."""
    data, place, record = path.read_bytes(), 7, b""
    assert data.startswith(b":W&B")
    while place + 7 <= len(data):
        rest = 32768 - place % 32768
        if rest < 7:  # the end of a block is padded
            place += rest
            continue
        length, kind = struct.unpack_from("<HB", data, place + 4)
        record += data[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # a complete record, or the last part of one
            yield record
            record = b""


def wandb_records(run_dir: Path) -> tuple[set[str], list[dict[str, Any]], dict[str, Any]]:
    """Run ids, history rows and configuration in the offline files of a run's folder."""
    from wandb.proto import wandb_internal_pb2

    ids, rows, config = set(), [], {}
    for path in sorted(run_dir.glob("wandb/offline-run-*/*.wandb"), key=lambda path: path.stat().st_mtime_ns):
        for data in log_records(path):
            record = wandb_internal_pb2.Record()
            record.ParseFromString(data)
            if record.HasField("run"):
                ids.add(record.run.run_id)
                config |= {item.key: json.loads(item.value_json) for item in record.run.config.update}
            if record.HasField("history"):
                items = record.history.item
                rows.append({".".join(item.nested_key) or item.key: json.loads(item.value_json) for item in items})
    return ids, rows, config


def test_wandb_offline_writes_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a network; a second process resumes the same run."""
    pytest.importorskip("wandb")
    for name in ("WANDB_CONFIG_DIR", "WANDB_CACHE_DIR", "WANDB_DATA_DIR"):
        monkeypatch.setenv(name, str(tmp_path / name))
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setenv("WANDB__DISABLE_STATS", "true")
    config = run_of(wandb="offline", wandb_project="probe")
    for step, loss in ((10, 2.5), (20, 2.25)):
        sink = WandB(config, tmp_path)
        sink.write(step, {"loss": loss, "grad_norm": None})
        sink.write(step, {"validation_loss": loss + 1})
        sink.close()
        time.sleep(1.01)  # W&B names the files of a process by the second it started
    ids, rows, written = wandb_records(tmp_path)
    assert ids == {(tmp_path / "wandb_id").read_text()}
    assert [(row["_step"], row["loss"], row["validation_loss"]) for row in rows] == [(10, 2.5, 3.5), (20, 2.25, 3.25)]
    assert written["megatronish"]["train"]["steps"] == 100


def test_missing_wandb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(
        ConfigError, match="log.wandb is 'online' and wandb is not installed: pip install wandb, or --log.wandb off"
    ):
        WandB(run_of(wandb="online"), tmp_path)
