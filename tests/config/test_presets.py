"""Presets: exact parameter counts, equality with `transformers`, overrides, and messages for what does not fit."""

from typing import Any

import pytest
import torch
from pydantic import ValidationError
from transformers import (
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from megatronish.config.model import ModelConfig
from megatronish.config.presets import PRESETS, preset_names, resolve_model
from megatronish.model.accounting import parameter_counts

# Published models: the counts on their model cards. The others: worked out by hand from their shapes.
PARAMETERS = {
    "tiny": 4_000_512,
    "s0_300m": 303_219_712,
    "s1_730m": 728_471_040,
    "s2_dolly": 141_658_112,
    "s3_4b": 3_880_791_040,
    "s3_7b": 6_738_415_616,
    "s4_gpt": 353_774_592,
    "llama3_2_1b": 1_235_814_400,
    "llama3_8b": 8_030_261_248,
    "qwen3_0_6b": 596_049_920,
    "qwen3_1_7b": 1_720_574_976,
    "mistral_7b": 7_241_732_096,
    "smollm2_135m": 134_515_008,
    "smollm2_360m": 361_821_120,
    "pythia_160m": 162_322_944,
    "pythia_410m": 405_334_016,
}
FAMILIES: dict[str, tuple[Any, Any]] = {
    "llama3_2_1b": (LlamaConfig, LlamaForCausalLM),
    "llama3_8b": (LlamaConfig, LlamaForCausalLM),
    "smollm2_135m": (LlamaConfig, LlamaForCausalLM),
    "qwen3_0_6b": (Qwen3Config, Qwen3ForCausalLM),
    "mistral_7b": (MistralConfig, MistralForCausalLM),
    "pythia_410m": (GPTNeoXConfig, GPTNeoXForCausalLM),
}
SHAPE = {
    "vocab_size": 100,
    "num_layers": 2,
    "hidden_size": 64,
    "num_attention_heads": 4,
    "ffn_hidden_size": 128,
    "seq_length": 32,
}


def test_every_preset_has_its_exact_count() -> None:
    counts = {name: parameter_counts(resolve_model({"preset": name})).total for name in preset_names()}
    assert counts == PARAMETERS


@pytest.mark.parametrize("name", FAMILIES)
def test_count_equals_transformers(name: str) -> None:
    config = resolve_model({"preset": name})
    config_class, model_class = FAMILIES[name]
    extra = {} if config_class is GPTNeoXConfig else {"num_key_value_heads": config.resolved_kv_heads}
    if config.head_dim is not None:
        extra["head_dim"] = config.head_dim
    theirs = config_class(
        vocab_size=config.vocab_size,
        num_hidden_layers=config.num_layers,
        hidden_size=config.hidden_size,
        num_attention_heads=config.num_attention_heads,
        intermediate_size=config.ffn_hidden_size,
        tie_word_embeddings=config.tie_embeddings,
        **extra,
    )
    with torch.device("meta"):
        model = model_class(theirs)
    model.tie_weights()
    assert sum(p.numel() for p in model.parameters()) == PARAMETERS[name]


def test_overrides_replace_fields_of_the_preset() -> None:
    config = resolve_model({"preset": "llama3_2_1b", "num_layers": 3, "rope_scaling": {"factor": 16.0}})
    assert (config.preset, config.num_layers, config.hidden_size) == ("llama3_2_1b", 3, 2048)
    assert config.rope_scaling is not None
    assert (config.rope_scaling.factor, config.rope_scaling.original_seq_length) == (16.0, 8192)
    assert resolve_model({"preset": "llama3_2_1b", "rope_scaling": None}).rope_scaling is None
    assert PRESETS["llama3_2_1b"]["num_layers"] == 16


def test_a_resolved_configuration_resolves_to_itself() -> None:
    for name in preset_names():
        config = resolve_model({"preset": name, "vocab_size": 777})
        assert resolve_model(config.model_dump(mode="json")) == config


def test_configurations_are_frozen() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        resolve_model({"preset": "tiny"}).num_layers = 5  # type: ignore[misc]
    with pytest.raises(TypeError):
        PRESETS["new"] = {}  # type: ignore[index]


@pytest.mark.parametrize(
    ("typed", "meant"), [("tinny", "tiny"), ("llama3.2-1b", "llama3_2_1b"), ("S0-300M", "s0_300m")]
)
def test_unknown_preset(typed: str, meant: str) -> None:
    with pytest.raises(ValueError, match=f'unknown model preset "{typed}". Did you mean "{meant}"\\?') as error:
        resolve_model({"preset": typed})
    assert "mistral_7b" in str(error.value)  # the full list follows


def test_without_a_preset_the_shape_is_needed() -> None:
    with pytest.raises(ValidationError) as error:
        resolve_model({"vocab_size": 10, "num_layers": 1})
    missing = {item["loc"][0] for item in error.value.errors() if item["type"] == "missing"}
    assert missing == {"hidden_size", "num_attention_heads", "ffn_hidden_size", "seq_length"}
    with pytest.raises(ValidationError, match="num_layer\n.*Extra inputs are not permitted"):
        resolve_model({"preset": "tiny", "num_layer": 1})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"num_attention_heads": 5},
            "hidden_size 64 is not divisible by num_attention_heads 5: choose a divisor (4 or 8)",
        ),
        (
            {"num_kv_heads": 3},
            "num_attention_heads 4 is not divisible by num_kv_heads 3: choose a divisor of 4 (2 or 4)",
        ),
        ({"num_kv_heads": 8}, "num_attention_heads 4 is not divisible by num_kv_heads 8: choose a divisor of 4 (4)"),
        ({"head_dim": 7}, "head_dim 7 * rope_fraction 1.0 rotates 7 channels, which must be an even number"),
        ({"rope_fraction": 0.01}, "head_dim 16 * rope_fraction 0.01 rotates 0 channels"),
        ({"full_attention_interval": 2}, "full_attention_interval 2 without sliding_window has no effect"),
        ({"parallel_block_shared_norm": True}, "needs parallel_block true and norm_position 'pre' (they are False and"),
        (
            {"parallel_block_shared_norm": True, "parallel_block": True, "norm_position": "post"},
            "(they are True and 'post')",
        ),
        ({"rope_fraction": 0.0, "rope_scaling": {"type": "linear", "factor": 2}}, "no effect with rope_fraction 0"),
        ({"rope_fraction": 0.125, "rope_scaling": {"type": "ntk", "factor": 2}}, "'ntk' needs more than 2 rotated"),
        ({"rope_scaling": {"type": "yarn", "factor": 2}}, "type 'yarn' needs original_seq_length"),
        (
            {"rope_scaling": {"type": "llama3", "factor": 2, "original_seq_length": 8, "low_freq_factor": 4}},
            "high_freq_factor 4.0 must be larger than low_freq_factor 4.0",
        ),
        (
            {"rope_scaling": {"type": "yarn", "factor": 2, "original_seq_length": 8, "beta_slow": 64}},
            "beta_fast 32.0 must be larger than beta_slow 64.0",
        ),
        ({"vocab_size": 0}, "greater than 0"),
        ({"attention_dropout": 1.0}, "less than 1"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_what_does_not_fit_is_named(change: dict[str, Any], message: str) -> None:
    ModelConfig(**SHAPE)
    with pytest.raises(ValidationError) as error:
        ModelConfig(**{**SHAPE, **change})
    assert message in str(error.value)


def test_every_field_has_a_description() -> None:
    undescribed = [name for name, field in ModelConfig.model_fields.items() if not field.description]
    assert undescribed == []
