"""Small random `transformers` models of every supported architecture, and their tensors by our names."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import (
    GemmaConfig,
    GemmaForCausalLM,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    StableLmConfig,
    StableLmForCausalLM,
    Starcoder2Config,
    Starcoder2ForCausalLM,
)

from megatronish.config.huggingface import from_huggingface
from megatronish.config.model import ModelConfig
from megatronish.interop.huggingface import parameter_shapes
from megatronish.interop.weight_names import WeightMapping

VOCAB, LAYERS, HIDDEN, HEADS, KV_HEADS, FFN, CONTEXT = 97, 3, 48, 6, 2, 80, 64
COMMON = {
    "vocab_size": VOCAB,
    "num_hidden_layers": LAYERS,
    "hidden_size": HIDDEN,
    "num_attention_heads": HEADS,
    "intermediate_size": FFN,
    "max_position_embeddings": CONTEXT,
    "attn_implementation": "eager",
    "use_cache": False,
    "pad_token_id": None,
    "bos_token_id": None,
    "eos_token_id": None,
}
GROUPED = {**COMMON, "num_key_value_heads": KV_HEADS}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 16}
PARTIAL = {"rope_type": "default", "rope_theta": 10000.0}


def _llama(**extra: Any) -> PreTrainedModel:
    return LlamaForCausalLM(LlamaConfig(**GROUPED, rms_norm_eps=1e-5, **extra))


def _qwen3(**extra: Any) -> PreTrainedModel:
    return Qwen3ForCausalLM(Qwen3Config(**GROUPED, head_dim=16, tie_word_embeddings=True, **extra))


def _neox(**extra: Any) -> PreTrainedModel:
    return GPTNeoXForCausalLM(GPTNeoXConfig(**COMMON, **extra))


# Windows are much shorter than the sequences of the tests.
MODELS: dict[str, Callable[[], PreTrainedModel]] = {
    "llama": _llama,
    "llama_tied": lambda: _llama(tie_word_embeddings=True),
    "llama3_scaled": lambda: _llama(rope_parameters=LLAMA3),
    "llama_yarn_biases": lambda: _llama(rope_parameters=YARN, attention_bias=True, mlp_bias=True, hidden_act="gelu"),
    "mistral": lambda: MistralForCausalLM(MistralConfig(**GROUPED, sliding_window=7)),
    "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**GROUPED, tie_word_embeddings=True)),
    "qwen3": _qwen3,
    "qwen3_windows": lambda: _qwen3(
        use_sliding_window=True,
        sliding_window=7,
        layer_types=["sliding_attention", "full_attention", "sliding_attention"],
    ),
    "phi3": lambda: Phi3ForCausalLM(
        Phi3Config(**GROUPED, sliding_window=9, rope_parameters={**PARTIAL, "partial_rotary_factor": 0.5})
    ),
    "gpt_neox": lambda: _neox(rope_parameters={**PARTIAL, "partial_rotary_factor": 0.5}),
    "gpt_neox_serial": lambda: _neox(use_parallel_residual=False, hidden_act="gelu_new", attention_bias=False),
    "starcoder2": lambda: Starcoder2ForCausalLM(Starcoder2Config(**GROUPED, sliding_window=11)),
    "gemma": lambda: GemmaForCausalLM(GemmaConfig(**{**GROUPED, "num_key_value_heads": 1}, head_dim=16)),
    "stablelm": lambda: StableLmForCausalLM(
        StableLmConfig(
            **GROUPED,
            use_parallel_residual=True,
            use_qkv_bias=True,
            rope_parameters={**PARTIAL, "partial_rotary_factor": 0.5},
        )
    ),
}


def build(name: str) -> PreTrainedModel:
    """The model with weights large enough that every part of it, including norms and biases, changes the logits."""
    model = MODELS[name]()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(1 + 0.3 * noise if parameter.ndim == 1 else 0.2 * noise)
    return model.eval()


def our_config(model: PreTrainedModel) -> ModelConfig:
    """The ModelConfig that an import of `model` would give."""
    raw = json.loads(model.config.to_json_string())
    return from_huggingface(raw, "test")


def our_tensors(model: PreTrainedModel, tensors: Mapping[str, Tensor | None]) -> dict[str, Tensor]:
    """Tensors of `model` (weights, or gradients) by our names."""
    config = our_config(model)
    mapping = WeightMapping(config, model.config.model_type)
    other = mapping.table.other_names
    found = {}
    for name, shape in parameter_shapes(config).items():
        names = mapping.theirs(name, shape)
        found[name] = mapping.pack(name, [tensors[n] if n in tensors else tensors[other[n]] for n in names])
    return found
