"""Quantized weights are as accurate as their format, with each matrix product, and can be saved and loaded."""

import re
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F

from megatronish.config.model import ModelConfig
from megatronish.errors import UserError
from megatronish.inference.batch import generate
from megatronish.inference.load import load_for_inference
from megatronish.inference.quantize import (
    Int4Linear,
    Int8Linear,
    from_int4,
    load_quantized,
    quantize_model,
    save_quantized,
    stored_bytes,
    to_int4,
    to_int8,
)
from megatronish.inference.sampling import GREEDY
from megatronish.model.transformer import Transformer
from tests.inference.test_inference_launchers import ROOT

SHAPE = {
    "vocab_size": 61,
    "num_layers": 2,
    "hidden_size": 64,
    "num_attention_heads": 4,
    "num_kv_heads": 2,
    "ffn_hidden_size": 96,
    "seq_length": 64,
    "init_std": 0.05,
}


def weight(rows=40, columns=192):
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(0))


def test_int8_is_within_half_a_step():
    w = weight()
    w[3] = 0
    codes, scales = to_int8(w)
    assert codes.abs().amax(1).eq(127).sum() == 39 and codes[3].eq(0).all()
    assert ((codes * scales[:, None] - w).abs() <= scales[:, None] * (0.5 + 1e-5)).all()


@pytest.mark.parametrize("group", [32, 64])
def test_int4_beats_rounding_to_the_full_range(group):
    w = weight()
    w[5] = 0.25  # a constant group has no range
    restored = from_int4(*to_int4(w, group))
    grouped = w.unflatten(1, (-1, group))
    low, high = grouped.amin(2, keepdim=True), grouped.amax(2, keepdim=True)
    step = ((high - low) / 15).clamp(min=1e-9)
    plain = (((grouped - low) / step).round() * step + low).flatten(1)
    error, plain_error = ((x.float() - w).square().mean() for x in (restored, plain))
    # The plain one has ranges in fp32; ours are in bf16, and clipped.
    assert error < plain_error
    torch.testing.assert_close(restored[5].float(), w[5], rtol=2**-8, atol=0)


@pytest.mark.parametrize("rows", [1, 16, 40])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("bias", [False, True])
def test_layers_equal_their_weights(dtype, rows, bias):
    """The kernel for few rows and torch for many both multiply by the dequantized weight."""
    w, x = weight(), torch.randn(rows, 192, generator=torch.Generator().manual_seed(1)).to(dtype)
    b = torch.nn.Parameter(torch.randn(40, generator=torch.Generator().manual_seed(2)).to(dtype)) if bias else None
    eight, four = Int8Linear(w, b), Int4Linear(w, 64, b)
    exact_bias = None if b is None else b.double()
    with torch.no_grad():
        for layer, restored in (
            (eight, eight.codes.double() * eight.scales.double()[:, None]),
            (four, from_int4(four.codes, four.ranges).double()),
        ):
            exact = F.linear(x.double(), restored, exact_bias)
            error = ((layer(x).double() - exact).norm() / exact.norm()).item()
            # bf16: a few roundings of 2^-9, of weights (int4), sums, scales and the biased result.
            assert error < (2e-6 if dtype == torch.float32 else 8e-3)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("form", ["int8", "int4"])
def test_saved_and_loaded(form, tied, tmp_path):
    model = Transformer(ModelConfig(**SHAPE, tie_embeddings=tied), seed=1).eval()
    tokens = torch.arange(40)[None]
    with torch.no_grad():
        exact = model(tokens)
        full = stored_bytes(model)
        quantize_model(model, form, 32)
        narrow = model(tokens)
    error = ((narrow - exact).norm() / exact.norm()).item()
    assert 0 < error < (0.05 if form == "int8" else 0.3), "two layers of errors of 0.5% (int8) and 8% (int4) a weight"
    assert stored_bytes(model) < full * (0.3 if form == "int8" else 0.26)
    save_quantized(tmp_path, model, form, 32)
    again = load_quantized(tmp_path, "cpu", None)
    with torch.no_grad():
        assert torch.equal(again(tokens), narrow)
    assert list(generate(again, [1, 2, 3], 10, GREEDY)) == list(generate(model, [1, 2, 3], 10, GREEDY))
    half = load_quantized(tmp_path, "cpu", torch.bfloat16)
    assert half.head.scales.dtype == torch.float32
    with torch.no_grad():
        assert half(tokens).dtype == torch.bfloat16


def test_damaged_files(tmp_path):
    model = Transformer(ModelConfig(**SHAPE), seed=1).eval()
    with pytest.raises(UserError, match="group 48: choose 32, 64, 128"):
        quantize_model(model, "int4", 48)
    save_quantized(tmp_path, quantize_model(model, "int8"), "int8", 64)
    weights = (tmp_path / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(weights[:-9])
    with pytest.raises(UserError, match="torn or missing"):
        load_quantized(tmp_path, "cpu", None)
    (tmp_path / "model.safetensors").write_bytes(weights)
    (tmp_path / "quantization.json").write_text('{"format": "int4", "group": 64}')
    with pytest.raises(UserError, match="of different models"):
        load_quantized(tmp_path, "cpu", None)
    (tmp_path / "quantization.json").write_text('{"format": "int5", "group": 64}')
    with pytest.raises(UserError, match="unknown format 'int5'"):
        load_quantized(tmp_path, "cpu", None)


def test_tool(run, tmp_path):
    command = [sys.executable, str(ROOT / "tools/quantize.py"), "--checkpoint", str(run.folder), "--format", "int8",
               "--output", str(tmp_path / "q"), "--device", "cpu"]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    change = re.search(r"change +(-[\d.]+)% +(-?[\d.]+)%", done.stdout)
    assert float(change[1]) < -70 and abs(float(change[2])) < 5, done.stdout
    loaded = load_for_inference(tmp_path / "q")
    assert isinstance(loaded.model.blocks[0].mlp.up, Int8Linear) and loaded.tokenizer.kind == "bytes"
    again = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=ROOT)
    assert again.returncode == 2 and "is not empty; name a new folder" in again.stderr
