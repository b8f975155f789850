"""A run that resumes from a checkpoint equals the run that never stopped, bit for bit."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from megatronish.config.run import RunConfig
from megatronish.launch.process import Rank
from tests.distributed import run_ranks
from tests.runs import make_dataset, small_run

pytestmark = pytest.mark.distributed
MUON = {"type": "Muon", "params": {"lr": 0.02, "adam_lr": 3e-3}}
LION = {"type": "Lion", "params": {"lr": 3e-4, "weight_decay": 0.1}}
DROPOUT = {"megatronish": {"model": {"residual_dropout": 0.1, "attention_dropout": 0.1, "embedding_dropout": 0.1}}}
BF16 = {"bf16": {"enabled": True}, "data_types": {"grad_accum_dtype": "fp32"}}
OFFLOAD = {"device": "cpu", "pin_memory": False}
LAYOUTS: dict[str, dict[str, Any]] = {
    "zero0": {"zero_optimization": {"stage": 0}},
    "zero0-bf16": {"zero_optimization": {"stage": 0}, "bf16": {"enabled": True}},
    "zero1-dropout": {"zero_optimization": {"stage": 1}, **DROPOUT},
    "zero1-bf16": {"zero_optimization": {"stage": 1}, **BF16},
    "zero2-bf16": {"zero_optimization": {"stage": 2}, **BF16},
    "zero3-bf16": {"zero_optimization": {"stage": 3}, **BF16},
    "zero2-offload-bf16": {"zero_optimization": {"stage": 2, "offload_optimizer": OFFLOAD}, **BF16},
    "zero3-offload-bf16": {
        "zero_optimization": {"stage": 3, "offload_optimizer": OFFLOAD, "offload_param": OFFLOAD},
        **BF16,
    },
    "zero2-lion": {"zero_optimization": {"stage": 2}, "optimizer": LION},
    "zero1-muon": {"zero_optimization": {"stage": 1}, "optimizer": MUON, "gradient_clipping": 0.0},
    "zero2-offload-muon": {
        "zero_optimization": {"stage": 2, "offload_optimizer": OFFLOAD},
        "optimizer": MUON,
        "gradient_clipping": 0.0,
    },
    "zero2-muon-bf16": {  # the demo's
        "zero_optimization": {"stage": 2},
        "bf16": {"enabled": True},
        "optimizer": MUON,
        "gradient_clipping": 0.0,
    },
}


def pretrain_rank(rank: int, config: RunConfig, world_size: int) -> None:
    """What launchers/pretrain.py does on one rank."""
    from megatronish.training.loop import pretrain

    pretrain(config, Rank(rank, world_size, rank, world_size, "test"))


def read_losses(run_dir: Path) -> list[tuple[int, float, float]]:
    """(step, loss, gradient norm) of each line of metrics.jsonl that reports a step."""
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [(line["step"], line["loss"], line["grad_norm"]) for line in lines if "loss" in line]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_resumed_equals_unbroken(layout: str, tmp_path: Path) -> None:
    """Steps 11-20 after a stop at 10: every loss, gradient norm and final weight has the same bits."""
    data = make_dataset(tmp_path)
    changes = {**LAYOUTS[layout]}
    ours = dict(changes.pop("megatronish", {}))
    ours["train"] = {"steps": 20, "save_interval": 10, "eval_interval": 10}

    def config(folder: str) -> RunConfig:
        return small_run(data, tmp_path / folder, {**changes, "megatronish": ours})

    run_ranks(2, pretrain_rank, config("unbroken"), 2, group=False)
    shutil.copytree(tmp_path / "unbroken", tmp_path / "stopped")
    checkpoints = tmp_path / "stopped" / "checkpoints"
    shutil.rmtree(checkpoints / "step-00000020")
    (checkpoints / "latest").write_text("step-00000010\n")
    run_ranks(2, pretrain_rank, config("stopped"), 2, group=False)

    unbroken, resumed = read_losses(tmp_path / "unbroken"), read_losses(tmp_path / "stopped")
    assert [step for step, _, _ in resumed] == list(range(1, 21))
    assert resumed == unbroken
    weights = [
        load_file(tmp_path / run / "checkpoints/step-00000020/model.safetensors") for run in ("unbroken", "stopped")
    ]
    assert weights[0].keys() == weights[1].keys()
    assert all((weights[0][name] == weights[1][name]).all() for name in weights[0])
