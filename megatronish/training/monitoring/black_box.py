"""The black box of a non-finite step or a loss spike, from which tools/replay.py runs it again: SAVE_DIR/black_box/step-N/.

    event.json               kind, losses before, configuration, samples and their documents by rank  (first rank)
    rank-00000.json          the rank's loss, norms of its weights, gradients and outputs, the first non-finite output
    rank-00000.safetensors   its micro batches, its random generators
    checkpoint/              the checkpoint before it: hard links, which take no space while the run keeps it, too

JSON and safetensors only. A run writes MOST boxes; later events are only reported.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from megatronish.errors import ConfigError
from megatronish.files import write_atomic
from megatronish.training.monitoring.diagnosis import Diagnosis
from megatronish.training.step import Batch

FOLDER, EVENT_FILE, CHECKPOINT = "black_box", "event.json", "checkpoint"
MOST = 8
RANK_FILE = "rank-{:05d}"
BAD, SPIKE = "non-finite", "spike"


@dataclass(frozen=True)
class BlackBoxEvent:
    """What happened at a step, equal on all ranks.

    kind: BAD or SPIKE; step: steps done with it; samples: [first, stop) of the step; score: of a spike, in robust standard
    deviations; documents: of each data-parallel rank's samples; losses: of the steps before; layout: ranks by axis.
    """

    kind: str
    step: int
    samples: tuple[int, int]
    loss: float
    grad_norm: float
    score: float
    losses: list[float]
    documents: list[list[dict[str, Any]]]
    layout: dict[str, int]
    checkpoint: str | None
    config: dict[str, Any]


@dataclass(frozen=True)
class TrainedStep:
    """A step that this rank trained, kept until its loss is known."""

    step: int
    batches: list[Batch]
    loss_sum: Tensor
    grad_norm: float | Tensor | None
    seed: int


def box_folder(run_dir: Path, step: int) -> Path | None:
    """The folder for the box of `step`, None when the run has MOST boxes."""
    folder = run_dir / FOLDER
    others = [path for path in folder.glob("step-*") if path.name != f"step-{step:08d}"]
    return folder / f"step-{step:08d}" if len(others) < MOST else None


def write_rank(folder: Path, rank: int, trained: TrainedStep, diagnosis: Diagnosis) -> None:
    """Write a rank's part of the box."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = _tensors(trained.batches)
    tensors["random.cpu"] = torch.get_rng_state()
    if torch.cuda.is_available():
        tensors["random.cuda"] = torch.cuda.get_rng_state()
    save_file(tensors, folder / (RANK_FILE.format(rank) + ".safetensors"))
    record = {"loss_sum": float(trained.loss_sum).hex(), "seed": trained.seed, **asdict(diagnosis)}
    write_atomic(folder / (RANK_FILE.format(rank) + ".json"), json.dumps(record, indent=1) + "\n")


def write_event(folder: Path, event: BlackBoxEvent, checkpoint: Path | None) -> None:
    """Write what all ranks share, and link the checkpoint that a replay starts from."""
    folder.mkdir(parents=True, exist_ok=True)
    if checkpoint is not None:
        shutil.rmtree(folder / CHECKPOINT, ignore_errors=True)
        shutil.copytree(checkpoint, folder / CHECKPOINT, copy_function=_link)
    write_atomic(folder / EVENT_FILE, json.dumps(asdict(event), indent=1) + "\n")


def _link(source: str, target: str) -> str:
    try:
        os.link(source, target)
    except OSError:  # another file system, or one without links
        return str(shutil.copy2(source, target))
    return target


def read_event(folder: Path) -> BlackBoxEvent:
    """Read what `write_event` wrote. Raises ConfigError where it is missing or not an event."""
    path = folder / EVENT_FILE
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
        return BlackBoxEvent(**{**raw, "samples": tuple(raw["samples"])})
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{path}: cannot be read ({error!r}): give a folder SAVE_DIR/{FOLDER}/step-N.") from None


def read_rank(folder: Path, rank: int) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Read what `write_rank` wrote. Raises ConfigError where it is missing or truncated."""
    stem = RANK_FILE.format(rank)
    try:
        record = json.loads((folder / (stem + ".json")).read_text(encoding="utf-8"))
        return record, load_file(folder / (stem + ".safetensors"))
    except (OSError, ValueError, SafetensorError) as error:
        raise ConfigError(f"{folder}/{stem}: cannot be read ({error!r}).") from None


def batches_equal(batches: Sequence[Batch], recorded: dict[str, Tensor]) -> bool:
    """Whether the batches equal the micro batches of the box."""
    wanted, found = {key for key in recorded if key.startswith("micro-")}, _tensors(batches)
    return found.keys() == wanted and all(torch.equal(found[key], recorded[key]) for key in wanted)


def _tensors(batches: Sequence[Batch]) -> dict[str, Tensor]:
    """The tensors of the micro batches under their names in the box, on the CPU."""
    return {
        f"micro-{number}.{key}": value.cpu().contiguous()
        for number, batch in enumerate(batches)
        for key, value in batch.items()
        if isinstance(value, Tensor)
    }
