"""Small random `transformers` models, the ModelConfig of the same model, and their tensors under our names."""

from collections.abc import Callable

import torch
from torch import Tensor
from transformers import (
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from megatronish.config.model import ModelConfig

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
OURS = {
    "vocab_size": VOCAB,
    "num_layers": LAYERS,
    "hidden_size": HIDDEN,
    "num_attention_heads": HEADS,
    "ffn_hidden_size": FFN,
    "seq_length": CONTEXT,
}
Family = tuple[PreTrainedModel, ModelConfig, Callable[[dict[str, Tensor]], dict[str, Tensor]]]


def llama(tied: bool = False, **extra: object) -> Family:
    """Llama: grouped queries, RMSNorm, SwiGLU."""
    config = LlamaConfig(**COMMON, num_key_value_heads=KV_HEADS, tie_word_embeddings=tied, rms_norm_eps=1e-5, **extra)
    ours = ModelConfig(**OURS, num_kv_heads=KV_HEADS, tie_embeddings=tied)
    return _randomised(LlamaForCausalLM(config)), ours, from_llama


def qwen3() -> Family:
    """Qwen3: QK-norm and a head width of its own."""
    config = Qwen3Config(
        **COMMON, num_key_value_heads=KV_HEADS, head_dim=16, tie_word_embeddings=True, rms_norm_eps=1e-6
    )
    ours = ModelConfig(
        **OURS, num_kv_heads=KV_HEADS, head_dim=16, tie_embeddings=True, norm_eps=1e-6, qk_norm=True, rope_theta=10000.0
    )
    config.rope_parameters = {"rope_type": "default", "rope_theta": 10000.0}
    return _randomised(Qwen3ForCausalLM(config)), ours, from_llama


def mistral(window: int = 7) -> Family:
    """Mistral: a sliding window, much shorter than the sequences of the tests."""
    config = MistralConfig(**COMMON, num_key_value_heads=KV_HEADS, sliding_window=window, rms_norm_eps=1e-5)
    ours = ModelConfig(**OURS, num_kv_heads=KV_HEADS, sliding_window=window)
    return _randomised(MistralForCausalLM(config)), ours, from_llama


def gpt_neox() -> Family:
    """GPT-NeoX: LayerNorm, GELU, biases, parallel block, half of each head rotated."""
    config = GPTNeoXConfig(**COMMON, use_parallel_residual=True, layer_norm_eps=1e-5, tie_word_embeddings=False)
    config.rope_parameters = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5}
    ours = ModelConfig(
        **OURS,
        norm="layernorm",
        activation="gelu",
        parallel_block=True,
        rope_fraction=0.5,
        attention_qkv_bias=True,
        attention_out_bias=True,
        mlp_bias=True,
    )
    return _randomised(GPTNeoXForCausalLM(config)), ours, from_gpt_neox


def _randomised(model: PreTrainedModel) -> PreTrainedModel:
    """Weights large enough that every part of the model matters, norms and biases among them."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(1 + 0.3 * noise if parameter.ndim == 1 else 0.2 * noise)
    return model.eval()


def from_llama(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Tensors (weights, or gradients) of a Llama, Qwen3 or Mistral under our names."""
    ours = {"embedding.weight": state["model.embed_tokens.weight"], "final_norm.weight": state["model.norm.weight"]}
    if "lm_head.weight" in state:
        ours["head.weight"] = state["lm_head.weight"]
    for i in range(LAYERS):
        theirs, block = f"model.layers.{i}.", f"blocks.{i}."
        ours[block + "attention_norm.weight"] = state[theirs + "input_layernorm.weight"]
        ours[block + "mlp_norm.weight"] = state[theirs + "post_attention_layernorm.weight"]
        qkv = [state[f"{theirs}self_attn.{part}_proj.weight"] for part in "qkv"]
        ours[block + "attention.qkv.weight"] = torch.cat(qkv)
        ours[block + "attention.out.weight"] = state[theirs + "self_attn.o_proj.weight"]
        for part in ("q_norm", "k_norm"):
            if f"{theirs}self_attn.{part}.weight" in state:
                ours[f"{block}attention.{part}.weight"] = state[f"{theirs}self_attn.{part}.weight"]
        gate_up = [state[f"{theirs}mlp.{part}_proj.weight"] for part in ("gate", "up")]
        ours[block + "mlp.up.weight"] = torch.cat(gate_up)
        ours[block + "mlp.down.weight"] = state[theirs + "mlp.down_proj.weight"]
    return ours


def from_gpt_neox(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Tensors of a GPT-NeoX under our names; its packed projection goes head by head: q, k, v of head 0, of head 1 ..."""
    head = "embed_out.weight" if "embed_out.weight" in state else "lm_head.weight"  # renamed in transformers 5
    ours = {"embedding.weight": state["gpt_neox.embed_in.weight"], "head.weight": state[head]}
    parts = {
        "attention_norm": "input_layernorm",
        "mlp_norm": "post_attention_layernorm",
        "attention.out": "attention.dense",
        "mlp.up": "mlp.dense_h_to_4h",
        "mlp.down": "mlp.dense_4h_to_h",
    }
    for kind in ("weight", "bias"):
        ours[f"final_norm.{kind}"] = state[f"gpt_neox.final_layer_norm.{kind}"]
        for i in range(LAYERS):
            theirs, block = f"gpt_neox.layers.{i}.", f"blocks.{i}."
            for name, their_name in parts.items():
                ours[f"{block}{name}.{kind}"] = state[f"{theirs}{their_name}.{kind}"]
            packed = state[f"{theirs}attention.query_key_value.{kind}"]
            by_head = packed.view(HEADS, 3, HIDDEN // HEADS, *packed.shape[1:])
            ours[f"{block}attention.qkv.{kind}"] = by_head.transpose(0, 1).flatten(0, 2)
    return ours
