"""Named model shapes. `resolve_model` turns a preset name, or a Hugging Face folder, and overrides into a ModelConfig."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from megatronish.config.base import merge
from megatronish.config.huggingface import TRAINING_ONLY, from_huggingface, read_config
from megatronish.config.model import ModelConfig
from megatronish.errors import ConfigError, did_you_mean

_LLAMA_STYLE: dict[str, Any] = {
    "norm": "rmsnorm",
    "activation": "swiglu",
}
_GPT_STYLE: dict[str, Any] = {
    "norm": "layernorm",
    "activation": "gelu",
    "attention_qkv_bias": True,
    "attention_out_bias": True,
    "mlp_bias": True,
}
# Pythia (Biderman et al. 2023, table 1): GPT-NeoX blocks, a quarter of each head rotated.
_PYTHIA_STYLE: dict[str, Any] = {
    **_GPT_STYLE,
    "vocab_size": 50304,
    "seq_length": 2048,
    "parallel_block": True,
    "rope_fraction": 0.25,
}
_QWEN3_STYLE: dict[str, Any] = {
    **_LLAMA_STYLE,
    "vocab_size": 151936,
    "num_layers": 28,
    "num_attention_heads": 16,
    "num_kv_heads": 8,
    "head_dim": 128,
    "seq_length": 40960,
    "norm_eps": 1e-6,
    "qk_norm": True,
    "rope_theta": 1e6,
    "tie_embeddings": True,
}
_SMOLLM2_STYLE: dict[str, Any] = {
    **_LLAMA_STYLE,
    "vocab_size": 49152,
    "seq_length": 8192,
    "rope_theta": 1e5,
    "tie_embeddings": True,
}

PRESETS: Mapping[str, Mapping[str, Any]] = MappingProxyType(
    {
        "tiny": {
            **_LLAMA_STYLE,
            "vocab_size": 4096,
            "num_layers": 4,
            "hidden_size": 256,
            "num_attention_heads": 4,
            "num_kv_heads": 2,
            "ffn_hidden_size": 704,
            "seq_length": 256,
            "qk_norm": True,
            "tie_embeddings": True,
        },
        "s0_300m": {
            **_LLAMA_STYLE,
            "vocab_size": 50304,
            "num_layers": 24,
            "hidden_size": 1024,
            "num_attention_heads": 16,
            "ffn_hidden_size": 2048,  # the packed gate and up projection is 4096 wide
            "seq_length": 2048,
            "tie_embeddings": True,
        },
        "s1_730m": {
            **_LLAMA_STYLE,
            "vocab_size": 50304,
            "num_layers": 12,
            "hidden_size": 1536,
            "num_attention_heads": 24,
            "num_kv_heads": 6,
            "ffn_hidden_size": 10496,
            "seq_length": 384,
            "tie_embeddings": True,
        },
        "s2_dolly": {
            **_LLAMA_STYLE,
            "vocab_size": 50257,
            "num_layers": 8,
            "hidden_size": 1024,
            "num_attention_heads": 8,
            "num_kv_heads": 2,
            "ffn_hidden_size": 2816,  # 8/3 of the hidden size, rounded up to a multiple of 256
            "seq_length": 512,
            "tie_embeddings": True,
        },
        "s3_4b": {
            **_GPT_STYLE,
            "vocab_size": 50304,
            "num_layers": 24,
            "hidden_size": 3584,
            "num_attention_heads": 28,
            "ffn_hidden_size": 14336,
            "seq_length": 2048,
            "tie_embeddings": True,
        },
        "s3_7b": {
            **_LLAMA_STYLE,
            "vocab_size": 32000,
            "num_layers": 32,
            "hidden_size": 4096,
            "num_attention_heads": 32,
            "ffn_hidden_size": 11008,
            "seq_length": 2048,
        },
        "s4_gpt": {
            **_GPT_STYLE,
            "vocab_size": 50257,
            "num_layers": 24,
            "hidden_size": 1024,
            "num_attention_heads": 16,
            "ffn_hidden_size": 4096,
            "seq_length": 1024,
            "tie_embeddings": True,
        },
        "llama3_2_1b": {
            **_LLAMA_STYLE,
            "vocab_size": 128256,
            "num_layers": 16,
            "hidden_size": 2048,
            "num_attention_heads": 32,
            "num_kv_heads": 8,
            "ffn_hidden_size": 8192,
            "seq_length": 131072,
            "rope_theta": 500000.0,
            "rope_scaling": {"type": "llama3", "factor": 32.0, "original_seq_length": 8192},
            "tie_embeddings": True,
        },
        "llama3_8b": {
            **_LLAMA_STYLE,
            "vocab_size": 128256,
            "num_layers": 32,
            "hidden_size": 4096,
            "num_attention_heads": 32,
            "num_kv_heads": 8,
            "ffn_hidden_size": 14336,
            "seq_length": 8192,
            "rope_theta": 500000.0,
        },
        "qwen3_0_6b": {**_QWEN3_STYLE, "hidden_size": 1024, "ffn_hidden_size": 3072},
        "qwen3_1_7b": {**_QWEN3_STYLE, "hidden_size": 2048, "ffn_hidden_size": 6144},
        "mistral_7b": {
            **_LLAMA_STYLE,
            "vocab_size": 32000,
            "num_layers": 32,
            "hidden_size": 4096,
            "num_attention_heads": 32,
            "num_kv_heads": 8,
            "ffn_hidden_size": 14336,
            "seq_length": 32768,
            "sliding_window": 4096,
        },
        "smollm2_135m": {
            **_SMOLLM2_STYLE,
            "num_layers": 30,
            "hidden_size": 576,
            "num_attention_heads": 9,
            "num_kv_heads": 3,
            "ffn_hidden_size": 1536,
        },
        "smollm2_360m": {
            **_SMOLLM2_STYLE,
            "num_layers": 32,
            "hidden_size": 960,
            "num_attention_heads": 15,
            "num_kv_heads": 5,
            "ffn_hidden_size": 2560,
        },
        "pythia_160m": {
            **_PYTHIA_STYLE,
            "num_layers": 12,
            "hidden_size": 768,
            "num_attention_heads": 12,
            "ffn_hidden_size": 3072,
        },
        "pythia_410m": {
            **_PYTHIA_STYLE,
            "num_layers": 24,
            "hidden_size": 1024,
            "num_attention_heads": 16,
            "ffn_hidden_size": 4096,
        },
    }
)


def preset_names() -> list[str]:
    """Names of all presets, in the order of the table."""
    return list(PRESETS)


def resolve_model(raw: Mapping[str, Any]) -> ModelConfig:
    """Expand `raw["preset"]` or `raw["from_hf"]`, lay the other keys of `raw` over it, and check the result.

    Raises ConfigError for an unknown preset (with the nearest name and the list) and for a Hugging Face model that cannot
    be expressed or that the other keys contradict, and pydantic's ValidationError, also a ValueError, for unknown
    fields, values of a wrong type, and missing fields when there is no preset.
    """
    name = raw.get("preset")
    if raw.get("from_hf") is not None:
        return _from_folder(raw)
    if name is None:
        return ModelConfig.model_validate(dict(raw))
    if not isinstance(name, str) or name not in PRESETS:
        near = did_you_mean(str(name).lower().replace("-", "_").replace(".", "_"), PRESETS)
        raise ConfigError(f'unknown model preset "{name}".{near} Presets: {", ".join(PRESETS)}.')
    return ModelConfig.model_validate(merge(PRESETS[name], raw))


# What continued pretraining may change of an imported model: its context, and what only training reads.
FREE_OF_IMPORT = TRAINING_ONLY | {"seq_length", "rope_theta", "rope_scaling"}


def _from_folder(raw: Mapping[str, Any]) -> ModelConfig:
    """The model of `raw["from_hf"]`. A run's saved configuration has all fields, and holds when the folder has gone."""
    folder = raw["from_hf"]
    if not isinstance(folder, str):
        return ModelConfig.model_validate(dict(raw))
    if raw.get("preset") is not None:
        raise ConfigError(f"preset {raw['preset']!r} and from_hf {folder!r} both name a model: keep one of them.")
    needed = {name for name, field in ModelConfig.model_fields.items() if field.is_required()}
    if not Path(folder).exists() and needed <= raw.keys():
        return ModelConfig.model_validate(dict(raw))
    theirs = from_huggingface(read_config(Path(folder)), folder)
    changed = ModelConfig.model_validate({**theirs.model_dump(), **raw})
    for name in raw.keys() - FREE_OF_IMPORT:
        if getattr(changed, name) != getattr(theirs, name):
            raise ConfigError(
                f"{name} is {getattr(changed, name)!r}, but the model in from_hf {folder} has {getattr(theirs, name)!r}: "
                f"leave {name} out. Free to set: {', '.join(sorted(FREE_OF_IMPORT - {'preset', 'from_hf'}))}."
            )
    return changed
