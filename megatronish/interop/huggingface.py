"""Import and export of Hugging Face models. No code of a model is executed and no pickle is opened."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatronish.checkpoint.weights import CONFIG_FILE, WEIGHTS_FILE, open_model, weights_header
from megatronish.config.huggingface import (
    CONFIG_JSON,
    FAMILIES,
    TRAINING_ONLY,
    from_huggingface,
    obstacles,
    read_config,
    to_huggingface,
)
from megatronish.config.model import ModelConfig
from megatronish.errors import UserError
from megatronish.files import sync, sync_tree, write_atomic
from megatronish.interop.safetensors_files import (
    SafetensorsFolder,
    SafetensorsWriter,
    TensorEntry,
    check_space,
    write_shards,
)
from megatronish.interop.tokenizer_files import (
    ORIGIN_FILE,
    TokenizerInfo,
    export_tokenizer,
    find_origin,
    import_tokenizer,
    special_ids,
)
from megatronish.interop.weight_names import WeightMapping
from megatronish.model.transformer import Transformer

_TIED = "head.weight"
# Buffers that older releases of transformers saved with the weights; they follow from config.json.
_BUFFERS = ("rotary_emb.inv_freq", "attention.bias", "attention.masked_bias")
_STAMPS = frozenset({"torch_dtype", "dtype", "transformers_version", "_name_or_path"})
Progress = Callable[[int, int], None]  # bytes just converted, total bytes


class HuggingFaceWeights:
    """The weights of a Hugging Face folder by our parameter names, one tensor at a time.

    config: the model of the folder (default: that of its config.json; `seq_length` and fields that only training reads
    may differ). Raises UserError, before any weight is read, for missing or truncated files, pickles, tensors that are
    missing, unexpected or of another shape, and for unsupported models.
    """

    def __init__(self, folder: str | Path, config: ModelConfig | None = None) -> None:
        self.folder = Path(folder)
        raw = read_config(self.folder)
        own = from_huggingface(raw, str(self.folder / CONFIG_JSON))
        self.model_type: str = raw["model_type"]
        self.config = config or own
        if "quantization_config" in raw:
            raise UserError(
                f"{self.folder}: quantization_config: its weights are quantized; use the unquantized model."
            )
        self._files = SafetensorsFolder(self.folder)
        if self.config.num_layers > len(self._files.entries):  # before a model of that size is created
            raise UserError(
                f"{self.folder}: {self.config.num_layers:,} layers in {CONFIG_JSON}, fewer tensors than that."
            )
        self._mapping = WeightMapping(self.config, self.model_type)
        self.shapes = parameter_shapes(self.config)
        self._check()

    @property
    def dtype(self) -> torch.dtype:
        """The widest dtype among the weights."""
        widest = None
        for entry in self._files.entries.values():
            widest = entry.dtype if widest is None else torch.promote_types(widest, entry.dtype)
        assert widest is not None, "a model without tensors was rejected"
        return widest

    def weight(self, name: str) -> Tensor:
        """The full tensor of our parameter `name`, on the CPU, as stored; a tied head is the embedding."""
        if name == _TIED and self.config.tie_embeddings:
            name = "embedding.weight"
        parts = [self._files.read(self._stored(theirs)) for theirs in self._mapping.theirs(name, self.shapes[name])]
        return self._mapping.pack(name, parts)

    def initial(self, name: str, shape: Sequence[int]) -> Tensor:
        """`weight` with the signature of `draw` of model.init.init_weights."""
        found = self.weight(name)
        assert tuple(found.shape) == tuple(shape), f"{name}: {tuple(found.shape)} stored, {tuple(shape)} wanted"
        return found

    def _stored(self, theirs: str) -> str:
        other = self._mapping.table.other_names.get(theirs)
        return other if other is not None and theirs not in self._files.entries else theirs

    def _check(self) -> None:
        expected: set[str] = set()
        for name, shape in self.shapes.items():
            for theirs, their_shape in self._mapping.theirs(name, shape).items():
                stored = self._stored(theirs)
                entry = self._files.entries.get(stored)
                if entry is None:
                    raise UserError(f"{self.folder}: has no tensor {theirs!r}, which should be {list(their_shape)}.")
                if entry.shape != their_shape:
                    raise UserError(
                        f"{self.folder}: {stored!r} is {list(entry.shape)}, but {list(their_shape)} by {CONFIG_JSON}."
                    )
                expected.add(stored)
        if self.config.tie_embeddings:  # some files contain the shared weight twice
            head = self._mapping.table.names(_TIED)[0]
            expected |= {head, self._mapping.table.other_names.get(head, head)}
        for name in self._files.entries:
            if name not in expected and not name.endswith(_BUFFERS):
                raise UserError(f"{self.folder}: holds {name!r}, a tensor that {CONFIG_JSON} does not account for.")


def parameter_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Shapes of the parameters of a model by name, without a tied head."""
    with torch.device("meta"):
        return {name: tuple(tensor.shape) for name, tensor in Transformer(config, seed=None).named_parameters()}


@dataclass(frozen=True)
class ConvertedModel:
    """Result of an import or export."""

    folder: Path
    config: ModelConfig
    model_type: str
    parameters: int
    dtype: torch.dtype
    files: list[str]
    tokenizer: TokenizerInfo


def import_model(
    source: Path, target: Path, *, dtype: torch.dtype | None = None, progress: Progress = lambda done, total: None
) -> ConvertedModel:
    """Write the Hugging Face model in `source` as a folder of ours: weights, configuration, tokenizer.

    dtype: of the weights (as stored by default, the widest where they differ). `target` must be new or empty, and is
    created only when everything is written. Needs memory for one tensor. Raises UserError.
    """
    weights = HuggingFaceWeights(source)
    kind = dtype or weights.dtype
    entries = {name: TensorEntry(shape, kind) for name, shape in weights.shapes.items()}
    total = sum(entry.size for entry in entries.values())
    with new_folder(target, total) as folder:
        tokenizer = import_tokenizer(source, folder)
        with SafetensorsWriter(folder / WEIGHTS_FILE, entries, weights_header(weights.config)) as writer:
            for name, entry in entries.items():
                writer.write(name, weights.weight(name))
                progress(entry.size, total)
        write_atomic(folder / CONFIG_FILE, weights.config.model_dump_json(indent=2) + "\n")
    parameters = sum(torch.Size(entry.shape).numel() for entry in entries.values())
    return ConvertedModel(target, weights.config, weights.model_type, parameters, kind, [WEIGHTS_FILE], tokenizer)


def export_model(
    source: Path,
    target: Path,
    *,
    model_type: str | None = None,
    dtype: torch.dtype | None = None,
    max_shard_bytes: int = 5_000_000_000,
    progress: Progress = lambda done, total: None,
) -> ConvertedModel:
    """Write the model in `source` (a checkpoint, or a folder that `import_model` made) as a Hugging Face folder.

    model_type: the architecture (by default that of the model it was imported from, else the first that expresses it).
    dtype: of the weights (as saved by default). Otherwise as `import_model`.
    """
    with open_model(source) as (config, _):
        pass  # checked
    stored = SafetensorsFolder(source)
    origin = find_origin(source)
    raw = _their_config(config, model_type, origin.config)
    mapping, shapes = WeightMapping(config, raw["model_type"]), parameter_shapes(config)
    kind = dtype or stored.entries["embedding.weight"].dtype
    entries = {
        theirs: TensorEntry(part, kind)
        for name, shape in shapes.items()
        for theirs, part in mapping.theirs(name, shape).items()
    }
    total = sum(entry.size for entry in entries.values())

    def tensors() -> Iterator[tuple[str, Tensor]]:
        for name, shape in shapes.items():
            yield from zip(mapping.theirs(name, shape), mapping.unpack(name, stored.read(name)), strict=True)

    with new_folder(target, total) as folder:
        tokenizer = export_tokenizer(source, folder, origin, config.seq_length)
        raw |= special_ids(origin, tokenizer) | {"torch_dtype": str(kind).removeprefix("torch."), "use_cache": True}
        write_atomic(folder / CONFIG_JSON, json.dumps(raw, indent=2) + "\n")
        files = write_shards(folder, entries, tensors(), max_shard_bytes, lambda size: progress(size, total))
    parameters = sum(torch.Size(entry.shape).numel() for entry in entries.values())
    return ConvertedModel(target, config, raw["model_type"], parameters, kind, files, tokenizer)


def _their_config(config: ModelConfig, model_type: str | None, origin: Mapping[str, Any]) -> dict[str, Any]:
    """config.json of `config`: of the given architecture, else that of the imported model, unchanged where it still applies."""
    before = origin.get("model_type")
    if isinstance(before, str) and before in FAMILIES and model_type in (None, before):
        own = from_huggingface(origin, ORIGIN_FILE)
        if own.model_dump(exclude=set(TRAINING_ONLY)) == config.model_dump(exclude=set(TRAINING_ONLY)):
            return {name: value for name, value in origin.items() if name not in _STAMPS}
        if not obstacles(config, FAMILIES[before]):
            return to_huggingface(config, before)
    return to_huggingface(config, model_type)


@contextmanager
def new_folder(target: Path, size: int) -> Iterator[Path]:
    """A temporary folder for `size` bytes, which is renamed to `target` on success and deleted on failure."""
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise UserError(f"{target}: exists and is not empty; give a new folder, or remove it first.")
    partial = target.with_name(f".{target.name}.partial")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        check_space(target.parent, size)
        if partial.exists():
            shutil.rmtree(partial)
        partial.mkdir()
        yield partial
        sync_tree(partial)
        if target.exists():
            target.rmdir()
        partial.rename(target)
        sync(target.parent)
    except OSError as error:
        raise UserError(f"{target}: cannot be written: {error.strerror or error}.") from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)
