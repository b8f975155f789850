"""Models in Hugging Face's form: read into ours, and written from ours. No code of a model runs, no pickle is opened."""

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
from megatronish.interop.shards import Entry, ShardedFolder, TensorFileWriter, check_space, write_shards
from megatronish.interop.tokenizer_files import (
    ORIGIN_FILE,
    Carried,
    carry_tokenizer,
    find_origin,
    special_ids,
    write_tokenizer,
)
from megatronish.interop.weight_names import Layout
from megatronish.model.transformer import Transformer

_TIED = "head.weight"
# Buffers that older releases of transformers saved with the weights; they follow from config.json.
_BUFFERS = ("rotary_emb.inv_freq", "attention.bias", "attention.masked_bias")
_STAMPS = frozenset({"torch_dtype", "dtype", "transformers_version", "_name_or_path"})
Progress = Callable[[int, int], None]  # bytes just done, bytes of all


class HuggingFaceWeights:
    """The weights of a Hugging Face folder under our names, one whole tensor at a time.

    config: the model of the folder (by default as its config.json says; `seq_length` and what only training reads may
    differ). Raises UserError, before any weight is read, for missing or truncated files, pickles, tensors that are
    missing, left over or of another shape, and for models that cannot be expressed.
    """

    def __init__(self, folder: str | Path, config: ModelConfig | None = None) -> None:
        self.folder = Path(folder)
        raw = read_config(self.folder)
        own = from_huggingface(raw, str(self.folder / CONFIG_JSON))
        self.model_type: str = raw["model_type"]
        self.config = config or own
        if "quantization_config" in raw:
            raise UserError(
                f"{self.folder}: quantization_config: its weights are quantised; take the unquantised model."
            )
        self._files = ShardedFolder(self.folder)
        if self.config.num_layers > len(self._files.entries):  # before a model of that size is thought up
            raise UserError(
                f"{self.folder}: {self.config.num_layers:,} layers in {CONFIG_JSON}, fewer tensors than that."
            )
        self._layout = Layout(self.config, self.model_type)
        self.shapes = parameter_shapes(self.config)
        self._check()

    @property
    def dtype(self) -> torch.dtype:
        """The widest dtype among the weights."""
        widest = None
        for entry in self._files.entries.values():
            widest = entry.dtype if widest is None else torch.promote_types(widest, entry.dtype)
        assert widest is not None, "a model without tensors was refused"
        return widest

    def weight(self, name: str) -> Tensor:
        """Our parameter `name`, whole, on the CPU, as stored; a tied head is the embedding."""
        if name == _TIED and self.config.tie_embeddings:
            name = "embedding.weight"
        parts = [self._files.read(self._stored(theirs)) for theirs in self._layout.theirs(name, self.shapes[name])]
        return self._layout.pack(name, parts)

    def initial(self, name: str, shape: Sequence[int]) -> Tensor:
        """`weight` in the form that model.init.init_weights draws from."""
        found = self.weight(name)
        assert tuple(found.shape) == tuple(shape), f"{name}: {tuple(found.shape)} stored, {tuple(shape)} wanted"
        return found

    def close(self) -> None:
        """Let go of the files."""
        self._files.close()

    def _stored(self, theirs: str) -> str:
        other = self._layout.table.other_names.get(theirs)
        return other if other is not None and theirs not in self._files.entries else theirs

    def _check(self) -> None:
        expected: set[str] = set()
        for name, shape in self.shapes.items():
            for theirs, their_shape in self._layout.theirs(name, shape).items():
                stored = self._stored(theirs)
                entry = self._files.entries.get(stored)
                if entry is None:
                    raise UserError(f"{self.folder}: has no tensor {theirs!r}, which should be {list(their_shape)}.")
                if entry.shape != their_shape:
                    raise UserError(
                        f"{self.folder}: {stored!r} is {list(entry.shape)}, {CONFIG_JSON} says {list(their_shape)}."
                    )
                expected.add(stored)
        if self.config.tie_embeddings:  # some files hold the shared weight a second time
            head = self._layout.table.names(_TIED)[0]
            expected |= {head, self._layout.table.other_names.get(head, head)}
        for name in self._files.entries:
            if name not in expected and not name.endswith(_BUFFERS):
                raise UserError(f"{self.folder}: holds {name!r}, a tensor that {CONFIG_JSON} does not account for.")


def parameter_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Every parameter of a model and its shape, in the order of the model, without a tied head."""
    with torch.device("meta"):
        return {name: tuple(tensor.shape) for name, tensor in Transformer(config, seed=None).named_parameters()}


@dataclass(frozen=True)
class Converted:
    """What a conversion wrote."""

    folder: Path
    config: ModelConfig
    model_type: str
    parameters: int
    dtype: torch.dtype
    files: list[str]
    tokenizer: Carried


def import_model(
    source: Path, target: Path, *, dtype: torch.dtype | None = None, progress: Progress = lambda done, total: None
) -> Converted:
    """Write the Hugging Face model in `source` as a folder of ours: weights, configuration, tokenizer.

    dtype: of the weights (as stored by default, the widest where they differ). `target` appears whole or not at all, and
    must be new or empty. Memory: one tensor. Raises UserError.
    """
    weights = HuggingFaceWeights(source)
    kind = dtype or weights.dtype
    entries = {name: Entry(shape, kind) for name, shape in weights.shapes.items()}
    total = sum(entry.size for entry in entries.values())
    with new_folder(target, total) as folder:
        carried = carry_tokenizer(source, folder)
        writer = TensorFileWriter(folder / WEIGHTS_FILE, entries, weights_header(weights.config))
        complete = False
        try:
            for name, entry in entries.items():
                writer.write(name, weights.weight(name))
                progress(entry.size, total)
            complete = True
        finally:
            weights.close()
            writer.close(complete)
        write_atomic(folder / CONFIG_FILE, weights.config.model_dump_json(indent=2) + "\n")
    parameters = sum(torch.Size(entry.shape).numel() for entry in entries.values())
    return Converted(target, weights.config, weights.model_type, parameters, kind, [WEIGHTS_FILE], carried)


def export_model(
    source: Path,
    target: Path,
    *,
    model_type: str | None = None,
    dtype: torch.dtype | None = None,
    max_shard_bytes: int = 5_000_000_000,
    progress: Progress = lambda done, total: None,
) -> Converted:
    """Write the model in `source` (a checkpoint, or a folder that `import_model` made) as a Hugging Face folder.

    model_type: the architecture (by default that of the model it was imported from, else the first that expresses it).
    dtype: of the weights (as saved by default). Otherwise as `import_model`.
    """
    with open_model(source) as (config, _):
        pass  # checked
    stored = ShardedFolder(source)
    origin = find_origin(source)
    raw = _their_config(config, model_type, origin.config)
    layout, shapes = Layout(config, raw["model_type"]), parameter_shapes(config)
    kind = dtype or stored.entries["embedding.weight"].dtype
    entries = {
        theirs: Entry(part, kind)
        for name, shape in shapes.items()
        for theirs, part in layout.theirs(name, shape).items()
    }
    total = sum(entry.size for entry in entries.values())

    def tensors() -> Iterator[tuple[str, Tensor]]:
        for name, shape in shapes.items():
            yield from zip(layout.theirs(name, shape), layout.unpack(name, stored.read(name)), strict=True)

    with new_folder(target, total) as folder:
        carried = write_tokenizer(source, folder, origin, config.seq_length)
        raw |= special_ids(origin, carried) | {"torch_dtype": str(kind).removeprefix("torch."), "use_cache": True}
        write_atomic(folder / CONFIG_JSON, json.dumps(raw, indent=2) + "\n")
        files = write_shards(folder, entries, tensors(), max_shard_bytes, lambda size: progress(size, total))
    stored.close()
    parameters = sum(torch.Size(entry.shape).numel() for entry in entries.values())
    return Converted(target, config, raw["model_type"], parameters, kind, files, carried)


def _their_config(config: ModelConfig, model_type: str | None, origin: Mapping[str, Any]) -> dict[str, Any]:
    """config.json of `config`: as asked, else that of the model it came from, word for word where it still holds."""
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
    """A folder to write `size` bytes into, which becomes `target` when all is well and goes away when not."""
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
