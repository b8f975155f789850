"""A trained model opened for use: weights, tokenizer, and where they came from."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch

from megatronish.checkpoint.paths import (
    BEST,
    RUN_FILE,
    STATE_FILE,
    TOKENIZER_RECORD_FILE,
    run_folder,
)
from megatronish.checkpoint.store import CheckpointStore
from megatronish.checkpoint.weights import WEIGHTS_FILE, load_model
from megatronish.data.tokenizers.tokenizer import Tokenizer, load_tokenizer
from megatronish.errors import UserError
from megatronish.inference.quantize import QUANTIZATION_FILE, load_quantized
from megatronish.model.transformer import Transformer


@dataclass(frozen=True)
class CheckpointInfo:
    """Where a loaded model came from. step and data_identity are None for a folder without a training state."""

    folder: Path  # of the weights
    run_dir: Path
    step: int | None  # optimizer steps it was trained for
    data_identity: str | None  # of the training data, as the training state names it


class Loaded(NamedTuple):
    """A model opened for use, with its tokenizer and where they came from."""

    model: Transformer
    tokenizer: Tokenizer
    info: CheckpointInfo


def load_for_inference(
    path: str | Path, device: torch.device | str = "cpu", dtype: torch.dtype | None = None
) -> Loaded:
    """The model of a run folder (its best checkpoint, else its latest), of one checkpoint, or of an exported folder.

    The model is on `device` in `dtype` (as saved by default), in evaluation mode. Raises UserError when there is
    nothing there, when files are missing, torn or do not belong together.
    """
    path = Path(path)
    folder = path if (path / WEIGHTS_FILE).exists() else CheckpointStore.find(path, BEST)
    store = CheckpointStore(run_folder(folder))
    store.verify(folder, (STATE_FILE, RUN_FILE, TOKENIZER_RECORD_FILE, "tokenizer.json", "tokenizer.model"))
    state = _read_object(folder / STATE_FILE) if (folder / STATE_FILE).exists() else {}
    tokenizer = _load_tokenizer(folder)
    try:
        quantized = (folder / QUANTIZATION_FILE).exists()
        model = (load_quantized if quantized else load_model)(folder, device, dtype, store=store)
    except UserError:
        raise
    except ValueError as error:  # what `load_model` says of files that do not fit
        raise UserError(str(error)) from error
    if tokenizer.vocab_size > model.config.vocab_size:
        raise UserError(
            f"{folder}: the tokenizer has {tokenizer.vocab_size:,} ids, the model only {model.config.vocab_size:,}: "
            "they do not belong together. Restore the tokenizer that was saved with the weights."
        )
    info = CheckpointInfo(folder, run_folder(folder), state.get("step"), state.get("data_identity"))
    return Loaded(model, tokenizer, info)


def resolve_device(name: str) -> torch.device:
    """ "auto" (a GPU where there is one), "cpu" or "cuda". Raises UserError for cuda without a GPU."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: PyTorch finds no CUDA device here. Use --device auto or cpu.")
    return torch.device(name)


def _load_tokenizer(folder: Path) -> Tokenizer:
    path = folder / TOKENIZER_RECORD_FILE
    record = _read_object(path)
    try:
        kind, eod_id, sha256 = record["kind"], record["eod_id"], record["sha256"]
    except KeyError as error:
        raise UserError(f"{path}: no {error} in it; use another checkpoint, or restore the file") from None
    tokenizer = load_tokenizer("bytes" if kind == "bytes" else folder, eod_id=eod_id)
    if tokenizer.fingerprint != sha256:
        raise UserError(
            f"{folder}: the tokenizer there (SHA-256 {tokenizer.fingerprint[:12]}...) is not the one the model was "
            f"trained with ({sha256[:12]}...): restore it from the data set or another checkpoint of the run"
        )
    bos_id = record.get("bos_id")  # of imported models alone
    if bos_id is not None and not (type(bos_id) is int and 0 <= bos_id < tokenizer.vocab_size):
        raise UserError(f"{path}: bos_id {bos_id!r} is no token id below {tokenizer.vocab_size}; restore the file")
    tokenizer.bos_id = bos_id
    return tokenizer


def _read_object(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_bytes())
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); use a complete checkpoint") from None
    except ValueError as error:
        raise UserError(f"{path}: not JSON ({error}); use another checkpoint, or restore the file") from None
    if not isinstance(content, dict):
        raise UserError(f"{path}: not a JSON object; use another checkpoint, or restore the file")
    return content
