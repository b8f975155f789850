"""A model in a folder: `model.safetensors` (weights by parameter name) and `model_config.json` (its ModelConfig)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from megatronish.checkpoint.paths import run_folder
from megatronish.checkpoint.store import CheckpointStore
from megatronish.config.model import KernelConfig, ModelConfig
from megatronish.errors import UserError
from megatronish.files import replacing, write_atomic
from megatronish.model.transformer import Transformer

WEIGHTS_FILE = "model.safetensors"
CONFIG_FILE = "model_config.json"
_TIED_NAME = "head.weight"


def save_model(
    folder: str | Path,
    model_state: Mapping[str, Tensor],
    config: ModelConfig,
    *,
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write weights and configuration into `folder` (made if missing).

    Each file is replaced atomically, so a reader sees the old file or the new one and never a part. The configuration is
    also in the header of the weights: `load_model` refuses a pair that does not belong together. metadata: further strings
    for the header. Raises UserError if the weights are not those of `config`, naming the first that differs.
    """
    folder = Path(folder)
    state = {name: tensor for name, tensor in model_state.items() if not (config.tie_embeddings and name == _TIED_NAME)}
    check_model_state({name: tuple(tensor.shape) for name, tensor in state.items()}, config, "the model to be saved")
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}
    with replacing(folder / WEIGHTS_FILE) as partial:
        save_file(tensors, partial, metadata=weights_header(config, metadata))
    write_atomic(folder / CONFIG_FILE, config.model_dump_json(indent=2) + "\n")


def weights_header(config: ModelConfig, metadata: Mapping[str, str] | None = None) -> dict[str, str]:
    """The metadata in the header of WEIGHTS_FILE."""
    return {**(metadata or {}), "format": "pt", "model_config": config.model_dump_json(indent=2)}


def find_model(path: str | Path, prefer: str) -> Path:
    """The folder of a model: `path` itself if it holds weights, else the checkpoint that `path` means.

    prefer: "latest" or "best", for the folder of a run. Raises ConfigError, see `CheckpointStore.find`.
    """
    path = Path(path)
    return path if (path / WEIGHTS_FILE).exists() else CheckpointStore.find(path, prefer)


def load_config(folder: str | Path) -> ModelConfig:
    """The configuration in `folder`. Raises UserError if it is missing, torn, or not a ModelConfig."""
    path = Path(folder) / CONFIG_FILE
    if not path.is_file():
        foreign = Path(folder) / "config.json"
        convert = f"; {foreign} is Hugging Face's: tools/convert_hf.py import makes a folder of ours"
        raise UserError(
            f"{path} does not exist: give a folder that holds {CONFIG_FILE} and {WEIGHTS_FILE}"
            + (convert if foreign.is_file() else "")
        )
    try:
        return ModelConfig.model_validate_json(path.read_text(encoding="utf-8"))
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"]) or "the file"
        raise UserError(f"{path} is not a model configuration: {place}: {first['msg']}") from error


def load_model(
    folder: str | Path,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
    *,
    kernels: KernelConfig | None = None,
    store: CheckpointStore | None = None,
) -> Transformer:
    """The model in `folder`, on `device`, in `dtype` (as saved by default), in evaluation mode.

    Raises UserError for missing or torn files, for weights and configuration of different models (with the first
    tensor that differs), and for an attention backend that is not installed.
    """
    with open_model(folder, device, store) as (config, file):
        state = {name: file.get_tensor(name) for name in list(file.keys())}
    with torch.device("meta"):
        model = Transformer(config, kernels, seed=None)
    if config.tie_embeddings:
        state[_TIED_NAME] = state["embedding.weight"]
    model.load_state_dict(state, strict=True, assign=True)
    model.tie_weights()
    if dtype is not None:
        model.to(dtype)
    return model.eval().requires_grad_(True)


def check_model_state(shapes: Mapping[str, Sequence[int]], config: ModelConfig, source: str) -> None:
    """Raise UserError unless `shapes` (by parameter name) are those of a model of `config`; a tied head may be absent.

    The message names `source` and the first tensor, in the order of the model, that differs.
    """
    with torch.device("meta"):
        expected = {name: tuple(tensor.shape) for name, tensor in Transformer(config, seed=None).named_parameters()}
    for name, shape in expected.items():
        if name not in shapes:
            raise UserError(f"{source} is of another model: it has no tensor {name!r}, which should be {list(shape)}")
        if tuple(shapes[name]) != shape:
            raise UserError(
                f"{source} is of another model: {name!r} has shape {list(shapes[name])}, in the configuration "
                f"{list(shape)}"
            )
    for name in shapes:
        if name not in expected and not (config.tie_embeddings and name == _TIED_NAME):
            raise UserError(f"{source} is of another model: the configuration has no tensor {name!r}")


@contextmanager
def open_model(
    folder: str | Path, device: torch.device | str = "cpu", store: CheckpointStore | None = None
) -> Iterator[tuple[ModelConfig, Any]]:
    """The configuration in `folder` and its weights, an open safetensors file whose names and shapes are checked.

    store: one that has read the manifest of `folder` already, if any. Raises UserError as `load_model` does.
    """
    folder = Path(folder)
    (store or CheckpointStore(run_folder(folder))).verify(folder, (WEIGHTS_FILE, CONFIG_FILE))
    path, config = folder / WEIGHTS_FILE, load_config(folder)
    if not path.is_file():
        raise UserError(f"{path} does not exist: give a folder that holds {CONFIG_FILE} and {WEIGHTS_FILE}")
    try:
        with safe_open(path, framework="pt", device=str(device)) as file:
            shapes = {name: file.get_slice(name).get_shape() for name in list(file.keys())}
            check_model_state(shapes, config, str(path))
            written = (file.metadata() or {}).get("model_config")
            if written is not None and ModelConfig.model_validate_json(written) != config:
                raise UserError(
                    f"{path} and the {CONFIG_FILE} next to it were not saved together: their configurations differ. Save the "
                    "model again, or restore the file that belongs to the weights"
                )
            yield config, file
    except SafetensorError as error:
        raise UserError(
            f"{path} is torn or not a safetensors file ({error}): use another checkpoint, or save this one again"
        ) from error
