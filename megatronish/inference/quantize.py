"""Weight-only quantization to 8 or 4 bits for inference; activations and sums keep their dtype.

int8: one scale per row of a matrix. int4: a scale and a minimum per group of a row, clipped where that reduces the squared
error; embedding and head, and matrices whose rows are not divisible into groups, are int8. Decoding is bound by the bytes
of weights that it reads for each token.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from megatronish.checkpoint.paths import run_folder
from megatronish.checkpoint.store import CheckpointStore
from megatronish.checkpoint.weights import CONFIG_FILE, WEIGHTS_FILE, load_config
from megatronish.errors import UserError
from megatronish.files import replacing, write_atomic
from megatronish.model.transformer import Transformer
from megatronish.ops.linear import few_rows, rows_product

Format = Literal["int8", "int4"]
QUANTIZATION_FILE = "quantization.json"
GROUPS = (32, 64, 128)
_BLOCK = 32  # values packed together: 16 bytes whose low halves are values 0 to 15 and high halves 16 to 31
_SHRINK = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75)  # fractions of a group's range that are tried


def to_int8(weight: Tensor) -> tuple[Tensor, Tensor]:
    """weight [n, k] -> codes int8 [n, k] and scales fp32 [n], weight = codes * scales within half a scale."""
    wide = weight.float()
    scales = wide.abs().amax(1).clamp(min=torch.finfo(torch.float32).tiny) / 127
    return (wide / scales[:, None]).round_().to(torch.int8), scales


def to_int4(weight: Tensor, group: int) -> tuple[Tensor, Tensor]:
    """weight [n, k] -> packed codes uint8 [n, k / 2] and ranges bf16 [n, k / group, 2] (scale, minimum)."""
    wide = weight.float().unflatten(1, (-1, group))
    low, high = wide.amin(2), wide.amax(2)
    middle, best = (low + high) / 2, torch.full_like(low, torch.inf)
    codes, ranges = torch.zeros_like(wide), torch.zeros(*low.shape, 2, dtype=torch.bfloat16, device=weight.device)
    for shrink in _SHRINK:
        tried = torch.stack(((high - low) * shrink / 15, middle - (high - low) * shrink / 2), -1).to(torch.bfloat16)
        scale, start = tried.float()[..., :1], tried.float()[..., 1:]
        found = ((wide - start) / scale.clamp(min=torch.finfo(torch.float32).tiny)).round_().clamp_(0, 15)
        error = (found * scale + start - wide).square().sum(2)
        better = error < best
        best = torch.where(better, error, best)
        codes = torch.where(better[..., None], found, codes)
        ranges = torch.where(better[..., None], tried, ranges)
    blocks = codes.to(torch.uint8).view(len(weight), -1, 2, _BLOCK // 2)
    return (blocks[:, :, 0] | blocks[:, :, 1] << 4).flatten(1), ranges


def from_int4(codes: Tensor, ranges: Tensor) -> Tensor:
    """The dequantized weight [n, k] in fp32, from the results of `to_int4`."""
    blocks = codes.unflatten(1, (-1, _BLOCK // 2))
    values = torch.stack((blocks & 15, blocks >> 4), 2).view(len(codes), ranges.shape[1], -1)
    wide = ranges.float()
    return (values * wide[..., :1] + wide[..., 1:]).flatten(1)


class Int8Linear(nn.Module):
    """x weight^T + bias, the weight [out, in] quantized to int8 [out, in] with scales [out]."""

    codes: Tensor
    scales: Tensor

    def __init__(self, weight: Tensor, bias: nn.Parameter | None = None) -> None:
        super().__init__()
        codes, scales = to_int8(weight)
        self.register_buffer("codes", codes)
        self.register_buffer("scales", scales)
        self.bias = bias

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in] -> [..., out]."""
        if few_rows(x):
            return rows_product(torch.ops.megatronish.linear_rows_int8, x, self.codes, self.scales, bias=self.bias)
        # Scale the sums and not the weight, whose codes are exact in every dtype.
        y = F.linear(x, self.codes.to(x.dtype)) * self.scales.to(x.dtype)
        return y if self.bias is None else y + self.bias


class Int4Linear(nn.Module):
    """x weight^T + bias, the weight [out, in] quantized to 4 bits with a scale and a minimum per group."""

    codes: Tensor
    ranges: Tensor

    def __init__(self, weight: Tensor, group: int, bias: nn.Parameter | None = None) -> None:
        super().__init__()
        codes, ranges = to_int4(weight, group)
        self.register_buffer("codes", codes)
        self.register_buffer("ranges", ranges)
        self.bias = bias

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in] -> [..., out]."""
        if few_rows(x):
            return rows_product(torch.ops.megatronish.linear_rows_int4, x, self.codes, self.ranges, bias=self.bias)
        return F.linear(x, from_int4(self.codes, self.ranges).to(x.dtype), self.bias)


class Int8Embedding(nn.Module):
    """Rows of an int8 table [V, hidden] with scales [V], dequantized to `dtype`."""

    codes: Tensor
    scales: Tensor

    def __init__(self, codes: Tensor, scales: Tensor, dtype: torch.dtype) -> None:
        super().__init__()
        self.register_buffer("codes", codes)
        self.register_buffer("scales", scales)
        self.dtype = dtype

    def forward(self, tokens: Tensor) -> Tensor:
        """tokens [b, s] -> [b, s, hidden]."""
        return (self.codes[tokens] * self.scales[tokens].unsqueeze(-1)).to(self.dtype)


@torch.no_grad()
def quantize_model(model: Transformer, form: Format, group: int = 64) -> Transformer:
    """Replace the weight matrices of `model`, which may be on the meta device, in place and return it.

    group: columns that share a scale in int4. Raises UserError for an unknown group.
    """
    assert form in get_args(Format)
    if group not in GROUPS:
        raise UserError(f"group {group}: choose {', '.join(map(str, GROUPS))}")
    table, head = model.get_parameter("embedding.weight"), Int8Linear(model.get_parameter("head.weight"))
    for parent in list(model.modules()):
        for name, layer in list(parent.named_children()):
            if isinstance(layer, nn.Linear) and layer is not model.head:
                int4 = form == "int4" and layer.weight.shape[1] % group == 0
                quantized = (
                    Int4Linear(layer.weight, group, layer.bias) if int4 else Int8Linear(layer.weight, layer.bias)
                )
                setattr(parent, name, quantized)
    codes, scales = (head.codes, head.scales) if model.config.tie_embeddings else to_int8(table)
    model.head, model.embedding = head, Int8Embedding(codes, scales, table.dtype)
    return model


def stored_bytes(model: nn.Module) -> int:
    """Bytes of a model's weights, tied ones counted once."""
    tensors = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    return sum(tensor.nbytes for tensor in tensors.values())


def save_quantized(folder: Path, model: Transformer, form: Format, group: int) -> None:
    """Write the weights, the configuration and the quantization format of a quantized model into `folder`."""
    state = {name: value.cpu().contiguous() for name, value in model.state_dict().items()}
    if model.config.tie_embeddings:
        state = {name: value for name, value in state.items() if not name.startswith("embedding.")}
    folder.mkdir(parents=True, exist_ok=True)
    text = model.config.model_dump_json(indent=2)
    with replacing(folder / WEIGHTS_FILE) as partial:
        save_file(state, partial, metadata={"format": "pt", "model_config": text})
    write_atomic(folder / CONFIG_FILE, text + "\n")
    write_atomic(folder / QUANTIZATION_FILE, json.dumps({"format": form, "group": group}) + "\n")


def load_quantized(
    folder: Path, device: torch.device | str, dtype: torch.dtype | None, *, store: CheckpointStore | None = None
) -> Transformer:
    """The quantized model in `folder`, in evaluation mode; store: see `open_model`. Raises UserError for damaged files."""
    path = folder / QUANTIZATION_FILE
    (store or CheckpointStore(run_folder(folder))).verify(folder, (QUANTIZATION_FILE, WEIGHTS_FILE, CONFIG_FILE))
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        form, group = found["format"], found["group"]
        if form not in get_args(Format):
            raise ValueError(f"unknown format {form!r}")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{path}: not a quantization format ({error}): create it again with tools/quantize.py"
        ) from None
    config = load_config(folder)
    with torch.device("meta"):
        model = Transformer(config, seed=None)
    try:
        with safe_open(folder / WEIGHTS_FILE, framework="pt", device=str(device)) as file:
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # not a mapping
    except (SafetensorError, OSError) as error:
        raise UserError(
            f"{folder / WEIGHTS_FILE}: torn or missing ({error}): create it again with tools/quantize.py"
        ) from None
    with torch.device("meta"):
        quantize_model(model, form, group)
    if config.tie_embeddings:
        state |= {f"embedding.{name}": state[f"head.{name}"] for name in ("codes", "scales") if f"head.{name}" in state}
    try:
        model.load_state_dict(state, strict=True, assign=True)
    except RuntimeError as error:
        raise UserError(f"{folder}: weights and configuration are of different models: {error}") from None
    for parameter in model.parameters():  # not `model.to`, which would convert scales
        parameter.data = parameter.data.to(dtype or parameter.dtype)
    assert isinstance(model.embedding, Int8Embedding)
    model.embedding.dtype = next(model.parameters()).dtype
    return model.eval()
