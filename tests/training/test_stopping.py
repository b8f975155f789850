"""A run that is asked to stop saves after the step and ends with status 76, whichever rank was asked."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from megatronish.config.run import RunConfig
from megatronish.launch.exit import EXIT_SAVED
from megatronish.launch.process import Rank
from megatronish.training.stopping import OUT_OF_TIME, StopRequests, seconds_left
from tests.distributed import run_ranks
from tests.launch.faulty_ranks import start_ranks
from tests.runs import make_dataset, small_run

pytestmark = pytest.mark.distributed
STEPS = 6


def at_step(step: int, act: Any) -> None:
    """Call `act` in this process after `step` steps, at the beginning of the next."""
    from megatronish.training.loop import Trainer

    original = Trainer.next_step

    def acting(self: Any, batches: Any) -> Any:
        if self.state.step == step:
            act()
        return original(self, batches)

    Trainer.next_step = acting  # type: ignore[method-assign]  # a forked rank, which ends with the test


def send(number: signal.Signals) -> Any:
    return lambda: os.kill(os.getpid(), number)


def pretrain_rank(rank: int, world: int, config: RunConfig, asked: int, number: signal.Signals, times: int = 1) -> int:
    """Train; rank `asked` receives the signal `times` times in step 3."""
    from megatronish.errors import exit_on_user_error
    from megatronish.training.loop import pretrain

    if rank == asked:
        at_step(2, lambda: [send(number)() for _ in range(times)])
    with exit_on_user_error(rank == 0, f"rank {rank}"):
        return pretrain(config, Rank(rank, world, rank, world, "test"))
    raise AssertionError("exit_on_user_error() swallows nothing")


def run_config(folder: Path, name: str, changes: dict[str, Any] | None = None) -> RunConfig:
    (made := folder / "data").mkdir(exist_ok=True)
    data = next((str(path.with_suffix("")) for path in made.glob("*.idx")), None) or make_dataset(made)
    train = {"steps": STEPS, "save_interval": 100, "hang_timeout": 20.0}
    ours = {"train": train, "data": {"num_workers": 1}, "model": {"residual_dropout": 0.1}}
    return small_run(data, folder / name, {**(changes or {}), "megatronish": ours})


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT], ids=lambda n: n.name)
def test_a_signal_to_one_rank_stops_all_after_a_checkpoint(number: signal.Signals, tmp_path: Path) -> None:
    """Only rank 1 receives the signal in step 3: both save after it, exit with 76, and the run resumes bit-identically."""
    stopped = run_config(tmp_path, "stopped")
    ranks = start_ranks(2, tmp_path, pretrain_rank, 2, stopped, 1, number)
    assert ranks.wait() == {0: EXIT_SAVED, 1: EXIT_SAVED}, ranks.output(0) + ranks.output(1)
    assert f"stopped by {number.name} after step 3, saved; the same command resumes here" in ranks.output(0)
    checkpoints = Path(stopped.megatronish.train.save_dir) / "checkpoints"
    assert json.loads((checkpoints / "step-00000003" / "state.json").read_text())["step"] == 3

    if number == signal.SIGTERM:  # the others end in the same place
        unbroken = run_config(tmp_path, "unbroken")
        assert run_ranks(2, train_again, unbroken, group=False) == [0, 0]
        assert run_ranks(2, train_again, stopped, group=False) == [0, 0]
        last = [
            load_file(Path(config.megatronish.train.save_dir) / f"checkpoints/step-{STEPS:08d}/model.safetensors")
            for config in (unbroken, stopped)
        ]
        assert all((last[0][name] == last[1][name]).all() for name in last[0])


def train_again(rank: int, config: RunConfig) -> int:
    from megatronish.training.loop import pretrain

    return pretrain(config, Rank(rank, 2, rank, 2, "test"))


def test_a_second_ctrl_c_exits_immediately(tmp_path: Path) -> None:
    """Nothing is saved, and the other rank exits, too."""
    config = run_config(tmp_path, "run")
    ranks = start_ranks(2, tmp_path, pretrain_rank, 2, config, 0, signal.SIGINT, 2)
    statuses = ranks.wait()
    assert statuses[0] == 130 and statuses[1] in (75, 130), ranks.output(0) + ranks.output(1)
    assert "stopped by Ctrl-C" in ranks.output(0)
    assert not (tmp_path / "run" / "checkpoints" / "latest").exists()


def test_the_time_limit_saves_before_it(tmp_path: Path) -> None:
    """A limit that is exceeded by the first step: one step, a checkpoint, status 76."""
    config = run_config(tmp_path, "run")
    raw = config.to_json()
    raw["megatronish"]["train"]["time_limit"] = 1e-6
    ranks = start_ranks(1, tmp_path, pretrain_rank, 1, RunConfig.from_dict(raw, "test"), -1, signal.SIGTERM)
    assert ranks.wait() == {0: EXIT_SAVED}, ranks.output(0)
    assert f"stopped by {OUT_OF_TIME} after step 1, saved" in ranks.output(0)


def test_signals_are_recorded_and_handlers_restored() -> None:
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)]
    with StopRequests() as stops:
        assert stops.reason is None
        os.kill(os.getpid(), signal.SIGTERM)
        assert stops.reason == "SIGTERM"
        os.kill(os.getpid(), signal.SIGUSR1)
        assert stops.reason == "SIGTERM", "the first one is reported"
        os.kill(os.getpid(), signal.SIGINT)
        assert stops.reason == "SIGINT"
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
            threading.Event().wait(10)
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)] == before


def test_the_time_limit_leaves_time_for_a_step_and_a_checkpoint(monkeypatch: pytest.MonkeyPatch) -> None:
    """100 s: a save of 20 s (times 1.5) and steps of 5 s (times 2) mean stopping at 60 s."""
    now = 1000.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    stops = StopRequests(100.0)
    now += 20.0
    assert stops.reason is None
    stops.save_took(20.0)
    stops.save_took(15.0)
    stops.step_took(5.0)
    now = 1059.0
    assert stops.reason is None
    now = 1061.0
    assert stops.reason == OUT_OF_TIME


def test_the_time_limit_ignores_changes_of_the_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """A year forward and back: the remaining time is unchanged."""
    stops = StopRequests(3600.0)
    for jump in (3.2e7, -3.2e7):
        wall = time.time() + jump
        monkeypatch.setattr(time, "time", lambda wall=wall: wall)
        assert stops.reason is None


def test_the_earlier_of_time_limit_and_slurm_end_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(time, "time", lambda: 5000.0)
    assert seconds_left(None, {}) is None
    assert seconds_left(0.5, {}) == 1800.0
    assert seconds_left(0.5, {"SLURM_JOB_END_TIME": "5600"}) == 600.0
    assert seconds_left(0.1, {"SLURM_JOB_END_TIME": "5600"}) == 360.0
    assert seconds_left(None, {"SLURM_JOB_END_TIME": "5600"}) == 600.0
    assert seconds_left(None, {"SLURM_JOB_END_TIME": "Unknown"}) is None
