"""model.from_hf: the folder defines the model; contradicting fields are refused, training-only fields may be set."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from megatronish.config.cli import parse
from megatronish.config.run import BLOCK, RunConfig
from megatronish.errors import ConfigError
from tests.config.raw import SMALLEST

CONFIG = {
    "model_type": "llama",
    "vocab_size": 97,
    "hidden_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "intermediate_size": 80,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "rope_scaling": None,
    "tie_word_embeddings": True,
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    return tmp_path


def load(model: dict[str, Any]) -> RunConfig:
    return RunConfig.from_dict({**SMALLEST, BLOCK: {**SMALLEST[BLOCK], "model": model}}, "test")


def test_the_folder_defines_the_model(folder: Path) -> None:
    model = load({"from_hf": str(folder), "seq_length": 128, "residual_dropout": 0.1}).megatronish.model
    assert (model.vocab_size, model.num_layers, model.resolved_kv_heads, model.tie_embeddings) == (97, 3, 2, True)
    assert (model.rope_theta, model.seq_length, model.residual_dropout) == (500000.0, 128, 0.1)
    assert (model.from_hf, model.preset) == (str(folder), None)


def test_context_may_be_stretched(folder: Path) -> None:
    scaling = {"type": "yarn", "factor": 4.0, "original_seq_length": 4096}
    model = load({"from_hf": str(folder), "seq_length": 16384, "rope_scaling": scaling}).megatronish.model
    assert model.rope_scaling is not None and model.rope_scaling.factor == 4.0


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"hidden_size": 64, "head_dim": 8},
            "hidden_size is 64, but the model in from_hf .* has 48: leave hidden_size out",
        ),
        ({"qk_norm": True}, "qk_norm is True, but"),
        ({"preset": "tiny"}, "both name a model"),
        ({"hiden_size": 48}, 'unknown key "megatronish.model.hiden_size"'),
        ({"seq_length": "long"}, "seq_length"),
    ],
)
def test_contradictions(folder: Path, fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load({"from_hf": str(folder), **fields})


def test_equal_fields_do_not_contradict(folder: Path) -> None:
    assert load({"from_hf": str(folder), "hidden_size": 48}).megatronish.model.hidden_size == 48


def test_a_missing_folder(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="nowhere: no such folder"):
        load({"from_hf": str(tmp_path / "nowhere")})
    with pytest.raises(ConfigError, match="from_hf"):
        load({"from_hf": 7})


def test_a_saved_run_holds_without_the_folder(folder: Path) -> None:
    """run.json has every field, and is read again by evaluation when the imported folder may have gone."""
    run = load({"from_hf": str(folder), "seq_length": 128})
    assert RunConfig.from_dict(run.to_json(), "again") == RunConfig(run.deepspeed, run.megatronish, "again")
    (folder / "config.json").unlink()
    folder.rmdir()
    assert RunConfig.from_dict(run.to_json(), "again").megatronish.model == run.megatronish.model


def test_on_the_command_line_it_replaces_the_files_model(folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "run.json"
    path.write_text(json.dumps(SMALLEST))
    run = parse(
        ["--deepspeed_config", str(path), "--model.from_hf", str(folder), "--model.seq_length", "64"], "pretrain.py"
    )
    assert (run.megatronish.model.hidden_size, run.megatronish.model.seq_length) == (48, 64)
