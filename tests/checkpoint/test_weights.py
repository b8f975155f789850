"""Weight files: what is saved comes back, and what does not belong is refused by name."""

import json
from pathlib import Path

import pytest
import torch

from megatronish.checkpoint.weights import (
    CONFIG_FILE,
    WEIGHTS_FILE,
    check_model_state,
    load_config,
    load_model,
    save_model,
)
from megatronish.config.model import ModelConfig
from megatronish.config.presets import resolve_model
from megatronish.model.transformer import Transformer

TIED = resolve_model({"preset": "tiny", "vocab_size": 64, "num_layers": 2, "hidden_size": 32, "ffn_hidden_size": 48})
UNTIED = TIED.model_copy(update={"tie_embeddings": False})


@pytest.mark.parametrize("config", [TIED, UNTIED], ids=["tied", "untied"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_round_trip(config: ModelConfig, dtype: torch.dtype, tmp_path: Path) -> None:
    model = Transformer(config, seed=3).to(dtype).eval()
    save_model(tmp_path / "a" / "b", model.state_dict(), config)
    loaded = load_model(tmp_path / "a" / "b")
    assert sorted(p.name for p in (tmp_path / "a" / "b").iterdir()) == [WEIGHTS_FILE, CONFIG_FILE]
    assert loaded.config == config and not loaded.training
    assert (loaded.head.weight is loaded.embedding.weight) == config.tie_embeddings
    expected = model.state_dict()
    assert loaded.state_dict().keys() == expected.keys()
    for name, tensor in loaded.state_dict().items():
        assert tensor.dtype == dtype and torch.equal(tensor, expected[name]), name
    tokens = torch.arange(9)[None]
    assert torch.equal(loaded(tokens), model(tokens))
    assert load_model(tmp_path / "a" / "b", dtype=torch.float64).embedding.weight.dtype == torch.float64


def test_another_model_is_refused_by_its_first_tensor(tmp_path: Path) -> None:
    save_model(tmp_path, Transformer(TIED).state_dict(), TIED)
    wider = TIED.model_copy(update={"ffn_hidden_size": 64})
    (tmp_path / CONFIG_FILE).write_text(wider.model_dump_json())
    with pytest.raises(ValueError, match=r"another model: 'blocks.0.mlp.up.weight' has shape \[96, 32\].*\[128, 32\]"):
        load_model(tmp_path)
    same_shapes = TIED.model_copy(update={"rope_theta": 5.0})
    (tmp_path / CONFIG_FILE).write_text(same_shapes.model_dump_json())
    with pytest.raises(ValueError, match="were not saved together: their configurations differ"):
        load_model(tmp_path)
    state = Transformer(TIED).state_dict()
    del state["final_norm.weight"]
    with pytest.raises(ValueError, match="has no tensor 'final_norm.weight', which should be \\[32\\]"):
        save_model(tmp_path, state, TIED)
    shapes = {name: tuple(t.shape) for name, t in Transformer(TIED).state_dict().items()}
    check_model_state(shapes, TIED, "x")
    with pytest.raises(ValueError, match="x is of another model: the configuration has no tensor 'extra'"):
        check_model_state({**shapes, "extra": (1,)}, TIED, "x")


def test_missing_and_torn_files(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"{CONFIG_FILE} does not exist"):
        load_model(tmp_path)
    save_model(tmp_path, Transformer(TIED).state_dict(), TIED)
    weights = tmp_path / WEIGHTS_FILE
    complete = weights.read_bytes()
    for size in (0, 5, 100, len(complete) // 2, len(complete) - 1):
        weights.write_bytes(complete[:size])
        with pytest.raises(ValueError, match="is torn or not a safetensors file"):
            load_model(tmp_path)
    weights.unlink()
    with pytest.raises(ValueError, match=f"{WEIGHTS_FILE} does not exist"):
        load_model(tmp_path)
    (tmp_path / CONFIG_FILE).write_text("{")
    with pytest.raises(ValueError, match="is not a model configuration"):
        load_config(tmp_path)
    (tmp_path / CONFIG_FILE).write_text(json.dumps({**TIED.model_dump(), "wings": 2}))
    with pytest.raises(ValueError, match="is not a model configuration: wings: "):
        load_config(tmp_path)


def test_a_failed_save_leaves_the_old_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = Transformer(TIED, seed=1)
    save_model(tmp_path, model.state_dict(), TIED)

    def disk_full(_descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("megatronish.files.os.fsync", disk_full)
    with pytest.raises(OSError, match="No space left"):
        save_model(tmp_path, Transformer(TIED, seed=2).state_dict(), TIED)
    monkeypatch.undo()
    assert sorted(p.name for p in tmp_path.iterdir()) == [WEIGHTS_FILE, CONFIG_FILE]
    assert torch.equal(load_model(tmp_path).embedding.weight, model.embedding.weight)
