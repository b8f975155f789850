"""Rotary frequencies and tables, against `transformers` and closed forms."""

import math

import pytest
import torch
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from megatronish.config.model import ModelConfig
from megatronish.model.rotary import RotaryTables, rotary_frequencies
from megatronish.model.transformer import Transformer

SHAPE = {
    "vocab_size": 31,
    "num_layers": 1,
    "hidden_size": 256,
    "num_attention_heads": 2,
    "ffn_hidden_size": 32,
    "seq_length": 256,
    "rope_theta": 500000.0,
}
SCALINGS = {
    "linear": ({"type": "linear", "factor": 4.0}, {"rope_type": "linear", "factor": 4.0}),
    "llama3": (
        {"type": "llama3", "factor": 32.0, "original_seq_length": 8192},
        {
            "rope_type": "llama3",
            "factor": 32.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
    ),
    "yarn": (
        {"type": "yarn", "factor": 8.0, "original_seq_length": 4096},
        {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 4096},
    ),
    "yarn_tuned": (
        {
            "type": "yarn",
            "factor": 40.0,
            "original_seq_length": 4096,
            "beta_fast": 16.0,
            "beta_slow": 2.0,
            "attention_factor": 1.1,
        },
        {
            "rope_type": "yarn",
            "factor": 40.0,
            "original_max_position_embeddings": 4096,
            "beta_fast": 16.0,
            "beta_slow": 2.0,
            "attention_factor": 1.1,
        },
    ),
}


@pytest.mark.parametrize("name", SCALINGS)
def test_scaled_frequencies_equal_transformers(name: str) -> None:
    ours, theirs = SCALINGS[name]
    config = ModelConfig(**SHAPE, rope_scaling=ours)
    parameters = {"rope_theta": 500000.0, **theirs}
    original = theirs.get("original_max_position_embeddings", 4096)
    reference = LlamaConfig(
        hidden_size=256,
        num_attention_heads=2,
        max_position_embeddings=int(original * theirs["factor"]),
        rope_parameters=parameters,
    )
    expected, expected_factor = ROPE_INIT_FUNCTIONS[theirs["rope_type"]](reference, device="cpu")
    frequencies, factor = rotary_frequencies(config)
    # theirs are fp32
    torch.testing.assert_close(frequencies, expected.double(), rtol=1e-6, atol=0)
    assert factor == pytest.approx(expected_factor)


def test_ntk_slows_the_last_pair_by_the_factor_and_keeps_the_first() -> None:
    plain, _ = rotary_frequencies(ModelConfig(**SHAPE))
    stretched, _ = rotary_frequencies(ModelConfig(**SHAPE, rope_scaling={"type": "ntk", "factor": 8.0}))
    ratio = plain / stretched
    assert ratio[0].item() == 1.0
    assert ratio[-1].item() == pytest.approx(8.0, rel=1e-12)
    assert (ratio.diff() > 0).all()


def test_tables_are_right_to_one_fp32_rounding_far_out() -> None:
    config = ModelConfig(**{**SHAPE, "seq_length": 131072})
    cos, sin = RotaryTables(config).get(torch.device("cpu"), 1)
    for position in (0, 1, 4097, 131071):
        for pair in (0, 1, 63):
            angle = position * 500000.0 ** (-2 * pair / 128)
            assert cos[position, pair].item() == pytest.approx(math.cos(angle), abs=6e-8)
            assert sin[position, pair].item() == pytest.approx(math.sin(angle), abs=6e-8)


def test_casting_the_model_leaves_the_angles_alone() -> None:
    model = Transformer(ModelConfig(**SHAPE))
    before = model.rotary.get(torch.device("cpu"), 256)
    cast = model.to(torch.bfloat16)
    after = cast.rotary.get(torch.device("cpu"), 256)
    assert after[0].dtype == torch.float32
    assert torch.equal(before[0], after[0]) and torch.equal(before[1], after[1])
    assert all(tensor.dtype == torch.bfloat16 for tensor in cast.state_dict().values())


def test_tables_grow_beyond_the_training_context() -> None:
    tables = RotaryTables(ModelConfig(**SHAPE))
    cos, _ = tables.get(torch.device("cpu"), 256)
    longer, _ = tables.get(torch.device("cpu"), 600)
    assert cos.shape[0] == 256 and longer.shape[0] == 1024
    assert torch.equal(longer[:256], cos)
    assert tables.get(torch.device("cpu"), 5)[0] is longer
