"""Export to GGUF, the format of llama.cpp: Llama-like models with byte-level BPE.

The format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. The `gguf` package, llama.cpp's own, writes it.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal, cast

import numpy as np
import torch
from torch import Tensor

from megatronish.checkpoint.weights import open_model
from megatronish.config.huggingface import FAMILIES, obstacles
from megatronish.config.model import ModelConfig
from megatronish.errors import UserError
from megatronish.files import sync
from megatronish.interop.gguf_tokenizer import add_tokenizer
from megatronish.interop.huggingface import parameter_shapes
from megatronish.interop.safetensors_files import SafetensorsFolder, check_space
from megatronish.interop.weight_names import WeightMapping
from megatronish.model.rotary import rotary_frequencies
from megatronish.ops.dtypes import DTYPES

Form = Literal["fp32", "fp16", "bf16", "q8_0"]
# model_type of Hugging Face -> architecture of llama.cpp; the first that expresses a model is used.
ARCHITECTURES: Mapping[str, str] = MappingProxyType(
    {"llama": "llama", "mistral": "llama", "qwen2": "qwen2", "qwen3": "qwen3"}
)
_Q8_BLOCK = 32  # columns that share a scale


@dataclass(frozen=True)
class GGUFExport:
    """Result of an export. size in bytes; tokenizer False: the model has none."""

    path: Path
    config: ModelConfig
    architecture: str
    size: int
    tokenizer: bool


def export_gguf(source: Path, target: Path, form: Form | None = None) -> GGUFExport:
    """Write the model in `source` (a checkpoint or an imported folder) as the file `target`, a tensor at a time.

    form: of the matrices (as saved by default); norms are fp32, as llama.cpp expects. Raises UserError, and leaves no file,
    without the gguf package, for an existing file, and for unsupported models and tokenizers, naming what is unsupported.
    """
    if importlib.util.find_spec("gguf") is None:
        raise UserError("gguf is not installed: pip install 'megatronish[gguf]'.")
    if target.exists():
        raise UserError(f"{target}: exists; give a new file, or remove it first.")
    with open_model(source) as (config, _):
        pass  # the files are checked
    model_type = _model_type(config, source)
    stored = SafetensorsFolder(source)
    form = form or _form_of(stored.entries["embedding.weight"].dtype)
    partial = target.with_name(f".{target.name}.partial")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        check_space(target.parent, sum(entry.size for entry in stored.entries.values()))
        tokenizer = _write(partial, source, config, model_type, form, stored)
        sync(partial)
        partial.rename(target)
        sync(target.parent)
    except OSError as error:
        raise UserError(f"{target}: cannot be written: {error.strerror or error}.") from None
    finally:
        partial.unlink(missing_ok=True)
    return GGUFExport(target, config, ARCHITECTURES[model_type], target.stat().st_size, tokenizer)


def _model_type(config: ModelConfig, source: Path) -> str:
    """The first architecture that expresses the model. Raises UserError with what the nearest one does not express."""
    found = {name: obstacles(config, FAMILIES[name]) + _more_obstacles(config, name) for name in ARCHITECTURES}
    nearest = min(found, key=lambda name: len(found[name]))
    if found[nearest]:
        raise UserError(f"{source}: no GGUF of it: {nearest} is nearest, but for {'; '.join(found[nearest])}.")
    return nearest


def _more_obstacles(config: ModelConfig, model_type: str) -> list[str]:
    """What Hugging Face's architecture expresses and llama.cpp's of that name does not."""
    found = []
    if config.sliding_window is not None:
        found.append(f"sliding_window {config.sliding_window} (there: none)")
    if config.activation != "swiglu":
        found.append(f"activation {config.activation!r} (there: swiglu)")
    names = ["attention_out_bias", "mlp_bias", *([] if model_type == "qwen2" else ["attention_qkv_bias"])]
    found += [f"{name} (there: none)" for name in names if getattr(config, name)]
    scaling = config.rope_scaling.type if config.rope_scaling else None
    if scaling == "yarn" or (scaling == "llama3" and ARCHITECTURES[model_type] != "llama"):
        found.append(f"rope_scaling {scaling!r}")
    return found


def _form_of(dtype: torch.dtype) -> Form:
    return cast(Form, next(name for name, known in DTYPES.items() if known == dtype))


def _write(
    path: Path, source: Path, config: ModelConfig, model_type: str, form: Form, stored: SafetensorsFolder
) -> bool:
    """Write the file; returns whether it has a tokenizer."""
    import gguf

    architecture = ARCHITECTURES[model_type]
    writer = gguf.GGUFWriter(path, architecture)
    try:
        _add_shape(writer, config, form)
        has_tokenizer = add_tokenizer(writer, source, config.vocab_size)
        for name, shape, kind in _entries(config, model_type, form):
            size = int(np.prod(gguf.quant_shape_to_byte_shape(shape, kind)))
            writer.add_tensor_info(name, shape, np.dtype(np.float32), size, raw_dtype=kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for tensor, kind in _tensors(config, model_type, form, stored):
            writer.write_tensor_data(gguf.quants.quantize(tensor.float().numpy(), kind))
    finally:
        writer.close()
    return has_tokenizer


def _add_shape(writer: Any, config: ModelConfig, form: Form) -> None:
    """Metadata of the architecture."""
    import gguf

    d, scaling = config.resolved_head_dim, config.rope_scaling
    theta = config.rope_theta
    if scaling is not None and scaling.type == "ntk":  # a larger base, as in model/rotary.py
        theta *= scaling.factor ** (config.rotary_dim / (config.rotary_dim - 2))
    writer.add_file_type({"fp32": 0, "fp16": 1, "q8_0": 7, "bf16": 32}[form])
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(config.seq_length)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_layers)
    writer.add_feed_forward_length(config.ffn_hidden_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.resolved_kv_heads)
    writer.add_key_length(d)
    writer.add_value_length(d)
    writer.add_rope_dimension_count(d)
    writer.add_rope_freq_base(theta)
    writer.add_layer_norm_rms_eps(config.norm_eps)
    if scaling is not None and scaling.type == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(scaling.factor)
    if form == "q8_0":
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)


def _entries(config: ModelConfig, model_type: str, form: Form) -> Iterator[tuple[str, tuple[int, ...], Any]]:
    """Name, shape and type of every tensor, in the order of `_tensors`."""
    import gguf

    names = gguf.get_tensor_name_map(_architecture(model_type), config.num_layers)
    mapping = WeightMapping(config, model_type)
    if _frequency_factors(config) is not None:
        yield "rope_freqs.weight", (config.rotary_dim // 2,), gguf.GGMLQuantizationType.F32
    for ours, shape in parameter_shapes(config).items():
        for theirs, part in mapping.theirs(ours, shape).items():
            name = names.get_name(theirs, try_suffixes=(".weight", ".bias"))
            assert name is not None, f"{theirs} has no name in GGUF"
            yield name, part, _kind(part, form)


def _tensors(
    config: ModelConfig, model_type: str, form: Form, stored: SafetensorsFolder
) -> Iterator[tuple[Tensor, Any]]:
    """Every tensor and its type. The rotary pairs of query and key heads are interleaved in the architecture llama."""
    import gguf

    mapping = WeightMapping(config, model_type)
    factors = _frequency_factors(config)
    if factors is not None:
        yield factors, gguf.GGMLQuantizationType.F32
    for ours, shape in parameter_shapes(config).items():
        for theirs, tensor in zip(mapping.theirs(ours, shape), mapping.unpack(ours, stored.read(ours)), strict=True):
            if ARCHITECTURES[model_type] == "llama" and theirs.endswith(("q_proj.weight", "k_proj.weight")):
                halves = tensor.view(-1, 2, config.resolved_head_dim // 2, tensor.shape[1])
                tensor = halves.transpose(1, 2).reshape(tensor.shape)
            yield tensor, _kind(tuple(tensor.shape), form)


def _kind(shape: tuple[int, ...], form: Form) -> Any:
    import gguf

    kinds = gguf.GGMLQuantizationType
    if len(shape) == 1 or (form == "q8_0" and shape[-1] % _Q8_BLOCK):
        return kinds.F32
    return {"fp32": kinds.F32, "fp16": kinds.F16, "bf16": kinds.BF16, "q8_0": kinds.Q8_0}[form]


def _architecture(model_type: str) -> Any:
    import gguf

    return next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == ARCHITECTURES[model_type])


def _frequency_factors(config: ModelConfig) -> Tensor | None:
    """Divisors of the rotary frequencies, fp32 [rotary_dim / 2]; None where metadata expresses the scaling."""
    if config.rope_scaling is None or config.rope_scaling.type != "llama3":
        return None
    scaled, _ = rotary_frequencies(config)
    plain, _ = rotary_frequencies(config.model_copy(update={"rope_scaling": None}))
    return (plain / scaled).float()
