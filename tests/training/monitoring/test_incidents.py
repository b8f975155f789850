"""The trainer with non-finite steps, which are skipped, reported, kept in a black box and replayed, and loss spikes with rollback."""

from __future__ import annotations

import dataclasses
import json
import math
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from megatronish.config.model import ModelConfig
from megatronish.config.run import RunConfig
from megatronish.data.training_data import open_training_data
from megatronish.launch.process import Rank
from megatronish.model.transformer import Transformer
from megatronish.training.monitoring.diagnosis import diagnose
from megatronish.training.monitoring.spikes import BadSteps, TrainingStopped, spike_score
from megatronish.training.step import LossModule
from tests.distributed import run_ranks
from tests.launch.faulty_ranks import start_ranks
from tests.runs import MODEL, make_dataset, small_run
from tests.training.test_bad_steps import break_gradient, break_loss
from tests.training.test_resume import pretrain_rank, read_losses

pytestmark = pytest.mark.distributed
SAMPLES = 8  # of a step: micro batch 2, accumulation 2, 2 ranks
DROPOUT = {"residual_dropout": 0.1, "attention_dropout": 0.1}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    return make_dataset(tmp_path_factory.mktemp("data"))


def run_config(data: str, folder: Path, train: dict[str, Any], changes: dict[str, Any] | None = None) -> RunConfig:
    ours = {"train": {"steps": 12, "save_interval": 4, "hang_timeout": 20.0, **train}, "model": DROPOUT}
    return small_run(data, folder, {**(changes or {}), "megatronish": ours})


def pretrain_with(rank: int, config: RunConfig, faults: dict[int, str], left_out: list[list[int]]) -> int:
    """Train on two ranks with a fault of rank 1's engine, or all ranks', in some steps (from 0), by its name."""
    from megatronish.errors import exit_on_user_error
    from megatronish.training.loop import Trainer, pretrain
    from megatronish.training.setup import preparation

    original = Trainer.next_step

    def faulty(self: Any, batches: Any) -> Any:
        kind, _, value = faults.get(self.state.step, "").partition(" ")
        model = self.engine.module.model
        if self.state.leaves_out(SAMPLES):
            kind = ""
        if kind == "all" or (kind and rank == 1):
            (break_gradient if kind == "gradient" else break_loss)(model, float(value))
        return original(self, batches)

    Trainer.next_step = faulty  # type: ignore[method-assign]  # of a forked rank, which ends with the test
    start = preparation.TrainState.start
    preparation.TrainState.start = lambda *args: dataclasses.replace(start(*args), left_out=left_out)  # type: ignore
    with exit_on_user_error(rank == 0, f"rank {rank}"):
        return pretrain(config, Rank(rank, 2, rank, 2, "test"))
    raise AssertionError("exit_on_user_error() swallows nothing")


def weights_of(folder: Path, step: int) -> dict[str, torch.Tensor]:
    return load_file(folder / f"checkpoints/step-{step:08d}/model.safetensors")


def assert_equal_weights(one: Path, other: Path, step: int) -> None:
    first, second = weights_of(one, step), weights_of(other, step)
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_bad_steps_are_skipped_and_the_run_continues(data: str, tmp_path: Path) -> None:
    """NaN in the loss and inf in a gradient of rank 1: equal to the bit to a run that skips the samples of these steps."""
    faulty, without = (run_config(data, tmp_path / name, {}) for name in ("faulty", "without"))
    run_ranks(2, pretrain_with, faulty, {2: "loss nan", 5: "gradient inf"}, [], group=False)
    ranges = [[2 * SAMPLES, 3 * SAMPLES], [5 * SAMPLES, 6 * SAMPLES]]
    run_ranks(2, pretrain_with, without, {}, ranges, group=False)
    assert_equal_weights(tmp_path / "faulty", tmp_path / "without", 12)
    state = json.loads((tmp_path / "faulty/checkpoints/step-00000012/state.json").read_text())
    assert (state["step"], state["skipped"], state["samples"]) == (12, 2, 12 * SAMPLES)
    boxes = tmp_path / "faulty" / "black_box"
    assert sorted(os.listdir(boxes)) == ["step-00000003", "step-00000006"]
    event = json.loads((boxes / "step-00000006" / "event.json").read_text())
    assert (event["kind"], event["checkpoint"], event["samples"]) == ("non-finite", "step-00000004", [40, 48])
    assert [[each["sample"] for each in rank] for rank in event["documents"]] == [[40, 41, 44, 45], [42, 43, 46, 47]]
    # The box keeps the checkpoint to replay from, also when the run has removed its own.
    assert (boxes / "step-00000006/checkpoint/model.safetensors").is_file()


def test_a_non_finite_run_ends_after_max_skipped_steps_and_reports_where_it_breaks(data: str, tmp_path: Path) -> None:
    """A learning rate of 1e30: the first update makes the weights useless. Status 2, and the replay of the box reproduces it."""
    changes = {"optimizer": {"params": {"lr": 1e30}}, "gradient_clipping": 0.0}
    train = {"max_skipped_steps": 3, "save_interval": 1}
    config = run_config(data, tmp_path / "run", train, changes)
    ranks = start_ranks(2, tmp_path, pretrain_with, config, {}, [])
    assert ranks.wait() == {0: 2, 1: 2}, ranks.output(0) + ranks.output(1)
    output = ranks.output(0)
    assert "error: 3 step(s) in a row, the last of them step 4, had a non-finite loss or gradient" in output
    assert "the weights are those of step 1" in output and "lr" in output
    box = tmp_path / "run" / "black_box" / "step-00000002"
    found = run_ranks(2, replay_rank, box, group=False)
    for rank, replayed in enumerate(found):
        recorded = json.loads((box / f"rank-{rank:05d}.json").read_text())
        assert replayed["same"] == (True, True, True)
        assert replayed["broken"] is recorded["broken"] is None, "the norm layers turn such weights into 0"
        assert "all outputs are finite; " in replayed["report"] and "gradients are not" in replayed["report"]
        assert math.isnan(recorded["gradients"]["embedding.weight"])


def replay_rank(rank: int, box: Path) -> dict[str, Any]:
    from megatronish.verify.replay import replay
    from tools.replay import describe

    found = replay(box, Rank(rank, 2, rank, 2, "test"))
    same = (found.same_batches, found.same_loss, found.same_norms)
    report = describe(found, rank)
    assert found.as_recorded == all(same)
    assert not dataclasses.replace(found, same_loss=False).as_recorded
    return {"same": same, "broken": found.diagnosis.broken, "report": report, "before": found.steps_before}


def test_a_spike_rolls_back_and_skips_its_samples(data: str, tmp_path: Path) -> None:
    """The loss of step 11 is 20 times as high: the run goes back to step 8 and skips steps 10 and 11, like a run that skips them from its start."""
    train = {"steps": 14, "on_spike": "rollback", "spike_window": 8}
    spiky, without = (run_config(data, tmp_path / name, train) for name in ("spiky", "without"))
    run_ranks(2, pretrain_with, spiky, {10: "all 20"}, [], group=False)
    run_ranks(2, pretrain_with, without, {}, [[9 * SAMPLES, 11 * SAMPLES]], group=False)
    assert_equal_weights(tmp_path / "spiky", tmp_path / "without", 14)
    assert read_losses(tmp_path / "spiky") == read_losses(tmp_path / "without")
    state = json.loads((tmp_path / "spiky/checkpoints/step-00000014/state.json").read_text())
    assert (state["rollbacks"], state["left_out"], state["skipped"]) == (1, [[9 * SAMPLES, 11 * SAMPLES]], 2)
    event = json.loads((tmp_path / "spiky/black_box/step-00000011/event.json").read_text())
    assert event["kind"] == "spike" and event["score"] > 10 and len(event["losses"]) == 8


def test_rollbacks_are_limited(data: str, tmp_path: Path) -> None:
    """Every step from 10 on spikes: one rollback, then the run continues with a warning."""
    train = {"on_spike": "rollback", "spike_window": 8, "max_rollbacks": 1, "spike_steps": 1, "steps": 12}
    config = run_config(data, tmp_path / "run", train)
    ranks = start_ranks(2, tmp_path, pretrain_with, config, {9: "all 20", 10: "all 400"}, [])
    assert ranks.wait() == {0: 0, 1: 0}, ranks.output(0) + ranks.output(1)
    assert "back at step 8, samples 72 to 79 will be skipped" in ranks.output(0)
    assert "loss spike at step 11" in ranks.output(0) and "not rolled back: train.max_rollbacks is 1" in ranks.output(0)
    state = json.loads((tmp_path / "run/checkpoints/step-00000012/state.json").read_text())
    assert (state["rollbacks"], state["skipped"]) == (1, 1)


def pretrain_alarmed(rank: int, config: RunConfig) -> None:
    """Train with a false alarm at step 11, whose loss is an ordinary one."""
    from megatronish.training import recovery

    recovery.spike_score = lambda losses, loss: 99.0 if len(losses) == 10 else 0.0
    pretrain_rank(rank, config, 2)


@pytest.mark.parametrize("stage", [2, 3])
def test_replay_of_a_step_is_bit_identical(stage: int, data: str, tmp_path: Path) -> None:
    """Two steps from the checkpoint in the box, which the run itself no longer has: batches and loss are the recorded ones."""
    changes = {"zero_optimization": {"stage": stage}}
    config = run_config(data, tmp_path / "run", {"steps": 16, "keep_last": 1}, changes)
    run_ranks(2, pretrain_alarmed, config, group=False)
    assert sorted(os.listdir(tmp_path / "run" / "checkpoints")) == ["latest", "step-00000016"]
    found = run_ranks(2, replay_rank, tmp_path / "run" / "black_box" / "step-00000011", group=False)
    for replayed in found:
        assert replayed["same"] == (True, True, True) and replayed["broken"] is None and replayed["before"] == 2
    assert "all outputs are finite" in found[0]["report"] and "weight" in found[0]["report"]


def test_the_first_module_to_break_is_named() -> None:
    """inf in one weight of the second block: its matrix is named, outputs before it are finite; gradients equal those of backward."""
    model = Transformer(ModelConfig(**MODEL), seed=1)

    tokens = torch.randint(257, (2, 32), generator=torch.Generator().manual_seed(0))
    batches = [{"tokens": tokens, "labels": tokens}] * 2
    sound = diagnose(LossModule(model), batches, torch.tensor(0.5), with_gradients=True)
    (sum(LossModule(model)(batch) for batch in batches) * 0.5).backward()
    assert sound.broken is None and not sound.broken_gradients
    for name, p in model.named_parameters():
        assert p.grad is not None
        assert sound.gradients[name] == pytest.approx(p.grad.norm().item(), rel=1e-5)
        assert sound.weights[name] == pytest.approx(p.norm().item(), rel=1e-6)
    with torch.no_grad():
        model.blocks[1].mlp.down.weight[3, 5] = float("inf")
    found = diagnose(LossModule(model), batches, torch.tensor(0.5), with_gradients=True)
    assert found.broken == ("blocks.1.mlp.down", 0)
    assert found.outputs["blocks.0"] == sound.outputs["blocks.0"] and "embedding.weight" in found.broken_gradients


def test_spike_score() -> None:
    """Median 2, median absolute deviation 0.1: a loss of 3 is 1 / 0.14826 deviations above."""
    losses = [1.8, 1.9, 1.9, 2.0, 2.0, 2.0, 2.1, 2.1, 2.2]
    assert spike_score(losses, 3.0) == pytest.approx(1 / 0.14826)
    assert spike_score(losses, 1.0) < 0
    assert spike_score([*losses, 50.0, 60.0], 3.0) == pytest.approx(1 / 0.14826, rel=0.5), (
        "two wild ones move it little"
    )
    assert spike_score([2.0] * 9, 2.001) == pytest.approx(0.5), "a thousandth of the median counts as its deviation"
    assert spike_score(losses[:7], 9.0) == 0.0, "too few to judge by"
    assert spike_score(losses, float("nan")) == 0.0


def test_bad_steps_are_counted_in_a_row() -> None:
    counter = BadSteps(3)
    for bad in (True, True, False, True, True):
        counter.count(bad, 7, "here")
    with pytest.raises(
        TrainingStopped, match=r"3 step\(s\) in a row, the last of them step 8.* step 5.*checkpoint is here"
    ):
        counter.count(True, 8, "here")


@pytest.mark.parametrize(
    "changes", [{}, {"pack": False}, {"order": "megatron"}], ids=["packed", "unpacked", "megatron"]
)
def test_documents_of_a_sample(changes: dict[str, Any], data: str, tmp_path: Path) -> None:
    """The documents of a sample contain its tokens."""
    config = small_run(data, tmp_path, {"megatronish": {"data": changes}}).megatronish
    run = open_training_data(config.data, seq_length=32, vocab_size=257, seed=1, samples=40, group=8)
    reader = run.datasets[0].reader
    for number in range(40):
        row = run.train.rows(torch.tensor([number]).numpy())
        tokens = row.tokens[0] if row.valid_lengths is None else row.tokens[0, : row.valid_lengths[0]]
        name, numbers = run.train.documents(number)
        assert name == run.sources[0].name and numbers
        documents = [reader.tokens_view[reader.document_starts[d] : reader.document_starts[d + 1]] for d in numbers]
        joined = b"".join(bytes(memoryview(part.copy())) for part in documents)
        assert bytes(memoryview(tokens.copy())) in joined
        inner = [len(part) for part in documents[1:-1]]
        assert sum(inner) <= len(tokens)
