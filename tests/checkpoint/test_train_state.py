"""The counters of a run: what a checkpoint keeps, and when a run may resume from it."""

from __future__ import annotations

import json
import re
from dataclasses import MISSING, fields, replace
from pathlib import Path
from typing import Any

import pytest

from megatronish.checkpoint.train_state import STATE_FILE, TrainState
from megatronish.errors import ConfigError
from tests.config.raw import read

START = TrainState.start(read(gradient_accumulation_steps=2), read().batch_plan(2), "abc")


def test_a_run_starts_at_nothing() -> None:
    run = read(bf16={"enabled": True}, zero_optimization={"stage": 2}, megatronish={"train": {"seed": 7}})
    state = TrainState.start(run, run.batch_plan(4), "abc")
    assert (state.step, state.samples, state.tokens, state.best_loss) == (0, 0, 0, None)
    assert (state.data_size, state.zero_stage, state.optimizer, state.dtype, state.seed) == (4, 2, "AdamW", "bf16", 7)


def test_counters_advance() -> None:
    twice = START.advance(8, 800).advance(4, 300)
    assert twice == replace(START, step=2, samples=12, tokens=1100)


@pytest.mark.parametrize("best", [None, 1.25, 0.1 + 0.2])
def test_saved_and_loaded_is_the_same(best: float | None, tmp_path: Path) -> None:
    """Every bit of the best loss too: a resumed run compares with it."""
    state = replace(START, step=3, best_loss=best)
    state.save(tmp_path)
    assert TrainState.load(tmp_path) == state


def test_unreadable_states(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=f"no {STATE_FILE}; this is not a checkpoint of megatronish"):
        TrainState.load(tmp_path)
    START.save(tmp_path)
    complete = (tmp_path / STATE_FILE).read_text()
    for torn in ("", complete[: len(complete) // 2], "[]", "3"):
        (tmp_path / STATE_FILE).write_text(torn)
        with pytest.raises(ConfigError, match=r"state.json: cannot be read \(.*\); use an older checkpoint"):
            TrainState.load(tmp_path)
    raw = json.loads(complete)
    for field in fields(TrainState):
        if field.default is not MISSING or field.default_factory is not MISSING:
            continue
        (tmp_path / STATE_FILE).write_text(json.dumps({key: value for key, value in raw.items() if key != field.name}))
        with pytest.raises(ConfigError, match=f"cannot be read .*{field.name}"):
            TrainState.load(tmp_path)


LAYOUTS: list[tuple[str, Any, str]] = [
    ("data_size", 4, "data-parallel ranks 2, this run has 4"),
    ("tensor", 2, "tensor-parallel ranks 1, this run has 2"),
    ("sequence", 2, "sequence-parallel ranks 1, this run has 2"),
    ("pipeline", 2, "pipeline stages 1, this run has 2"),
    ("zero_stage", 2, "ZeRO stage 1, this run has 2"),
]
OTHERS: list[tuple[str, Any, str]] = [
    ("optimizer", "Lion", "optimizer AdamW, this run has Lion"),
    ("dtype", "bf16", "training dtype fp32, this run has bf16"),
    ("seed", 7, "train.seed 1234, this run has 7"),
]


@pytest.mark.parametrize(("name", "value", "text"), OTHERS)
def test_another_run_is_refused(name: str, value: Any, text: str) -> None:
    """The message names the checkpoint, both values and both fixes."""
    fresh = replace(START, **{name: value})
    with pytest.raises(ConfigError) as error:
        replace(START, step=5).continue_as(fresh, Path("runs/x/step-5"), moves=True)
    message = str(error.value)
    assert message.startswith(f"runs/x/step-5 was saved with {text}. Start with ")
    assert "or begin afresh with --train.resume never and another --train.save_dir." in message


@pytest.mark.parametrize(("name", "value", "text"), LAYOUTS)
def test_another_layout_resumes_if_the_optimizer_state_can_move(name: str, value: Any, text: str) -> None:
    """The counters are kept and the layout is the new one; otherwise the message gives the reason."""
    fresh, old = replace(START, **{name: value}), replace(START, step=5, tokens=400)
    assert old.continue_as(fresh, Path("x"), moves=True) == replace(fresh, step=5, tokens=400)
    assert old.moved(fresh) == re.sub(r"(\d+), this run has", r"\1 ->", text) and old.moved(START) == ""
    with pytest.raises(ConfigError) as error:
        old.continue_as(fresh, Path("runs/x/step-5"), moves=False)
    assert str(error.value).startswith(
        f"runs/x/step-5 was saved with {text}, and its optimizer state cannot be moved to another layout. Start with "
    )


def test_another_dataset() -> None:
    fresh = replace(START, data_identity="0123456789abcdef")
    with pytest.raises(ConfigError) as error:
        START.continue_as(fresh, Path("runs/x"), moves=True)
    message = str(error.value)
    assert "runs/x was saved on another dataset (SHA-256 abc..., this run reads 0123456789ab...)" in message
    assert (
        "another --data.path, or files that were replaced under the same one. Give the old data to continue it, or begin afresh"
        in message
    )


def test_what_may_differ() -> None:
    """Progress is not compared."""
    there = replace(START, step=5, samples=40, tokens=4000, best_loss=2.0)
    assert there.continue_as(START, Path("x"), moves=False) == there
    compared = {name for name, _, _ in [*OTHERS, *LAYOUTS]} | {"data_identity", "data_order"}
    stands = {"step", "samples", "tokens", "best_loss", "skipped", "left_out", "rollbacks", "losses"}
    assert {field.name for field in fields(TrainState)} == compared | stands


def test_a_step_without_an_update(tmp_path: Path) -> None:
    """It is passed: its samples count as read, its tokens do not as trained on, and the schedule leaves it out."""
    state = START.advance(8, 256).advance(8, 256, updated=False)
    assert (state.step, state.samples, state.tokens, state.skipped) == (2, 16, 256, 1)
    some = replace(state, left_out=[[24, 40]], losses=[2.5, 0.1 + 0.2], rollbacks=1)
    some.save(tmp_path)
    assert TrainState.load(tmp_path) == some
    assert [replace(some, samples=at).leaves_out(8) for at in (8, 16, 17, 24, 39, 40)] == [
        *(False, False, True),  # 17 to 24 holds one of them, as when a step is another number of samples than before
        *(True, True, False),
    ]


def test_another_order_of_the_data(tmp_path: Path) -> None:
    """Both values of each setting; a checkpoint without these settings is accepted."""
    saved = replace(START, data_order={"data.order": "shuffled", "data.split": "99,1,0"})
    fresh = replace(START, data_order={"data.order": "megatron", "data.split": "99,1,0", "samples of the run": "64"})
    with pytest.raises(ConfigError) as error:
        saved.continue_as(fresh, Path("runs/x"), moves=True)
    assert str(error.value).startswith(
        "runs/x counted its samples in another order: data.order shuffled (this run: megatron), "
        "samples of the run not set (this run: 64). Set that back"
    )
    saved.save(tmp_path)
    raw = json.loads((tmp_path / STATE_FILE).read_text())
    assert len(json.dumps(raw)) < 1024, "the state of a run's data is a few numbers and names"
    del raw["data_order"]
    (tmp_path / STATE_FILE).write_text(json.dumps(raw))
    TrainState.load(tmp_path).continue_as(fresh, Path("runs/x"), moves=True)


def test_an_earlier_name_of_a_setting(tmp_path: Path) -> None:
    """States saved before 2026-11-30 name the number of samples otherwise."""
    replace(START, data_order={"data.order": "megatron", "samples of the run": "64"}).save(tmp_path)
    path = tmp_path / STATE_FILE
    path.write_text(path.read_text().replace("samples of the run", "samples of the whole run"))
    assert TrainState.load(tmp_path).data_order == {"data.order": "megatron", "samples of the run": "64"}
