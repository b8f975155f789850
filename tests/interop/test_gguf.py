"""GGUF files opened by transformers have our logits and token ids; unsupported models have a one-line error.

llama.cpp itself was given these models by hand (docs/huggingface.md); transformers' reader has no rotary scaling and takes
Qwen 3's heads to be 128 wide, so models are built from config.json here, and the keys of the file are checked apart.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

from megatronish.checkpoint.paths import TOKENIZER_RECORD_FILE
from megatronish.checkpoint.weights import save_model
from megatronish.config.huggingface import to_huggingface
from megatronish.config.model import ModelConfig
from megatronish.data.tokenizers.tokenizer import ByteTokenizer, HuggingFaceTokenizer, Tokenizer, train_bpe
from megatronish.errors import UserError
from megatronish.interop.agreement import PROBE_TEXTS
from megatronish.interop.gguf import export_gguf
from megatronish.interop.tokenizer_files import ORIGIN_FILE
from megatronish.model.transformer import Transformer
from tools import export_gguf as tool

gguf = pytest.importorskip("gguf")
SAMPLE = ["def main():\n    return 2026 + 1\n", "The quick brown fox. naïve café, 中文字符 \U0001f600\n\n\ta  b"] * 20
SHAPE: dict[str, Any] = {
    "vocab_size": 448,
    "num_layers": 2,
    "hidden_size": 64,
    "num_attention_heads": 4,
    "num_kv_heads": 2,
    "ffn_hidden_size": 96,
    "seq_length": 128,
    "init_std": 0.2,
}
LLAMA3 = {"type": "llama3", "factor": 8.0, "original_seq_length": 32}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama tied, wide heads": ("llama", {"tie_embeddings": True, "head_dim": 32}),
    "pairs": ("llama", {"rope_interleaved": True}),
    "linear": ("llama", {"rope_scaling": {"type": "linear", "factor": 2.0}}),
    "llama 3": ("llama", {"rope_scaling": LLAMA3}),
    "ntk": ("llama", {"rope_scaling": {"type": "ntk", "factor": 4.0}}),
    "qwen2": ("qwen2", {"attention_qkv_bias": True}),
    "qwen3": ("qwen3", {"qk_norm": True, "head_dim": 32}),
}


def save(folder: Path, tokenizer: Tokenizer | None = None, **fields: Any) -> Transformer:
    """The files of a checkpoint, as written by training."""
    config = ModelConfig(**{**SHAPE, **fields})
    model = Transformer(config, seed=1).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    save_model(folder, model.state_dict(), config)
    if tokenizer is not None:
        written = tokenizer.save(folder / "t")
        if written is not None:
            written.rename(folder / "tokenizer.json")
        record = {"kind": tokenizer.kind, "eod_id": tokenizer.eod_id, "sha256": tokenizer.fingerprint}
        (folder / TOKENIZER_RECORD_FILE).write_text(json.dumps({**record, "bos_id": tokenizer.bos_id}))
    return model


def keys(path: Path) -> dict[str, Any]:
    return {name: field.contents() for name, field in gguf.GGUFReader(path).fields.items()}


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_logits(name: str, tmp_path: Path) -> None:
    architecture, fields = MODELS[name]
    ours = save(tmp_path / "run", **fields)
    written = export_gguf(tmp_path / "run", tmp_path / "x.gguf")
    assert (written.architecture, written.tokenizer) == (architecture, False)
    raw = to_huggingface(ours.config)
    theirs = AutoModelForCausalLM.from_config(AutoConfig.for_model(**raw)).eval()
    read = load_gguf_checkpoint(tmp_path / "x.gguf", return_tensors=True, model_to_load=theirs)
    missing = theirs.load_state_dict(read["tensors"], strict=False)
    assert missing.missing_keys == (["lm_head.weight"] if ours.config.tie_embeddings else [])
    theirs.tie_weights()
    tokens = torch.randint(448, (2, 100), generator=torch.Generator().manual_seed(0))
    expected = theirs(tokens).logits
    assert (ours(tokens) - expected).abs().max() < 1e-5 * expected.abs().max()
    for field, value in read["config"].items():  # what a reader makes of the keys
        known = field not in ("model_type", "head_dim", "_model_name_or_path") and field in raw
        assert not known or raw[field] == pytest.approx(value), field


def test_rotary_scaling(tmp_path: Path) -> None:
    for name in ("linear", "llama 3", "llama"):
        save(tmp_path / name, **MODELS[name][1])
        export_gguf(tmp_path / name, tmp_path / f"{name}.gguf")
    found = keys(tmp_path / "linear.gguf")
    assert (found["llama.rope.scaling.type"], found["llama.rope.scaling.factor"]) == ("linear", 2.0)
    assert "llama.rope.scaling.type" not in keys(tmp_path / "llama.gguf")
    tensors = {each.name: each.data for each in gguf.GGUFReader(tmp_path / "llama 3.gguf").tensors}
    # Wavelengths below 32 / 4 stay, those above 32 / 1 are divided by 8 (Llama 3.1), eight frequencies of base 10,000.
    waves = 2 * np.pi * 10000 ** (np.arange(8) / 8)
    factors = tensors["rope_freqs.weight"]
    assert np.all(factors[waves < 8] == 1) and np.allclose(factors[waves > 32], 8)
    assert np.all(np.diff(factors) >= 0) and 1 < factors[(waves > 8) & (waves < 32)].max() < 8


@pytest.mark.parametrize("form", ["fp16", "bf16", "q8_0"])
def test_narrow_weights(form: str, tmp_path: Path) -> None:
    model = save(tmp_path / "run")
    export_gguf(tmp_path / "run", tmp_path / "x.gguf", form)  # type: ignore[arg-type]
    tensors = {each.name: each for each in gguf.GGUFReader(tmp_path / "x.gguf").tensors}
    down = tensors["blk.1.ffn_down.weight"]
    read = torch.from_numpy(gguf.quants.dequantize(down.data, down.tensor_type).copy())
    weight = model.get_parameter("blocks.1.mlp.down.weight").detach()
    if form == "q8_0":  # 32 columns share a scale of 1/127 of the largest, itself in fp16
        largest = weight.view(-1, 3, 32).abs().amax(2, keepdim=True)
        assert ((read - weight).view(-1, 3, 32).abs() <= largest / 127 * 0.51 + largest * 2**-11).all()
        assert read.ne(weight).any()
    else:
        assert torch.equal(read, weight.to({"fp16": torch.float16, "bf16": torch.bfloat16}[form]).float())
    assert tensors["output_norm.weight"].tensor_type == gguf.GGMLQuantizationType.F32


@pytest.mark.parametrize("begins", [None, 5])
def test_token_ids(begins: int | None, tmp_path: Path) -> None:
    """Texts start with the end-of-document token for our models, and as in its folder for an imported one."""
    own = train_bpe(SAMPLE, 400)
    if begins is not None:
        own.bos_id = begins
    save(tmp_path / "run", own)
    assert export_gguf(tmp_path / "run", tmp_path / "x.gguf").tokenizer
    theirs = AutoTokenizer.from_pretrained(tmp_path, gguf_file="x.gguf")
    for text in PROBE_TEXTS[:4]:
        ids = own.encode(text).tolist()
        assert theirs(text, add_special_tokens=False)["input_ids"] == ids
        assert theirs(text)["input_ids"] == [own.start_id, *ids] and theirs.decode(ids) == text
    found = keys(tmp_path / "x.gguf")
    assert found["tokenizer.ggml.eos_token_id"] == own.eod_id and found["tokenizer.ggml.pre"] == "dbrx"
    assert len(found["tokenizer.ggml.tokens"]) == 448 and "[PAD447]" in found["tokenizer.ggml.tokens"]


def test_imported_tokenizer(tmp_path: Path) -> None:
    spec = train_bpe(SAMPLE, 400).spec
    spec["model"]["ignore_merges"] = True
    save(tmp_path / "run", HuggingFaceTokenizer(json.dumps(spec)))
    (tmp_path / "run" / ORIGIN_FILE).write_text("{}")
    (tmp_path / "run" / "chat_template.jinja").write_text("{{ messages }}")
    export_gguf(tmp_path / "run", tmp_path / "x.gguf")
    found = keys(tmp_path / "x.gguf")
    assert found["tokenizer.ggml.add_bos_token"] is False and "tokenizer.ggml.bos_token_id" not in found
    assert (found["tokenizer.chat_template"], found["tokenizer.ggml.pre"]) == ("{{ messages }}", "llama-bpe")


@pytest.mark.parametrize(
    ("splits", "name"),
    [
        ([{"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}], "gpt-2"),
        (
            [
                {"type": "Digits", "individual_digits": True},
                {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True},
            ],
            "smollm",
        ),
        ([{"type": "ByteLevel", "add_prefix_space": True, "use_regex": True}], None),
        ([{"type": "Whitespace"}], None),
    ],
)
def test_pre_tokenizer_names(splits: list[dict[str, Any]], name: str | None, tmp_path: Path) -> None:
    spec = train_bpe(SAMPLE, 400).spec
    parts = [{**part, "trim_offsets": True} if part["type"] == "ByteLevel" else part for part in splits]
    spec["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": parts}
    save(tmp_path / "run", HuggingFaceTokenizer(json.dumps(spec)))
    if name is None:
        with pytest.raises(UserError, match="its pre-tokenizer has no name in llama.cpp"):
            export_gguf(tmp_path / "run", tmp_path / "x.gguf")
        assert [path.name for path in tmp_path.iterdir()] == ["run"]
    else:
        export_gguf(tmp_path / "run", tmp_path / "x.gguf")
        assert keys(tmp_path / "x.gguf")["tokenizer.ggml.pre"] == name


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"sliding_window": 8}, "mistral is nearest, but for sliding_window 8"),
        ({"mlp_bias": True}, "mlp_bias .there: none"),
        ({"activation": "geglu"}, "activation 'geglu' .there: swiglu"),
        ({"norm_zero_centered": True}, "llama is nearest, but for norm_zero_centered True"),
        ({"rope_scaling": {"type": "yarn", "factor": 2.0, "original_seq_length": 64}}, "rope_scaling 'yarn'"),
        ({"qk_norm": True, "rope_scaling": LLAMA3}, "llama is nearest, but for qk_norm True"),
        ({"norm": "layernorm"}, "norm 'layernorm'"),
    ],
)
def test_unsupported_models(fields: dict[str, Any], message: str, tmp_path: Path) -> None:
    save(tmp_path / "run", **fields)
    with pytest.raises(UserError, match=message):
        export_gguf(tmp_path / "run", tmp_path / "x.gguf")
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_from_the_command_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(*words: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["export_gguf.py", *map(str, words)])
        try:
            status = tool.main()
        except SystemExit as stop:
            status = int(stop.code or 0)
        return status, *capsys.readouterr()

    save(tmp_path / "run", train_bpe(SAMPLE, 400))
    status, shown, _ = run(tmp_path / "run", tmp_path / "out" / "x.gguf", "--dtype", "bf16")
    assert status == 0 and "x.gguf: llama, 0.2 MB" in shown
    assert run(tmp_path / "run", tmp_path / "out" / "x.gguf")[2].endswith("give a new file, or remove it first.\n")
    save(tmp_path / "bytes", ByteTokenizer())
    assert "only a byte-level BPE can be exported" in run(tmp_path / "bytes", tmp_path / "y.gguf")[2]
    monkeypatch.setattr("megatronish.interop.gguf.importlib.util.find_spec", lambda name: None)
    assert "pip install 'megatronish[gguf]'" in run(tmp_path / "run", tmp_path / "y.gguf")[2]
    assert not (tmp_path / "y.gguf").exists()
