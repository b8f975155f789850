"""Imported models of transformers have the same logits, and exported ones too, with or without training."""

from __future__ import annotations

import gc
import json
import shutil
import struct
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from megatronish.checkpoint.weights import WEIGHTS_FILE, load_model, save_model
from megatronish.config.model import ModelConfig
from megatronish.errors import UserError
from megatronish.interop.huggingface import HuggingFaceWeights, export_model, import_model
from megatronish.interop.safetensors_files import INDEX, SINGLE, SafetensorsFolder, SafetensorsWriter, TensorEntry
from megatronish.model.transformer import Transformer
from tests.hf_models import MODELS, VOCAB, build

TOLERANCE = 1e-5  # of the largest logit, in fp32: as in tests/model/test_against_transformers.py
TOKENS = torch.randint(VOCAB, (2, 40), generator=torch.Generator().manual_seed(2))
OURS = {
    "vocab_size": VOCAB,
    "num_layers": 2,
    "hidden_size": 48,
    "num_attention_heads": 6,
    "num_kv_heads": 2,
    "ffn_hidden_size": 80,
    "seq_length": 64,
}


@torch.no_grad()
def difference(ours: Transformer, theirs: Any) -> float:
    """Largest difference of logits, relative to the largest."""
    expected = theirs(TOKENS).logits
    return ((ours(TOKENS) - expected).abs().max() / expected.abs().max()).item()


def opened(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()


def train(model: Transformer, steps: int) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(steps):
        loss, count = model.loss(TOKENS[:, :-1], TOKENS[:, 1:])
        (loss / count).backward()
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize("name", MODELS)
def test_import_and_export(name: str, tmp_path: Path) -> None:
    """Imported, exported untouched, trained for 3 steps, exported again."""
    theirs = build(name)
    theirs.save_pretrained(tmp_path / "hf", max_shard_size="40KB")
    assert len(list((tmp_path / "hf").glob("*.safetensors"))) > 1
    import_model(tmp_path / "hf", tmp_path / "ours")
    ours = load_model(tmp_path / "ours")
    assert difference(ours, theirs) < TOLERANCE

    result = export_model(tmp_path / "ours", tmp_path / "same", max_shard_bytes=40_000)
    assert result.model_type == theirs.config.model_type and len(result.files) > 1
    again = opened(tmp_path / "same")
    before, after = theirs.state_dict(), again.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)
    assert comparable(again.config) == comparable(theirs.config)

    train(ours, 3)
    assert difference(ours.eval(), theirs) > 1e-2  # it is another model now
    save_model(tmp_path / "trained", ours.state_dict(), ours.config)
    export_model(tmp_path / "trained", tmp_path / "out")
    assert [path.name for path in (tmp_path / "out").glob("*.safetensors")] == [SINGLE]
    assert difference(ours, opened(tmp_path / "out")) < TOLERANCE
    assert HuggingFaceWeights(tmp_path / "out").config == ours.config


def comparable(config: Any) -> dict[str, Any]:
    """The contents of config.json as read by transformers, except for versions and names."""
    stamps = ("transformers_version", "_name_or_path", "use_cache", "dtype")
    return {name: value for name, value in config.to_dict().items() if name not in stamps}


@pytest.mark.parametrize(
    ("changes", "model_type"),
    [
        ({"activation": "swiglu", "rope_interleaved": True}, "llama"),
        ({"rope_interleaved": True, "qk_norm": True, "head_dim": 12}, "qwen3"),
        ({"rope_scaling": {"type": "ntk", "factor": 4.0}}, "llama"),
        ({"rope_scaling": {"type": "linear", "factor": 4.0}, "sliding_window": 9}, "mistral"),
        ({"attention_qkv_bias": True, "sliding_window": 9, "full_attention_interval": 2}, "qwen2"),
        ({"rope_fraction": 0.5}, "phi3"),
        (
            {"norm": "layernorm", "activation": "gelu", "mlp_bias": True, "num_kv_heads": 6, "tie_embeddings": True},
            "gpt_neox",
        ),
        ({"norm": "layernorm", "activation": "gelu_tanh"}, "starcoder2"),
        ({"norm": "layernorm", "parallel_block": True, "parallel_block_shared_norm": True}, "stablelm"),
        ({"head_dim": 20}, "llama"),
        ({"hidden_size": 50, "head_dim": 12}, "mistral"),
    ],
)
def test_architecture_of_our_models(changes: dict[str, Any], model_type: str, tmp_path: Path) -> None:
    config = ModelConfig(**{**OURS, **changes})
    model = Transformer(config, seed=3).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape))
    save_model(tmp_path / "ours", model.state_dict(), config)
    assert export_model(tmp_path / "ours", tmp_path / "hf").model_type == model_type
    assert difference(model, opened(tmp_path / "hf")) < TOLERANCE
    back = HuggingFaceWeights(tmp_path / "hf")
    assert back.config.rope_interleaved is False
    if not config.rope_interleaved:
        state = model.state_dict()
        assert all(torch.equal(back.weight(key), state[key]) for key in back.shapes)


@pytest.mark.parametrize(
    ("changes", "names"),
    [
        ({"norm_position": "post"}, "nearest is llama, but for norm_position 'post' (there: 'pre')"),
        ({"attention_qkv_bias": True, "mlp_bias": True}, "attention_qkv_bias True and attention_out_bias False"),
        ({"activation": "relu"}, "activation 'relu'"),
        ({"rope_fraction": 0.0}, "rope_fraction 0.0 (there: 1.0)"),
    ],
)
def test_unsupported_models(changes: dict[str, Any], names: str, tmp_path: Path) -> None:
    config = ModelConfig(**{**OURS, **changes})
    save_model(tmp_path / "ours", Transformer(config).state_dict(), config)
    with pytest.raises(UserError) as caught:
        export_model(tmp_path / "ours", tmp_path / "hf")
    assert names in str(caught.value)
    assert not (tmp_path / "hf").exists()


def test_requested_architecture_does_not_fit(tmp_path: Path) -> None:
    config = ModelConfig(**OURS, qk_norm=True)
    save_model(tmp_path / "ours", Transformer(config).state_dict(), config)
    with pytest.raises(UserError, match=r"cannot be expressed as llama, but for qk_norm True \(there: False\)"):
        export_model(tmp_path / "ours", tmp_path / "hf", model_type="llama")
    with pytest.raises(UserError, match="model_type 'bert' is not known; there are: llama, mistral"):
        export_model(tmp_path / "ours", tmp_path / "hf", model_type="bert")


def test_bf16_weights_are_unchanged(tmp_path: Path) -> None:
    theirs = build("llama").to(torch.bfloat16)
    theirs.save_pretrained(tmp_path / "hf")
    assert import_model(tmp_path / "hf", tmp_path / "ours").dtype == torch.bfloat16
    export_model(tmp_path / "ours", tmp_path / "out")
    before, after = load_file(tmp_path / "hf" / SINGLE), load_file(tmp_path / "out" / SINGLE)
    assert before.keys() == after.keys()
    assert all(after[key].dtype == torch.bfloat16 and torch.equal(before[key], after[key]) for key in before)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["torch_dtype"] == "bfloat16"
    assert import_model(tmp_path / "hf", tmp_path / "wide", dtype=torch.float32).dtype == torch.float32


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("hf")
    build("llama").save_pretrained(folder, max_shard_size="40KB")
    return folder


@pytest.fixture
def folder(saved: Path, tmp_path: Path) -> Path:
    """A sharded Llama to damage."""
    return Path(shutil.copytree(saved, tmp_path / "hf"))


def change(path: Path, **fields: Any) -> None:
    raw = json.loads(path.read_text()) | fields
    path.write_text(json.dumps({key: value for key, value in raw.items() if value != "absent"}))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"model_type": "bert"}, "model_type 'bert' is not one that can be expressed: llama, mistral, qwen2"),
        ({"model_type": 7}, "model_type 7 is not one"),
        ({"model_type": "gemma2"}, "'gemma2' is not one that can be expressed \\(attn_logit_soft.*: llama, mistral"),
        ({"model_type": "gemma", "hidden_act": "silu"}, "hidden_act is 'silu': expressible: gelu_pytorch_tanh"),
        ({"auto_map": {"AutoConfig": "evil.py"}}, "auto_map names code"),
        ({"hidden_act": "relu"}, "hidden_act is 'relu': expressible: silu, gelu"),
        ({"hidden_act": ["silu"]}, "hidden_act is \\['silu'\\]: expressible"),
        ({"head_dim": "8"}, "model.head_dim"),
        ({"rope_theta": "big", "rope_parameters": "absent"}, "model.rope_theta"),
        (
            {"rope_parameters": {"rope_type": "yarn", "original_max_position_embeddings": "x"}},
            "original_max_position_embeddings is 'x': a positive integer",
        ),
        ({"hidden_size": "absent"}, '"hidden_size" is missing'),
        ({"hidden_size": "48"}, "hidden_size is '48': a positive integer"),
        ({"num_attention_heads": 0}, "num_attention_heads is 0: a positive integer"),
        ({"num_key_value_heads": 4}, "6 is not divisible by num_kv_heads 4"),
        ({"rms_norm_eps": "small"}, "model.norm_eps"),
        ({"logit_scale": 2.0}, "logit_scale is 2.0: LlamaForCausalLM of our table knows no such field"),
        ({"rope_parameters": {"rope_type": "dynamic", "factor": 2.0}}, "type is 'dynamic': expressible for Llama"),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 2.0, "mscale": 0.7}}, "'mscale': 0.7.*not known for yarn"),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 2.0, "truncate": False}}, "truncate is False"),
        ({"rope_parameters": {"full_attention": {}, "sliding_attention": {"x": 1}}}, "rope_parameters is .*not known"),
        ({"rope_parameters": ["x"]}, "an object is expected"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5: LlamaForCausalLM rotates full heads"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"model_type": "qwen3", "qk_norm": True}, "knows no such field|has no tensor|qk_norm"),
        ({"intermediate_size": 96}, "gate_proj.weight' is \\[80, 48\\], but \\[96, 48\\] by config.json"),
        ({"num_hidden_layers": 2}, "holds 'model.layers.2.* does not account for"),
        ({"num_hidden_layers": 10**12}, "1,000,000,000,000 layers in config.json, fewer tensors"),
        ({"num_hidden_layers": 4}, "has no tensor 'model.layers.3.input_layernorm.weight', which should be \\[48\\]"),
        ({"attention_bias": True}, "has no tensor 'model.layers.0.self_attn.q_proj.bias'"),
    ],
)
def test_unsupported_config_fields(folder: Path, fields: dict[str, Any], message: str) -> None:
    change(folder / "config.json", **fields)
    with pytest.raises(UserError, match=message):
        HuggingFaceWeights(folder)


def test_config_fields_without_effect(folder: Path) -> None:
    before = HuggingFaceWeights(folder).config
    change(folder / "config.json", _made_by="someone", unused=None, tokenizer_class="X", pretraining_tp=2, empty=[])
    assert HuggingFaceWeights(folder).config == before


def test_both_forms_of_rotary_settings(folder: Path) -> None:
    """As transformers 4 and 5 write them; the original length falls back to max_position_embeddings."""
    fields = {"rope_type": "yarn", "factor": 2.0, "beta_fast": 16}
    change(folder / "config.json", rope_parameters={**fields, "rope_theta": 5000.0})
    new = HuggingFaceWeights(folder).config
    change(folder / "config.json", rope_parameters="absent", rope_scaling=fields, rope_theta=5000)
    old = HuggingFaceWeights(folder).config
    change(folder / "config.json", rope_scaling={**fields, "rope_type": "absent", "type": "yarn"})
    assert new == old and new.rope_theta == 5000.0
    assert new.rope_scaling is not None
    assert (new.rope_scaling.type, new.rope_scaling.beta_fast, new.rope_scaling.original_seq_length) == (
        "yarn",
        16.0,
        64,
    )


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"max_window_layers": 1}, "max_window_layers is 1: sliding layers can be all, or all but every k-th"),
        ({"max_window_layers": "all"}, "max_window_layers is 'all': an integer"),
        ({"layer_types": 3}, "layer_types is 3"),
        ({"layer_types": ["chunked_attention"] * 3}, "layer_types is"),
        ({"layer_types": ["sliding_attention"]}, "expected 3 of sliding_attention"),
    ],
)
def test_unsupported_windows(tmp_path: Path, fields: dict[str, Any], message: str) -> None:
    build("qwen2").save_pretrained(tmp_path)
    change(tmp_path / "config.json", use_sliding_window=True, sliding_window=7, **{"layer_types": "absent", **fields})
    with pytest.raises(UserError, match=message):
        HuggingFaceWeights(tmp_path)


def test_missing_and_truncated_files(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="nowhere: no such folder"):
        HuggingFaceWeights(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="no config.json in it"):
        HuggingFaceWeights(tmp_path / "empty")
    shards = sorted(folder.glob("*.safetensors"))
    content = shards[1].read_bytes()
    for size in (0, 7, 60, len(content) - 1):
        shards[1].write_bytes(content[:size])
        with pytest.raises(UserError, match=f"{shards[1].name}: truncated or not a safetensors file"):
            import_model(folder, tmp_path / "out")
    shards[1].unlink()
    with pytest.raises(UserError, match=f"{shards[1].name}: missing, though"):
        import_model(folder, tmp_path / "out")
    (folder / INDEX).write_text("{")
    with pytest.raises(UserError, match=f"{INDEX}: cannot be read"):
        import_model(folder, tmp_path / "out")
    (folder / INDEX).unlink()
    with pytest.raises(UserError, match=f"neither {SINGLE} nor {INDEX}"):
        import_model(folder, tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty", "hf"]  # no partial results


def test_pickles_are_never_opened(folder: Path, tmp_path: Path) -> None:
    for path in folder.glob("*safetensors*"):
        path.unlink()
    # Opening it would make a file.
    trap = f"cos\nsystem\n(S'touch {tmp_path / 'opened'}'\ntR."
    (folder / "pytorch_model.bin").write_text(trap)
    with pytest.raises(UserError, match=r"pickled \(pytorch_model.bin\).*only safetensors are read"):
        HuggingFaceWeights(folder)
    assert not (tmp_path / "opened").exists()


@pytest.mark.parametrize("name", ["../x.safetensors", "/etc/x.safetensors", "a/b.safetensors", "..", "a\\b"])
def test_an_index_cannot_leave_its_folder(folder: Path, name: str) -> None:
    index = json.loads((folder / INDEX).read_text())
    first = next(iter(index["weight_map"]))
    index["weight_map"][first] = name
    (folder / INDEX).write_text(json.dumps(index))
    with pytest.raises(UserError, match="not directly in this folder"):
        HuggingFaceWeights(folder)


def test_an_index_that_names_the_wrong_file(folder: Path) -> None:
    index = json.loads((folder / INDEX).read_text())
    files = sorted(set(index["weight_map"].values()))
    first = next(name for name, file in index["weight_map"].items() if file == files[0])
    index["weight_map"][first] = files[1]
    (folder / INDEX).write_text(json.dumps(index))
    with pytest.raises(UserError, match=f"{files[1]}: has no tensor '{first}'"):
        HuggingFaceWeights(folder)


def test_tensors_that_are_not_weights(folder: Path, tmp_path: Path) -> None:
    """Old files contain buffers and a second copy of a tied head, which are ignored; integers are rejected."""
    theirs = build("llama_tied")
    theirs.save_pretrained(tmp_path / "tied")
    path = tmp_path / "tied" / SINGLE
    state = load_file(path)
    extra = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}
    save_file({**state, **extra, "lm_head.weight": state["model.embed_tokens.weight"].clone()}, path)
    weights = HuggingFaceWeights(tmp_path / "tied")
    assert torch.equal(weights.weight("head.weight"), state["model.embed_tokens.weight"])
    save_file({**state, "model.layers.0.mlp.up_proj.weight": torch.ones(80, 48, dtype=torch.int8)}, path)
    with pytest.raises(UserError, match="up_proj.weight is I8.*unquantized"):
        HuggingFaceWeights(tmp_path / "tied")


def test_existing_folder_is_not_overwritten(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").write_text("x")
    with pytest.raises(UserError, match="exists and is not empty"):
        import_model(folder, tmp_path / "full")
    assert (tmp_path / "full" / "mine").read_text() == "x"
    (tmp_path / "new").mkdir()
    assert import_model(folder, tmp_path / "new").files == [WEIGHTS_FILE]


def test_full_disk_is_reported_before_writing(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    full = types.SimpleNamespace(free=40960)
    monkeypatch.setattr("megatronish.interop.safetensors_files.shutil.disk_usage", lambda path: full)
    with pytest.raises(UserError, match=r"0.00 GB are needed and 0.00 GB free: choose another disk"):
        import_model(folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_library_reads_our_files(tmp_path: Path) -> None:
    tensors = {"b": torch.randn(3, 5), "a": torch.arange(6.0).view(2, 3).T, "é": torch.ones(1)}
    entries = {name: TensorEntry(tuple(tensor.shape), torch.bfloat16) for name, tensor in tensors.items()}
    with SafetensorsWriter(tmp_path / "x", entries, {"format": "pt"}) as writer:
        for name, tensor in tensors.items():
            writer.write(name, tensor)
    read = load_file(tmp_path / "x")
    assert read.keys() == tensors.keys()
    assert all(torch.equal(read[name], tensor.bfloat16()) for name, tensor in tensors.items())
    length = struct.unpack("<Q", (tmp_path / "x").read_bytes()[:8])[0]
    assert length % 8 == 0  # so that tensors are aligned in a mapped file


def test_conversion_needs_memory_for_one_tensor(tmp_path: Path) -> None:
    """Export and import of a model of 200 MB need less than half of that: tensors have 16 MB."""
    config = ModelConfig(
        vocab_size=64, num_layers=8, hidden_size=1024, num_attention_heads=8, ffn_hidden_size=1024, seq_length=8
    )
    save_model(tmp_path / "a", Transformer(config).state_dict(), config)
    size = (tmp_path / "a" / WEIGHTS_FILE).stat().st_size
    assert size > 2e8
    grown = peak_growth(lambda: export_model(tmp_path / "a", tmp_path / "b", max_shard_bytes=2**25))
    assert grown < 0.5 * size
    grown = peak_growth(lambda: import_model(tmp_path / "b", tmp_path / "c"))
    assert grown < 0.5 * size
    first, last = SafetensorsFolder(tmp_path / "a"), SafetensorsFolder(tmp_path / "c")
    assert first.entries == last.entries
    assert all(torch.equal(first.read(name), last.read(name)) for name in first.entries)


def peak_growth(function: Any) -> int:
    """Peak growth in bytes of the resident memory of this process while `function` runs."""
    gc.collect()
    try:
        Path("/proc/self/clear_refs").write_text("5")  # reset the high-water mark
    except OSError:
        pytest.skip("this system has no high-water mark that can be reset")
    before = _status("VmRSS")
    function()
    return _status("VmHWM") - before


def _status(name: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name))
    return int(line.split()[1]) * 1024
