"""Export to ONNX: one graph for prefill and for decoding with a key/value cache, verified in onnxruntime.

Inputs and outputs have the names and shapes of optimum's decoder graphs. Prefill is a call with a past of length 0.
"""

from __future__ import annotations

import importlib.util
import json
import logging
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from megatronish.checkpoint.weights import load_model
from megatronish.config.huggingface import CONFIG_JSON, to_huggingface
from megatronish.config.model import KernelConfig, ModelConfig
from megatronish.errors import UserError
from megatronish.interop.huggingface import new_folder
from megatronish.interop.tokenizer_files import export_tokenizer, find_origin, special_ids
from megatronish.model.attention import AttentionInputs
from megatronish.model.transformer import Transformer
from megatronish.ops.attention import attention
from megatronish.ops.dispatch import AttentionBackend

ONNX_FILE = "model.onnx"
OPSET = 18
NEEDED = ("onnx", "onnxscript")
# Largest difference of logits, relative to the largest logit, that another order of the same fp32 sums may cause.
TOLERANCE = 1e-4


class _Past:
    """A key/value cache as inputs and outputs of the graph; [b, kv_heads, tokens, d]."""

    def __init__(self, past: list[Tensor], masks: dict[int | None, Tensor]) -> None:
        self._past, self._masks = past, masks
        self.present: list[Tensor] = []

    def attend(
        self, layer: int, q: Tensor, k: Tensor, v: Tensor, window: int | None, backend: AttentionBackend
    ) -> Tensor:
        """Attention of q [b, new, heads, d] over the past and k, v [b, new, kv_heads, d]; the mask includes the window."""
        pair = [torch.cat((self._past[2 * layer + i], new.transpose(1, 2)), dim=2) for i, new in enumerate((k, v))]
        self.present += pair
        keys, values = (tensor.transpose(1, 2) for tensor in pair)
        return attention(q, keys, values, backend=backend, window=window, mask=self._masks[window])


class OnnxDecoder(nn.Module):
    """A Transformer without state: the key/value cache is an input and an output."""

    def __init__(self, model: Transformer) -> None:
        super().__init__()
        self.model = model
        config = model.config
        self.windows = [config.layer_window(layer) for layer in range(config.num_layers)]
        cos, sin = model.rotary.get(torch.device("cpu"), config.seq_length)
        self.register_buffer("cos", cos.clone())
        self.register_buffer("sin", sin.clone())

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, position_ids: Tensor, past: list[Tensor]
    ) -> tuple[Tensor, list[Tensor]]:
        """input_ids, position_ids [b, s]; attention_mask [b, past + s], 0 for padding; past: key and value of every
        layer, [b, kv_heads, past, d]. Returns logits [b, s, V] and the longer keys and values."""
        model, new = self.model, input_ids.shape[1]
        held = past[0].shape[2]
        query = torch.arange(held, held + new)[:, None]
        key = torch.arange(held + new)[None, :]
        masks = {}
        for window in dict.fromkeys(self.windows):
            reach = key <= query
            if window is not None:
                reach = reach & (key > query - window)
            # A padded token attends to itself: a row without keys would be NaN, and 0 * NaN would spread to other rows.
            masks[window] = (reach & attention_mask.bool()[:, None, None, :]) | (key == query)
        cache: Any = _Past(past, masks)
        inputs = AttentionInputs(
            self.get_buffer("cos"), self.get_buffer("sin"), position_ids, cache=cache, in_place=False
        )
        assert model.head is not None
        return model.head(model.run_blocks(model.embed(input_ids), inputs)), cache.present


@dataclass(frozen=True)
class ONNXExport:
    """Result of an export. difference: of logits in onnxruntime, relative to the largest; None if it is not installed."""

    folder: Path
    config: ModelConfig
    model_type: str | None  # of config.json, if a Hugging Face architecture expresses the model
    size: int  # bytes
    difference: float | None
    tokens: int


def cache_names(config: ModelConfig, prefix: str) -> list[str]:
    """Names of the cache's tensors in the graph: prefix "past_key_values" for inputs, "present" for outputs."""
    return [f"{prefix}.{layer}.{part}" for layer in range(config.num_layers) for part in ("key", "value")]


def export_onnx(source: Path, target: Path, dtype: torch.dtype = torch.float32) -> ONNXExport:
    """Write the model in `source` (a checkpoint or an imported folder) as target/model.onnx with its tokenizer.

    The logits of prefill and decoding are compared with ours if onnxruntime is installed. Raises UserError for missing
    packages, as `load_model` does, and if the logits differ.
    """
    if missing := [name for name in NEEDED if importlib.util.find_spec(name) is None]:
        raise UserError(f"{' and '.join(missing)} not installed: pip install 'megatronish[onnx]'.")
    kernels = KernelConfig(attention="reference", ops="reference", cross_entropy="reference")  # plain torch operations
    model = load_model(source, dtype=dtype, kernels=kernels).requires_grad_(False)
    size = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    with new_folder(target, size) as folder:
        _write_graph(model, folder / ONNX_FILE)
        difference, tokens = (None, 0)
        if importlib.util.find_spec("onnxruntime") is not None:
            difference, tokens = _compare(model, folder / ONNX_FILE)
            if not difference < TOLERANCE and dtype == torch.float32:
                raise UserError(
                    f"{source}: onnxruntime's logits differ by {difference:.1e} of the largest: not written."
                )
        model_type = _write_tokenizer_and_config(source, folder, model.config)
        written = sum(path.stat().st_size for path in folder.iterdir())
    return ONNXExport(target, model.config, model_type, written, difference, tokens)


def _example(config: ModelConfig, dtype: torch.dtype, held: int, new: int) -> tuple[Any, ...]:
    ids = torch.arange(2 * new).view(2, new) % config.vocab_size
    positions = torch.arange(held, held + new).expand(2, -1)
    shape = (2, config.resolved_kv_heads, held, config.resolved_head_dim)
    past = [torch.zeros(shape, dtype=dtype) for _ in range(2 * config.num_layers)]
    return ids, torch.ones(2, held + new, dtype=torch.int64), positions, past


def _write_graph(model: Transformer, path: Path) -> None:
    config = model.config
    batch, new, held = (torch.export.Dim(name) for name in ("batch", "sequence", "past"))
    shapes = {
        "input_ids": {0: batch, 1: new},
        "attention_mask": {0: batch, 1: torch.export.Dim.DYNAMIC},
        "position_ids": {0: batch, 1: new},
        "past": [{0: batch, 2: held}] * (2 * config.num_layers),
    }
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            OnnxDecoder(model),
            _example(config, next(model.parameters()).dtype, 5, 3),
            path,
            dynamo=True,
            dynamic_shapes=shapes,
            input_names=["input_ids", "attention_mask", "position_ids", *cache_names(config, "past_key_values")],
            output_names=["logits", *cache_names(config, "present")],
            opset_version=OPSET,
            external_data=True,
            verbose=False,
        )


@torch.no_grad()
def _compare(model: Transformer, path: Path) -> tuple[float, int]:
    """Largest difference of logits relative to the largest logit, of prefill and of decoding."""
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    config = model.config
    length = min(24, config.seq_length)
    tokens = torch.randint(config.vocab_size, (2, length), generator=torch.Generator().manual_seed(0))
    expected = model(tokens).float()
    _, _, _, past = _example(config, next(model.parameters()).dtype, 0, 1)
    cache = [tensor.numpy() for tensor in past]
    found, start = [], 0
    for new in [max(1, length - 4), *[1] * min(4, length - 1)]:
        end = start + new
        feeds = {
            "input_ids": tokens[:, start:end].numpy(),
            "attention_mask": torch.ones(2, end, dtype=torch.int64).numpy(),
            "position_ids": torch.arange(start, end).expand(2, -1).contiguous().numpy(),
            **dict(zip(cache_names(config, "past_key_values"), cache, strict=True)),
        }
        logits, *cache = session.run(None, feeds)
        found.append(torch.from_numpy(logits).float())
        start = end
    return ((torch.cat(found, 1) - expected).abs().max() / expected.abs().max()).item(), tokens.numel()


def _write_tokenizer_and_config(source: Path, folder: Path, config: ModelConfig) -> str | None:
    """Write the tokenizer and config.json; no config.json if no architecture expresses the model. Returns its model_type."""
    origin = find_origin(source)
    tokenizer = export_tokenizer(source, folder, origin, config.seq_length)
    try:
        raw = to_huggingface(config)
    except UserError:
        return None
    raw |= special_ids(origin, tokenizer)
    (folder / CONFIG_JSON).write_text(json.dumps(raw, indent=2) + "\n", encoding="utf-8")
    return str(raw["model_type"])
