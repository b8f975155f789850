"""Hugging Face's config.json and ModelConfig, both ways: one table of architectures, no torch.

Fields that a row of the table does not know are refused by name, so that no model is read as another one. Names and defaults are those of
transformers 4.51 to 5.23; both ways of writing rotary settings are read (`rope_theta` with `rope_scaling`, and
`rope_parameters`), and the older one is written, which all these versions read.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

from pydantic import ValidationError

from megatronish.config.base import explain
from megatronish.config.model import ModelConfig
from megatronish.errors import ConfigError

CONFIG_JSON = "config.json"
# Well-known architectures that ModelConfig cannot express, and why.
_INEXPRESSIBLE: Mapping[str, str] = MappingProxyType(
    {
        "gemma2": "attn_logit_softcapping and norms after each branch",
        "gemma3_text": "two rotary bases and norms after each branch",
        "gpt2": "positions are learned (wpe), not rotary",
        "mixtral": "num_local_experts: the feed-forward layer is a mixture of experts",
        "olmo2": "norms after each branch",
        "opt": "positions are learned",
        "qwen3_moe": "num_experts: the feed-forward layer is a mixture of experts",
        "smollm3": "no_rope_layers: some layers do not rotate",
    }
)
_NEEDED = object()  # no default: config.json must have it
_COMMON: dict[str, tuple[str, Any]] = {
    "vocab_size": ("vocab_size", _NEEDED),
    "num_hidden_layers": ("num_layers", _NEEDED),
    "hidden_size": ("hidden_size", _NEEDED),
    "num_attention_heads": ("num_attention_heads", _NEEDED),
    "intermediate_size": ("ffn_hidden_size", _NEEDED),
    "max_position_embeddings": ("seq_length", _NEEDED),
    "initializer_range": ("init_std", 0.02),
    "attention_dropout": ("attention_dropout", 0.0),
    "tie_word_embeddings": ("tie_embeddings", False),
}
_GATED = {"silu": "swiglu", "gelu": "geglu"}
_PLAIN = {"gelu": "gelu", "gelu_pytorch_tanh": "gelu_tanh", "gelu_new": "gelu_tanh", "relu": "relu"}
# Fields that do not change the logits.
_WITHOUT_EFFECT_LIST = """
    architectures model_type torch_dtype dtype transformers_version use_cache bos_token_id eos_token_id pad_token_id
    unk_token_id attn_implementation is_llama_config
    pretraining_tp transformers.js_config output_attentions output_hidden_states return_dict id2label label2id
    classifier_dropout unsloth_fixed unsloth_version tokenizer_class cache_implementation is_decoder
"""
_WITHOUT_EFFECT = frozenset(_WITHOUT_EFFECT_LIST.split())
_ROPE = frozenset({"rope_theta", "rope_scaling", "rope_parameters", "partial_rotary_factor"})
_ALL_SCALINGS = ("linear", "llama3", "yarn")
# Fields of ModelConfig that no forward pass in evaluation mode reads.
TRAINING_ONLY = frozenset(
    {
        "preset",
        "from_hf",
        "init_std",
        "init_scale_residual",
        "embedding_dropout",
        "attention_dropout",
        "residual_dropout",
    }
)
_SPECIAL_LIST = "activation head_dim rope_theta rope_fraction rope_interleaved rope_scaling sliding_window"
_SPECIAL = frozenset([*_SPECIAL_LIST.split(), "full_attention_interval"])  # handled by name below


@dataclass(frozen=True)
class Family:
    """An architecture of transformers, in our terms.

    fields: its field -> (our field or fields, its default). always: our fields that it
    fixes. only: its fields that we can express at one value, which is also the default. windows: which layers
    slide. rotated: its name for rope_fraction and the default, if it has one. theta: its name of the base.
    """

    architecture: str
    fields: Mapping[str, tuple[Any, Any]]
    always: Mapping[str, Any] = field(default_factory=dict)
    only: Mapping[str, Any] = field(default_factory=dict)
    activations: Mapping[str, str] = field(default_factory=lambda: _GATED)
    default_activation: str = "silu"
    windows: Literal["none", "all", "layers"] = "none"
    default_window: int | None = None
    rotated: tuple[str, float] | None = None
    theta: str = "rope_theta"
    scalings: tuple[str, ...] = _ALL_SCALINGS
    even_heads: bool = False  # transformers wants hidden_size divisible by the heads even if head_dim is set


_RMS = {**_COMMON, "rms_norm_eps": ("norm_eps", 1e-6), "num_key_value_heads": ("num_kv_heads", None)}
_BOTH_BIASES = (("attention_qkv_bias", "attention_out_bias"), False)

# The order in which an export looks for an architecture that expresses the model.
FAMILIES: Mapping[str, Family] = MappingProxyType(
    {
        "llama": Family(
            "LlamaForCausalLM",
            {
                **_RMS,
                "head_dim": ("head_dim", None),
                "attention_bias": _BOTH_BIASES,
                "mlp_bias": ("mlp_bias", False),
            },
            only={"rope_interleaved": False},
            even_heads=True,
        ),
        "mistral": Family(
            "MistralForCausalLM",
            {
                **_RMS,
                "num_key_value_heads": ("num_kv_heads", 8),
                "head_dim": ("head_dim", None),
            },
            windows="all",
            default_window=4096,
        ),
        "qwen2": Family(
            "Qwen2ForCausalLM",
            {
                **_RMS,
                "num_key_value_heads": ("num_kv_heads", 32),
            },
            always={"attention_qkv_bias": True},
            only={"use_mrope": False},
            windows="layers",
        ),
        "qwen3": Family(
            "Qwen3ForCausalLM",
            {
                **_RMS,
                "num_key_value_heads": ("num_kv_heads", 32),
                "head_dim": ("head_dim", 128),
                "attention_bias": _BOTH_BIASES,
            },
            always={"qk_norm": True},
            windows="layers",
        ),
        "phi3": Family(
            "Phi3ForCausalLM",
            {
                **_RMS,
                "rms_norm_eps": ("norm_eps", 1e-5),
                "resid_pdrop": ("residual_dropout", 0.0),
                "embd_pdrop": ("embedding_dropout", 0.0),
            },
            windows="all",
            rotated=("partial_rotary_factor", 1.0),
            scalings=(),
        ),
        "gpt_neox": Family(
            "GPTNeoXForCausalLM",
            {
                **_COMMON,
                "layer_norm_eps": ("norm_eps", 1e-5),
                "use_parallel_residual": ("parallel_block", True),
                "hidden_dropout": (("residual_dropout", "embedding_dropout"), 0.0),
                "attention_bias": (("attention_qkv_bias", "attention_out_bias"), True),
            },
            always={"norm": "layernorm", "norm_bias": True, "mlp_bias": True},
            activations=_PLAIN,
            default_activation="gelu",
            rotated=("rotary_pct", 0.25),
            theta="rotary_emb_base",
        ),
        "starcoder2": Family(
            "Starcoder2ForCausalLM",
            {
                **_COMMON,
                "num_key_value_heads": ("num_kv_heads", 2),
                "norm_epsilon": ("norm_eps", 1e-5),
                "tie_word_embeddings": ("tie_embeddings", True),
                "use_bias": (("attention_qkv_bias", "attention_out_bias", "mlp_bias"), True),
                "residual_dropout": ("residual_dropout", 0.0),
                "embedding_dropout": ("embedding_dropout", 0.0),
            },
            always={"norm": "layernorm", "norm_bias": True},
            only={"mlp_type": "default", "norm_type": "layer_norm"},
            activations=_PLAIN,
            default_activation="gelu_pytorch_tanh",
            windows="all",
        ),
        "stablelm": Family(
            "StableLmForCausalLM",
            {
                **_COMMON,
                "num_key_value_heads": ("num_kv_heads", 32),
                "layer_norm_eps": ("norm_eps", 1e-5),
                "use_qkv_bias": ("attention_qkv_bias", False),
                "use_parallel_residual": (("parallel_block", "parallel_block_shared_norm"), False),
                "hidden_dropout": ("residual_dropout", 0.0),
            },
            always={"norm": "layernorm", "norm_bias": True},
            only={"qk_layernorm": False},
            rotated=("partial_rotary_factor", 0.25),
        ),
        "gemma": Family(
            "GemmaForCausalLM",
            {
                **_RMS,
                "num_key_value_heads": ("num_kv_heads", 16),
                "head_dim": ("head_dim", 256),
                "tie_word_embeddings": ("tie_embeddings", True),
                "attention_bias": _BOTH_BIASES,
            },
            always={"norm_zero_centered": True, "embedding_scaled": True},
            only={"hidden_activation": "gelu_pytorch_tanh", "use_bidirectional_attention": False},
            # What the first releases called gelu was always the approximation.
            activations={"gelu_pytorch_tanh": "geglu_tanh", "gelu": "geglu_tanh"},
            default_activation="gelu_pytorch_tanh",
        ),
    }
)


def read_config(folder: Path) -> dict[str, Any]:
    """The object in folder/config.json. Raises ConfigError when there is none."""
    path = folder / CONFIG_JSON
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        missing = "no such folder" if not folder.is_dir() else f"no {CONFIG_JSON} in it"
        raise ConfigError(
            f"{folder}: {missing}. Give the folder of a Hugging Face model: {CONFIG_JSON} and *.safetensors."
        ) from None
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: cannot be read: {error}.") from None
    if not isinstance(raw, dict):
        raise ConfigError(f"{path}: holds a {type(raw).__name__}, expected one JSON object.")
    return raw


def family_of(raw: Mapping[str, Any], place: str) -> Family:
    """The table's row for a config.json. Raises ConfigError for any other architecture, with the list."""
    kind = raw.get("model_type")
    if not isinstance(kind, str) or kind not in FAMILIES:
        why = f" ({_INEXPRESSIBLE[kind]})" if isinstance(kind, str) and kind in _INEXPRESSIBLE else ""
        raise ConfigError(f"{place}: model_type {kind!r} is not one that can be expressed{why}: {', '.join(FAMILIES)}.")
    if "auto_map" in raw:
        raise ConfigError(f"{place}: auto_map names code that comes with the model, which is never run here.")
    return FAMILIES[kind]


def from_huggingface(raw: Mapping[str, Any], place: str) -> ModelConfig:
    """The model that a config.json describes. `place` names it in messages.

    Raises ConfigError for an unknown architecture and for a field, named with its value, that changes the model in a way
    ModelConfig cannot express.
    """
    family = family_of(raw, place)
    ours: dict[str, Any] = dict(family.always)
    for name, (targets, default) in family.fields.items():
        value = raw.get(name, default)
        if value is _NEEDED:
            raise ConfigError(f'{place}: "{name}" is missing.')
        if default is _NEEDED and not (type(value) is int and value > 0):
            raise ConfigError(f"{place}: {name} is {value!r}: a positive integer is expected.")
        for target in (targets,) if isinstance(targets, str) else targets:
            ours[target] = value
    for name, value in family.only.items():
        if raw.get(name) not in (value, None):
            raise _inexpressible(place, name, raw[name], f"only {value!r} can be expressed")
    act = raw.get("hidden_act", family.default_activation)
    if not isinstance(act, str) or act not in family.activations:
        raise _inexpressible(place, "hidden_act", act, f"expressible: {', '.join(family.activations)}")
    ours["activation"] = family.activations[act]
    ours["num_kv_heads"] = ours.get("num_kv_heads") or ours["num_attention_heads"]
    ours["head_dim"] = _head_dim(ours, raw, family, place)
    ours |= _windows(raw, family, ours["num_layers"], place)
    ours |= _rotation(raw, family, place)
    known = _known_fields(family)
    for name, value in raw.items():
        if name not in known and not name.startswith("_") and value not in (None, False, [], {}):
            why = f"{family.architecture} of our table knows no such field; remove it if it has no effect"
            raise _inexpressible(place, name, value, why)
    try:
        return ModelConfig.model_validate(ours)
    except ValidationError as error:
        raise explain(error, ModelConfig, place, "model") from None


def _known_fields(family: Family) -> set[str]:
    known = {*family.fields, *family.only, "hidden_act", "head_dim", *_ROPE, *_WITHOUT_EFFECT, family.theta}
    if family.rotated:
        known.add(family.rotated[0])
    if not family.scalings:
        known.add("original_max_position_embeddings")  # of a scaling, and those are refused
    if family.windows != "none":
        known |= {"sliding_window", "layer_types"}
    if family.windows == "layers":
        known |= {"use_sliding_window", "max_window_layers"}
    return known


def _inexpressible(place: str, name: str, value: Any, why: str) -> ConfigError:
    return ConfigError(f"{place}: {name} is {value!r}: {why}.")


def _head_dim(ours: Mapping[str, Any], raw: Mapping[str, Any], family: Family, place: str) -> int:
    width: int = ours.get("head_dim") or ours["hidden_size"] // ours["num_attention_heads"]
    if "head_dim" not in family.fields and raw.get("head_dim", width) not in (width, None):
        raise _inexpressible(place, "head_dim", raw["head_dim"], f"this architecture has {width}")
    return width


def _windows(raw: Mapping[str, Any], family: Family, layers: int, place: str) -> dict[str, Any]:
    """sliding_window and full_attention_interval."""
    if family.windows == "none":
        return {}
    window = raw.get("sliding_window", family.default_window)
    slides = [window is not None] * layers
    if family.windows == "layers":
        if not raw.get("use_sliding_window", False):
            window = None
        first = raw.get("max_window_layers", 28)
        if type(first) is not int:
            raise _inexpressible(place, "max_window_layers", first, "an integer is expected")
        slides = [window is not None and layer >= first for layer in range(layers)]
    kinds = raw.get("layer_types")
    if kinds is not None:
        meant = {"sliding_attention": True, "full_attention": False}
        typed = [meant.get(str(kind)) for kind in kinds] if isinstance(kinds, list) else []
        if None in typed or len(typed) != layers or (window is None and any(typed)):
            raise _inexpressible(place, "layer_types", kinds, f"expected {layers} of {', '.join(meant)}, and a window")
        if family.windows == "all" and typed != slides:
            raise _inexpressible(place, "layer_types", kinds, f"{family.architecture} has one window for all layers")
        slides = [bool(kind) for kind in typed]
    if not any(slides):
        return {}
    if all(slides):
        return {"sliding_window": window}
    interval = slides.index(False) + 1
    if slides != [(layer + 1) % interval != 0 for layer in range(layers)]:
        name = "max_window_layers" if kinds is None else "layer_types"
        raise _inexpressible(place, name, raw.get(name), "sliding layers can be all, or all but every k-th")
    return {"sliding_window": window, "full_attention_interval": interval}


def _rotation(raw: Mapping[str, Any], family: Family, place: str) -> dict[str, Any]:
    """rope_theta, rope_fraction and rope_scaling."""
    settings = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
    if not isinstance(settings, dict):
        raise _inexpressible(place, "rope_parameters", settings, "an object is expected")
    settings = dict(settings)
    theta = settings.pop("rope_theta", raw.get(family.theta, raw.get("rope_theta", 10000.0)))
    default = family.rotated[1] if family.rotated else 1.0
    names = [family.rotated[0], "partial_rotary_factor"] if family.rotated else ["partial_rotary_factor"]
    given = [settings.pop("partial_rotary_factor", None), *(raw.get(name) for name in names)]
    fraction = next((value for value in given if value is not None), default)
    if family.rotated is None and fraction != 1.0:
        raise _inexpressible(place, "partial_rotary_factor", fraction, f"{family.architecture} rotates full heads")
    kind = settings.pop("rope_type", None) or settings.pop("type", None) or "default"
    settings.pop("type", None)
    found = {"rope_theta": theta, "rope_fraction": fraction}
    if kind == "default":
        if settings:
            raise _inexpressible(place, "rope_parameters", settings, "not known for rope_type default")
        return found
    if kind not in family.scalings:
        allowed = ", ".join(("default", *family.scalings))
        raise _inexpressible(place, "rope_scaling type", kind, f"expressible for {family.architecture}: {allowed}")
    length = settings.pop("original_max_position_embeddings", None) or raw["max_position_embeddings"]
    if type(length) is not int or length < 1:
        raise _inexpressible(place, "original_max_position_embeddings", length, "a positive integer is expected")
    scaling: dict[str, Any] = {"type": kind, "factor": settings.pop("factor", None)}
    if kind == "yarn" and scaling["factor"] is None:
        scaling["factor"] = raw["max_position_embeddings"] / length
    if kind != "linear":
        scaling["original_seq_length"] = length
    for name in {"llama3": ("low_freq_factor", "high_freq_factor"), "yarn": ("beta_fast", "beta_slow")}.get(kind, ()):
        if (value := settings.pop(name, None)) is not None:
            scaling[name] = value
    if kind == "yarn" and (factor := settings.pop("attention_factor", None)) is not None:
        scaling["attention_factor"] = factor
    if settings.pop("truncate", True) is not True:
        raise _inexpressible(place, "rope_scaling truncate", False, "only true can be expressed")
    if rest := {name: value for name, value in settings.items() if value}:
        raise _inexpressible(place, "rope_scaling", rest, f"not known for {kind}")
    return {**found, "rope_scaling": scaling}


def obstacles(config: ModelConfig, family: Family) -> list[str]:
    """What `config` has that this architecture cannot express; empty if it can."""
    groups = [targets for targets, _ in family.fields.values() if not isinstance(targets, str)]
    covered = {targets for targets, _ in family.fields.values() if isinstance(targets, str)}.union(*groups)
    found = []
    for name, info in ModelConfig.model_fields.items():
        if name in covered or name in TRAINING_ONLY or name in _SPECIAL:
            continue
        value, fixed = getattr(config, name), family.always.get(name, info.default)
        if name == "num_kv_heads":
            value, fixed = config.resolved_kv_heads, config.num_attention_heads
        if value != fixed and not (name == "norm_bias" and config.norm == "rmsnorm"):
            found.append(f"{name} {value!r} (there: {fixed!r})")
    for group in groups:
        values = {name: getattr(config, name) for name in group if name not in TRAINING_ONLY}
        if len(set(values.values())) > 1:
            found.append(f"{' and '.join(f'{name} {value!r}' for name, value in values.items())} (there: the same)")
    return found + _special_obstacles(config, family)


def _special_obstacles(config: ModelConfig, family: Family) -> list[str]:
    found = []
    if config.activation not in family.activations.values():
        found.append(f"activation {config.activation!r} (there: {', '.join(family.activations.values())})")
    width, heads = config.resolved_head_dim, config.num_attention_heads
    has_width = "head_dim" in family.fields and not (family.even_heads and config.hidden_size % heads)
    if width * heads != config.hidden_size and not has_width:
        found.append(f"head_dim {width} (there: hidden_size / num_attention_heads)")
    if config.rope_fraction != 1.0 and (family.rotated is None or config.rotary_dim == 0):
        found.append(f"rope_fraction {config.rope_fraction} (there: {'above 0' if family.rotated else '1.0'})")
    scaling = config.rope_scaling
    if scaling is not None and scaling.type not in (*family.scalings, "ntk"):
        found.append(f"rope_scaling {scaling.type!r} (there: {', '.join(family.scalings) or 'none'})")
    windows = {config.layer_window(layer) for layer in range(config.num_layers)}
    if windows != {None} and (family.windows == "none" or (family.windows == "all" and len(windows) > 1)):
        kind = "none" if family.windows == "none" else "the same in every layer"
        found.append(f"sliding_window {config.sliding_window} (there: {kind})")
    return found


def to_huggingface(config: ModelConfig, model_type: str | None = None) -> dict[str, Any]:
    """A config.json of the model, as `model_type`, or as the first architecture of the table that expresses it.

    A model with rope_interleaved becomes one that rotates halves: its query and key rows have to be reordered. Raises
    ConfigError naming the fields that stand in the way.
    """
    if model_type is not None and model_type not in FAMILIES:
        raise ConfigError(f"model_type {model_type!r} is not known; there are: {', '.join(FAMILIES)}.")
    blocked = {name: obstacles(config, FAMILIES[name]) for name in ([model_type] if model_type else FAMILIES)}
    nearest = min(blocked, key=lambda name: len(blocked[name]))
    if blocked[nearest]:
        raise ConfigError(
            f"the model cannot be expressed as {'any known architecture; nearest is ' if model_type is None else ''}"
            f"{nearest}, but for {'; '.join(blocked[nearest])}."
        )
    family = FAMILIES[nearest]
    raw: dict[str, Any] = {"architectures": [family.architecture], "model_type": nearest}
    for name, (targets, _) in family.fields.items():
        raw[name] = getattr(config, targets if isinstance(targets, str) else targets[0])
    if "num_key_value_heads" in raw:
        raw["num_key_value_heads"] = config.resolved_kv_heads
    if "head_dim" in raw:
        raw["head_dim"] = config.resolved_head_dim
    raw["hidden_act"] = next(name for name, ours in family.activations.items() if ours == config.activation)
    if family.rotated:
        raw[family.rotated[0]] = config.rope_fraction
    raw |= _written_rotation(config, family)
    if family.windows == "all":
        raw["sliding_window"] = config.layer_window(0)
    if family.windows == "layers":
        windows = [config.layer_window(layer) for layer in range(config.num_layers)]
        raw["use_sliding_window"] = any(windows)
        raw["sliding_window"] = config.sliding_window if any(windows) else None
        raw["max_window_layers"] = 0 if all(windows) else config.num_layers
        raw["layer_types"] = ["sliding_attention" if window else "full_attention" for window in windows]
    return raw


def _written_rotation(config: ModelConfig, family: Family) -> dict[str, Any]:
    theta, scaling, dim = config.rope_theta, config.rope_scaling, config.rotary_dim
    if scaling is None:
        return {family.theta: theta, "rope_scaling": None}
    if scaling.type == "ntk":  # a larger base, as in model/rotary.py
        return {family.theta: theta * scaling.factor ** (dim / (dim - 2)), "rope_scaling": None}
    written: dict[str, Any] = {"rope_type": scaling.type, "factor": scaling.factor}
    if scaling.type == "llama3":
        written |= {"low_freq_factor": scaling.low_freq_factor, "high_freq_factor": scaling.high_freq_factor}
    if scaling.type == "yarn":
        written |= {"beta_fast": scaling.beta_fast, "beta_slow": scaling.beta_slow}
        if scaling.attention_factor is not None:
            written["attention_factor"] = scaling.attention_factor
    if scaling.original_seq_length is not None and scaling.type != "linear":
        written["original_max_position_embeddings"] = scaling.original_seq_length
    return {family.theta: theta, "rope_scaling": written}
