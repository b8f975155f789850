"""Names and row order of our parameters in Hugging Face models, for conversion in both directions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType

import torch
from torch import Tensor

from megatronish.config.huggingface import FAMILIES
from megatronish.config.model import ModelConfig

Names = str | tuple[str, ...]


@dataclass(frozen=True)
class WeightNames:
    """Maps our modules to those of an architecture; the modules of a tuple are concatenated in one of ours.

    outside: modules of the model; inside: modules of a block, below `layers`. by_head: the packed projection is ordered
    [q; k; v] of each head. other_names: alternative names of tensors in some releases of transformers.
    """

    layers: str
    outside: Mapping[str, str]
    inside: Mapping[str, Names]
    by_head: bool = False
    other_names: Mapping[str, str] = field(default_factory=dict)

    def names(self, ours: str) -> tuple[str, ...]:
        """Their names for our parameter."""
        module, _, kind = ours.rpartition(".")
        if module in self.outside:
            return (f"{self.outside[module]}.{kind}",)
        _, layer, inner = module.split(".", 2)
        theirs = self.inside[inner]
        parts = (theirs,) if isinstance(theirs, str) else theirs
        return tuple(f"{self.layers}.{layer}.{part}.{kind}" for part in parts)


_OUTSIDE = {"embedding": "model.embed_tokens", "final_norm": "model.norm", "head": "lm_head"}
_NORMS: dict[str, Names] = {"attention_norm": "input_layernorm", "mlp_norm": "post_attention_layernorm"}
_ATTENTION: dict[str, Names] = {
    "attention.qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "attention.q_norm": "self_attn.q_norm",
    "attention.k_norm": "self_attn.k_norm",
    "attention.out": "self_attn.o_proj",
}
_GATED_MLP: dict[str, Names] = {"mlp.up": ("mlp.gate_proj", "mlp.up_proj"), "mlp.down": "mlp.down_proj"}
_LLAMA = WeightNames("model.layers", _OUTSIDE, {**_NORMS, **_ATTENTION, **_GATED_MLP})
_PHI3 = WeightNames(
    "model.layers",
    _OUTSIDE,
    {
        **_NORMS,
        "attention.qkv": "self_attn.qkv_proj",
        "attention.out": "self_attn.o_proj",
        "mlp.up": "mlp.gate_up_proj",
        "mlp.down": "mlp.down_proj",
    },
)
_STARCODER2 = WeightNames(
    "model.layers", _OUTSIDE, {**_NORMS, **_ATTENTION, "mlp.up": "mlp.c_fc", "mlp.down": "mlp.c_proj"}
)
_GPT_NEOX = WeightNames(
    "gpt_neox.layers",
    {"embedding": "gpt_neox.embed_in", "final_norm": "gpt_neox.final_layer_norm", "head": "embed_out"},
    {
        **_NORMS,
        "attention.qkv": "attention.query_key_value",
        "attention.out": "attention.dense",
        "mlp.up": "mlp.dense_h_to_4h",
        "mlp.down": "mlp.dense_4h_to_h",
    },
    by_head=True,
    other_names={"embed_out.weight": "lm_head.weight"},
)
WEIGHT_NAMES: Mapping[str, WeightNames] = MappingProxyType(
    {name: _LLAMA for name in FAMILIES} | {"gpt_neox": _GPT_NEOX, "phi3": _PHI3, "starcoder2": _STARCODER2}
)


class WeightMapping:
    """Converts the parameters of one model from and to the architecture `model_type`."""

    def __init__(self, config: ModelConfig, model_type: str) -> None:
        self.config = config
        self.table = WEIGHT_NAMES[model_type]
        d = config.resolved_head_dim
        self._qkv_rows = [
            n * d for n in (config.num_attention_heads, config.resolved_kv_heads, config.resolved_kv_heads)
        ]

    def theirs(self, name: str, shape: Sequence[int]) -> dict[str, tuple[int, ...]]:
        """Their names and shapes for our parameter, in the order of our rows."""
        names = self.table.names(name)
        if len(names) == 1:
            return {names[0]: tuple(shape)}
        rows = self._qkv_rows if len(names) == 3 else [shape[0] // len(names)] * len(names)
        return {part: (count, *shape[1:]) for part, count in zip(names, rows, strict=True)}

    def pack(self, name: str, parts: Sequence[Tensor]) -> Tensor:
        """Our parameter, from their tensors."""
        packed = parts[0] if len(parts) == 1 else torch.cat(list(parts))
        if self.table.by_head and ".attention.qkv." in name:
            by_head = packed.view(self.config.num_attention_heads, 3, -1, *packed.shape[1:])
            return by_head.transpose(0, 1).flatten(0, 2)
        return packed

    def unpack(self, name: str, tensor: Tensor) -> list[Tensor]:
        """Their tensors, from our parameter; interleaved rotary pairs become the two halves of a head."""
        config, rotated = self.config, self.config.rotary_dim
        if config.rope_interleaved and rotated:
            if name.endswith(("q_norm.weight", "k_norm.weight", "q_norm.bias", "k_norm.bias")):
                tensor = _halves(tensor[None], rotated)[0]
            elif ".attention.qkv." in name:
                q, k, v = tensor.split(self._qkv_rows)
                d = config.resolved_head_dim
                q, k = (_halves(x.view(-1, d, *x.shape[1:]), rotated).flatten(0, 1) for x in (q, k))
                tensor = torch.cat((q, k, v))
        if self.table.by_head and ".attention.qkv." in name:
            by_part = tensor.view(3, config.num_attention_heads, -1, *tensor.shape[1:])
            return [by_part.transpose(0, 1).flatten(0, 2)]
        parts = self.theirs(name, tensor.shape)
        return list(tensor.split([shape[0] for shape in parts.values()]))


def _halves(heads: Tensor, rotated: int) -> Tensor:
    """heads [heads, d, ...] with the first `rotated` channels reordered: the even ones, then the odd ones."""
    turned = heads[:, :rotated]
    return torch.cat((turned[:, 0::2], turned[:, 1::2], heads[:, rotated:]), dim=1)
