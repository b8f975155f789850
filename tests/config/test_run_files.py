"""The files of ds_configs/, their JSON schema, and the resolved configuration that is saved with a checkpoint."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest

from megatronish.config.deepspeed_json import load_json
from megatronish.config.presets import preset_names
from megatronish.config.run import RunConfig
from megatronish.config.schema import run_schema
from tests.config.json_schema import violations
from tests.config.raw import SMALLEST, read

FOLDER = Path(__file__).parents[2] / "ds_configs"
FILES = sorted(path.name for path in FOLDER.glob("*.json") if path.name != "schema.json")


def test_there_are_run_files() -> None:
    assert "cpu_demo.json" in FILES


@pytest.mark.parametrize("name", FILES)
def test_run_file_loads(name: str) -> None:
    """Every file is a complete run for one and for two ranks, names its schema, and has its own save_dir."""
    run = RunConfig.load(FOLDER / name)
    for ranks in (1, 2):
        plan = run.batch_plan(run.megatronish.parallel.data_size(ranks))
        assert plan.samples == plan.micro * plan.accumulation * ranks
    assert json.loads((FOLDER / name).read_text())["$schema"] == "./schema.json"
    others = [RunConfig.load(FOLDER / other).megatronish.train.save_dir for other in FILES if other != name]
    assert run.megatronish.train.save_dir not in others


@pytest.mark.parametrize("name", FILES)
def test_run_file_is_valid_by_the_schema(name: str) -> None:
    schema = run_schema()
    raw = json.loads((FOLDER / name).read_text())
    assert violations(raw, schema, schema) == []


def test_schema_file_is_up_to_date() -> None:
    assert json.loads((FOLDER / "schema.json").read_text()) == run_schema(), (
        "run: python -m megatronish.config.schema > ds_configs/schema.json"
    )


SCHEMA_REFUSES: list[tuple[str, Any]] = [
    ("gradient_cliping", 1.0),
    ("train_micro_batch_size_per_gpu", "2"),
    ("train_micro_batch_size_per_gpu", 0),
    ("zero_optimization", {"stage": 4}),
    ("zero_optimization", {"stage": 1, "overlap_com": True}),
    ("zero_optimization", {"stage": 3, "prefetch_bucket_size": 1}),
    ("optimizer", {"type": "SGD", "params": {"lr": 1e-3}}),
    ("optimizer", {"type": "AdamW", "params": {"lr": 1e-3, "betas": [0.9]}}),
    ("megatronish", {"model": {"preset": "tinny"}, "train": {"steps": 1, "save_dir": "x"}}),
    ("megatronish", {"model": {"preset": "tiny"}, "train": {"steps": 1}}),
    ("megatronish", {"model": {"preset": "tiny"}, "train": {"steps": 1, "save_dir": "x"}, "shedule": {}}),
]


@pytest.mark.parametrize(("key", "value"), SCHEMA_REFUSES)
def test_schema_refuses_what_the_program_refuses(key: str, value: Any) -> None:
    schema = run_schema()
    assert violations(SMALLEST, schema, schema) == []
    raw = {**SMALLEST, key: value}
    assert len(violations(raw, schema, schema)) >= 1
    with pytest.raises(ValueError):
        RunConfig.from_dict(raw, "run.json")


def test_schema_describes_every_property() -> None:
    """Editors show the description: each property has one, or is a section whose fields have."""
    schema = run_schema()
    sections = [schema, schema["properties"]["megatronish"], *schema["$defs"].values()]
    seen = 0
    for section in sections:
        for name, field in section["properties"].items():
            seen += 1
            assert name == "$schema" or "properties" in field or field.get("description"), (section.get("title"), name)
    assert seen > 100
    assert schema["$defs"]["ModelConfig"]["properties"]["preset"]["enum"] == preset_names()


FULL: list[dict[str, Any]] = [
    {},
    {"bf16": {"enabled": True}, "optimizer": {"params": {"betas": [0.9, 0.98], "eps": 1e-6, "weight_decay": 0.1}}},
    {"fp16": {"enabled": True, "loss_scale": 128}, "train_batch_size": 64, "gradient_accumulation_steps": 4},
    {
        "zero_optimization": {
            "stage": 3,
            "stage3_prefetch_bucket_size": 1e7,
            "offload_optimizer": {"device": "nvme", "nvme_path": "/nvme"},
            "offload_param": {"device": "cpu", "pin_memory": False},
        },
        "comms_logger": {"enabled": True},
        "steps_per_print": 10,
    },
    {"optimizer": {"type": "Muon", "params": {"lr": 0.02, "momentum": 0.9}}, "gradient_clipping": 0.0},
    {"megatronish": {"model": {"preset": "llama3_2_1b", "rope_scaling": None, "num_layers": 2}}},
    {"megatronish": {"model": {"preset": "mistral_7b", "full_attention_interval": 2}, "train": {"eval_tokens": 500}}},
]


@pytest.mark.parametrize("changes", FULL)
def test_resolved_configuration_reads_back_as_itself(changes: dict[str, Any], tmp_path: Path) -> None:
    """What is saved with a checkpoint is sufficient to rerun it, and contains nothing else."""
    run = read(**changes)
    again = RunConfig.from_dict(run.to_json(), run.source)
    assert again == run
    assert again.to_json() == run.to_json()
    run.save(tmp_path / "run.json")
    assert RunConfig.load(tmp_path / "run.json").to_json() == run.to_json()
    assert load_json(tmp_path / "run.json") == run.to_json()
    assert again != read(megatronish={"train": {"steps": 11}})


def test_reading_does_not_change_what_was_given() -> None:
    raw = copy.deepcopy(SMALLEST)
    RunConfig.from_dict(raw, "run.json")
    assert raw == SMALLEST
