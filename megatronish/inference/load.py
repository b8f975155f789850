"""Loading a trained model for inference: weights, tokenizer, and their origin."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch

from megatronish.checkpoint.paths import BEST, RUN_FILE, STATE_FILE, TOKENIZER_RECORD_FILE, run_folder
from megatronish.checkpoint.store import CheckpointStore
from megatronish.checkpoint.weights import find_model, load_model
from megatronish.data.tokenizers.tokenizer import Tokenizer
from megatronish.errors import UserError
from megatronish.inference.quantize import QUANTIZATION_FILE, load_quantized
from megatronish.interop.tokenizer_files import TOKENIZER_FILES, read_json_object, recorded_tokenizer
from megatronish.model.transformer import Transformer


@dataclass(frozen=True)
class CheckpointInfo:
    """Origin of a loaded model. step and data_identity are None for a folder without a training state."""

    folder: Path  # of the weights
    run_dir: Path
    step: int | None  # optimizer steps it was trained for
    data_identity: str | None  # of the training data, from the training state


class Loaded(NamedTuple):
    """A model, its tokenizer, and their origin."""

    model: Transformer
    tokenizer: Tokenizer
    info: CheckpointInfo


def load_for_inference(
    path: str | Path, device: torch.device | str = "cpu", dtype: torch.dtype | None = None
) -> Loaded:
    """The model of a run folder (its best checkpoint, else its latest), of one checkpoint, or of an exported folder.

    The model is on `device` in `dtype` (as saved by default), in evaluation mode. Raises UserError if files are missing or
    damaged, or do not belong together.
    """
    folder = find_model(path, BEST)
    store = CheckpointStore(run_folder(folder))
    store.verify(folder, (STATE_FILE, RUN_FILE, TOKENIZER_RECORD_FILE, *TOKENIZER_FILES))
    state = read_json_object(folder / STATE_FILE) if (folder / STATE_FILE).exists() else {}
    tokenizer = recorded_tokenizer(folder)
    load = load_quantized if (folder / QUANTIZATION_FILE).exists() else load_model
    model = load(folder, device, dtype, store=store)
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
