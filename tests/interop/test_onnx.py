"""The ONNX graph in onnxruntime has the model's logits: prefill, decoding with a cache, padding, any batch size."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megatronish.checkpoint.weights import save_model
from megatronish.config.model import ModelConfig
from megatronish.errors import UserError
from megatronish.interop import onnx as ours_onnx
from megatronish.model.transformer import Transformer
from tools import export_onnx as tool

pytest.importorskip("onnxscript")
onnxruntime = pytest.importorskip("onnxruntime")
TOLERANCE = 2e-5  # of the largest logit: fp32 on both sides, sums in another order through one or two blocks
SHAPE = {
    "vocab_size": 61,
    "num_layers": 2,
    "hidden_size": 32,
    "num_attention_heads": 4,
    "ffn_hidden_size": 40,
    "seq_length": 32,
}
CONFIGS = {
    "windows": ModelConfig(**SHAPE, num_kv_heads=2, qk_norm=True, sliding_window=5, full_attention_interval=2),
    "gpt": ModelConfig(
        **{**SHAPE, "num_layers": 1},
        norm="layernorm",
        activation="gelu",
        parallel_block=True,
        mlp_bias=True,
        attention_qkv_bias=True,
        rope_fraction=0.5,
        rope_interleaved=True,
        tie_embeddings=True,
    ),
}


class Session:
    """A graph and the cache between its calls."""

    def __init__(self, folder: Path, config: ModelConfig, batch: int) -> None:
        self.session = onnxruntime.InferenceSession(str(folder / "model.onnx"), providers=["CPUExecutionProvider"])
        shape = (batch, config.resolved_kv_heads, 0, config.resolved_head_dim)
        self.cache = [np.zeros(shape, np.float32) for _ in range(2 * config.num_layers)]
        self.names = ours_onnx.cache_names(config, "past_key_values")

    def __call__(self, tokens: torch.Tensor, mask: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        feeds = {
            "input_ids": tokens.numpy(),
            "attention_mask": mask.numpy(),
            "position_ids": positions.numpy(),
            **dict(zip(self.names, self.cache, strict=True)),
        }
        logits, *self.cache = self.session.run(None, feeds)
        return torch.from_numpy(logits)


@pytest.fixture(scope="module", params=CONFIGS)
def exported(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Transformer, Path]:
    config, folder = CONFIGS[request.param], tmp_path_factory.mktemp(request.param)
    model = Transformer(config, seed=1).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(
                0.2 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(parameter.numel()))
            )
    save_model(folder / "ours", model.state_dict(), config)
    result = ours_onnx.export_onnx(folder / "ours", folder / "onnx")
    assert result.difference is not None and result.difference < TOLERANCE
    return model, folder / "onnx"


def difference(found: torch.Tensor, expected: torch.Tensor) -> float:
    return ((found - expected).abs().max() / expected.abs().max()).item()


@torch.no_grad()
def test_prefill_and_decoding(exported: tuple[Transformer, Path]) -> None:
    model, folder = exported
    for batch, pieces in ((1, (1, 1, 20)), (3, (17, 1, 4, 1))):
        tokens = torch.randint(61, (batch, sum(pieces)), generator=torch.Generator().manual_seed(batch))
        session, start, found = Session(folder, model.config, batch), 0, []
        for new in pieces:
            end = start + new
            positions = torch.arange(start, end).expand(batch, -1).contiguous()
            found.append(session(tokens[:, start:end], torch.ones(batch, end, dtype=torch.int64), positions))
            start = end
        assert difference(torch.cat(found, 1), model(tokens)) < TOLERANCE
        assert session.cache[0].shape == (batch, model.config.resolved_kv_heads, start, model.config.resolved_head_dim)


@torch.no_grad()
def test_padding_on_the_left_changes_nothing(exported: tuple[Transformer, Path]) -> None:
    model, folder = exported
    lengths, longest = (12, 3, 7), 12
    tokens = torch.zeros(3, longest + 1, dtype=torch.int64)
    mask = torch.zeros(3, longest + 1, dtype=torch.int64)
    for row, length in enumerate(lengths):
        tokens[row, longest - length :] = torch.randint(
            1, 61, (length + 1,), generator=torch.Generator().manual_seed(row)
        )
        mask[row, longest - length :] = 1
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    session = Session(folder, model.config, 3)
    prompt = session(tokens[:, :-1], mask[:, :-1], positions[:, :-1])
    step = session(tokens[:, -1:], mask, positions[:, -1:])
    assert prompt.isfinite().all()
    for row, length in enumerate(lengths):
        expected = model(tokens[row : row + 1, longest - length :])
        found = torch.cat((prompt[row, longest - length :], step[row]))[None]
        assert difference(found, expected) < TOLERANCE


def test_tokenizer_and_config(exported: tuple[Transformer, Path]) -> None:
    model, folder = exported
    if model.config.parallel_block:  # separate norms for each branch without output bias: no such architecture
        assert not (folder / "config.json").exists()
    else:
        assert json.loads((folder / "config.json").read_text())["model_type"] == "qwen3"


def test_missing_packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    config = CONFIGS["gpt"]
    save_model(tmp_path / "ours", Transformer(config).state_dict(), config)

    def run(*words: object) -> str:
        monkeypatch.setattr(sys, "argv", ["export_onnx.py", *map(str, words)])
        with pytest.raises(SystemExit) as stop:
            tool.main()
        assert stop.value.code == 2
        return str(capsys.readouterr().err)

    assert "no such folder" in run(tmp_path / "nowhere", tmp_path / "out")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").write_text("x")
    assert "exists and is not empty" in run(tmp_path / "ours", tmp_path / "full")
    monkeypatch.setattr(ours_onnx.importlib.util, "find_spec", lambda name: None)
    assert "onnx and onnxscript not installed: pip install 'megatronish[onnx]'" in run(
        tmp_path / "ours", tmp_path / "out"
    )
    assert not (tmp_path / "out").exists()


def test_graph_with_other_logits_is_not_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = CONFIGS["gpt"]
    save_model(tmp_path / "ours", Transformer(config).state_dict(), config)
    monkeypatch.setattr(ours_onnx, "_write_graph", lambda model, path: path.write_bytes(b""))
    monkeypatch.setattr(ours_onnx, "_compare", lambda model, path: (float("nan"), 48))
    with pytest.raises(UserError, match="onnxruntime's logits differ by nan of the largest: not written"):
        ours_onnx.export_onnx(tmp_path / "ours", tmp_path / "out")
    assert not (tmp_path / "out").exists()
