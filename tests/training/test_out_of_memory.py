"""The out-of-memory fallback: smaller micro batches on all ranks, and the same steps."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from megatronish.config.model import ModelConfig
from megatronish.config.run import BatchPlan, RunConfig
from megatronish.launch.process import Rank
from megatronish.model.transformer import Transformer
from megatronish.training.memory import (
    GIB,
    ActivationBudget,
    OutOfMemory,
    fits_in_memory,
    longest_batch,
    out_of_memory_fallback,
    shortest_batch,
)
from megatronish.training.step import LossModule
from tests.distributed import run_ranks
from tests.launch.faulty_ranks import start_ranks
from tests.runs import MODEL, make_dataset, small_run
from tests.training.test_resume import LAYOUTS, pretrain_rank, read_losses

pytestmark = pytest.mark.distributed
KEEP_ALL = {"activation_checkpointing": "none"}
DROPOUT = {"residual_dropout": 0.1, "attention_dropout": 0.1}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    return make_dataset(tmp_path_factory.mktemp("data"))


def run_config(data: str, folder: Path, layout: str, micro: int, train: dict[str, Any] | None = None) -> RunConfig:
    """Eight samples per rank and step, in micro batches of `micro`."""
    changes = {
        **LAYOUTS.get(layout, {}),
        "train_micro_batch_size_per_gpu": micro,
        "gradient_accumulation_steps": 8 // micro,
    }
    fixed = {"steps": 6, "save_interval": 3, "hang_timeout": 20.0, "activation_checkpointing": "full"}
    ours = {"train": {**fixed, **(train or {})}, "model": DROPOUT}
    return small_run(data, folder, {**changes, "megatronish": ours})


def pretrain_short_of_memory(rank: int, config: RunConfig, step: int) -> int:
    """Train; rank 1 runs out of memory once, in the second micro batch of the step after `step` steps."""
    from megatronish.errors import exit_on_user_error
    from megatronish.training.engine import Engine
    from megatronish.training.loop import pretrain

    original, passed = Engine._forward, [0]

    def short(self: Any, batch: Any) -> torch.Tensor:
        passed[0] += 1
        if rank == 1 and passed[0] == step * 2 + 2:
            module, engine = self._engine.module, self._engine

            def fails(*_: Any) -> None:
                engine.module.model.blocks[1].forward = forward
                raise OutOfMemory("the test's")

            forward, module.model.blocks[1].forward = module.model.blocks[1].forward, fails
        return original(self, batch)

    Engine._forward = short  # type: ignore[method-assign]  # of a forked rank, which ends with the test
    with exit_on_user_error(rank == 0, f"rank {rank}"):
        return pretrain(config, Rank(rank, 2, rank, 2, "test"))
    raise AssertionError("exit_on_user_error() swallows nothing")


def same_weights(one: Path, other: Path, step: int = 6) -> bool:
    first, second = (load_file(run / f"checkpoints/step-{step:08d}/model.safetensors") for run in (one, other))
    return all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("layout", ["zero0", "zero2-offload-bf16"])
def test_one_rank_out_of_memory_reduces_the_micro_batch_on_all(layout: str, data: str, tmp_path: Path) -> None:
    """In step 4: it is repeated in micro batches of 2, and the run ends bit-identical to one resumed there with 2."""
    short, other = (run_config(data, tmp_path / name, layout, 4) for name in ("short", "other"))
    assert run_ranks(2, pretrain_short_of_memory, short, 3, group=False) == [0, 0]
    run_ranks(2, pretrain_rank, other, 2, group=False)
    checkpoints = tmp_path / "other" / "checkpoints"
    shutil.rmtree(checkpoints / "step-00000006")
    (checkpoints / "latest").write_text("step-00000003\n")
    run_ranks(2, pretrain_rank, run_config(data, tmp_path / "other", layout, 2), 2, group=False)
    assert read_losses(tmp_path / "short") == read_losses(tmp_path / "other")
    assert same_weights(tmp_path / "short", tmp_path / "other")
    state = json.loads((tmp_path / "short/checkpoints/step-00000006/state.json").read_text())
    assert (state["step"], state["skipped"], state["samples"]) == (6, 0, 96)
    assert not (tmp_path / "short" / "black_box").exists(), "that is no bad step"


def test_recomputation_comes_first_where_it_is_cheaper(data: str, tmp_path: Path) -> None:
    """A micro batch of 128 tokens is so small that halving it costs more: blocks are recomputed, and no result changes."""
    short, full = (run_config(data, tmp_path / name, "zero1", 4, KEEP_ALL) for name in ("short", "full"))
    ranks = start_ranks(2, tmp_path, pretrain_short_of_memory, short, 3)
    assert ranks.wait() == {0: 0, 1: 0}, ranks.output(0)
    assert "out of memory in step 4, which is repeated: continuing with micro batch 4, accumulation 2" in ranks.output(
        0
    )
    assert "activation checkpointing selective" in ranks.output(0)
    run_ranks(2, pretrain_rank, full, 2, group=False)
    assert read_losses(tmp_path / "short") == read_losses(tmp_path / "full")
    assert same_weights(tmp_path / "short", tmp_path / "full")


def test_the_dry_run_reduces_the_micro_batch_before_the_first_step(data: str, tmp_path: Path) -> None:
    """A budget for 2 samples, not 4: the run equals one with micro batches of 2 from its first step."""
    module = Transformer(ModelConfig(**{**MODEL, **DROPOUT}), seed=1)
    module.set_activation_checkpointing("full")
    used = {}
    for micro in (2, 4):
        budget = ActivationBudget(module, None)
        with budget:
            module.loss(**longest_batch(micro, 32, 257, torch.device("cpu")))
        used[micro] = budget.used
    limit = (used[2] + used[4]) / 2 / GIB
    tight = run_config(data, tmp_path / "tight", "zero1", 4, {"memory_budget": limit})
    ranks = start_ranks(2, tmp_path, pretrain_short_of_memory, tight, 99)
    assert ranks.wait() == {0: 0, 1: 0}, ranks.output(0)
    assert "the largest micro batch does not fit: continuing with micro batch 2, accumulation 4" in ranks.output(0)
    assert "the largest micro batch fits: activations of" in ranks.output(0)
    run_ranks(2, pretrain_rank, run_config(data, tmp_path / "small", "zero1", 2), 2, group=False)
    assert read_losses(tmp_path / "tight") == read_losses(tmp_path / "small")
    assert same_weights(tmp_path / "tight", tmp_path / "small")


def test_a_budget_that_nothing_fits_is_an_error(data: str, tmp_path: Path) -> None:
    config = run_config(data, tmp_path / "run", "zero1", 4, {**KEEP_ALL, "memory_budget": 1e-6})
    ranks = start_ranks(2, tmp_path, pretrain_short_of_memory, config, 99)
    assert ranks.wait() == {0: 2, 1: 2}, ranks.output(0)
    for tried in ("micro batch 2, acc", "micro batch 1, acc", "checkpointing selective", "checkpointing full"):
        assert tried in ranks.output(0)
    assert "a micro batch of one sample does not fit" in ranks.output(0)


def test_zero3_reports_what_to_do(data: str, tmp_path: Path) -> None:
    """ZeRO-3 ranks communicate inside the forward pass: one message, status 2 on all ranks, none hangs."""
    config = run_config(data, tmp_path / "run", "zero3-bf16", 4)
    ranks = start_ranks(2, tmp_path, pretrain_short_of_memory, config, 1)
    assert ranks.wait() == {0: 2, 1: 2}, ranks.output(0) + ranks.output(1)
    assert "no memory for a micro batch of 4 on rank 1 (the test's). Halve --train_micro_batch" in ranks.output(0)


def test_saved_activations_are_counted() -> None:
    """x @ w saves x only; the same x twice counts once; a recomputed block saves only its input."""
    linear = torch.nn.Linear(16, 8, bias=False)
    x = torch.randn(4, 16)
    budget = ActivationBudget(linear, None)
    with budget:
        linear(x) + linear(x)
    assert budget.used == 4 * 16 * 4
    with pytest.raises(OutOfMemory, match=r"more than train\.memory_budget allows"), ActivationBudget(linear, 255):
        linear(x)
    with budget:
        torch.utils.checkpoint.checkpoint(
            lambda y: linear(torch.relu(linear(y) @ linear.weight)), x, use_reentrant=False
        )
    assert budget.used <= 4 * 16 * 4


def test_a_dry_run_keeps_no_gradient() -> None:
    model = Transformer(ModelConfig(**MODEL), seed=1)

    batch = longest_batch(2, 32, 257, torch.device("cpu"))
    loss = LossModule(model)
    assert fits_in_memory(loss, batch, ActivationBudget(loss, None))
    assert not fits_in_memory(loss, batch, ActivationBudget(loss, 1000.0))
    assert all(p.grad is None for p in model.parameters())
    loss(shortest_batch(batch)).backward()
    assert all(p.grad is not None for p in model.parameters()), "the substitute reaches every weight"


@pytest.mark.parametrize(
    ("micro", "mode", "seq_length", "device", "expected"),
    [
        (8, "none", 2048, "cuda", ((4, 2), "none")),  # 2 * 300 / (2 * 8 * 2048) = 1.8% against 5%
        (8, "none", 128, "cuda", ((8, 1), "selective")),  # 29% against 5%
        (8, "selective", 128, "cuda", ((4, 2), "selective")),  # 29% against 33%
        (1, "none", 2048, "cuda", ((1, 1), "selective")),
        (1, "selective", 2048, "cuda", ((1, 1), "full")),
        (6, "full", 8, "cuda", ((3, 2), "full")),
        (9, "full", 8, "cpu", ((3, 3), "full")),
    ],
)
def test_the_cheaper_fallback_comes_first(
    micro: int, mode: str, seq_length: int, device: str, expected: tuple[tuple[int, int], str]
) -> None:
    found = out_of_memory_fallback(BatchPlan(micro, 1, 2), mode, seq_length, "bf16", device)
    assert found is not None
    assert ((found[0].micro, found[0].accumulation), found[1]) == expected
    assert found[0].samples == micro * 2


def test_no_fallback_after_full_recomputation() -> None:
    assert out_of_memory_fallback(BatchPlan(1, 4, 2), "full", 64, "fp32", "cpu") is None
