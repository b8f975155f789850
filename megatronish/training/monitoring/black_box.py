"""What is kept of a bad step, so that it can be looked at and run again: SAVE_DIR/black_box/step-N/.

    event.json               what happened, losses before, configuration, samples and their documents by rank  (first rank)
    rank-00000.json          the rank's loss, norms of its weights, gradients and outputs, where the numbers first break
    rank-00000.safetensors   its micro batches as they were trained on, its random generators
    checkpoint/              the checkpoint before it: hard links, so no space until the run itself lets go of it

JSON and safetensors only. tools/replay.py reads it. The first MOST boxes of a run are written, later events are only told.
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
BAD, SPIKE = "no number", "spike"


@dataclass(frozen=True)
class BlackBoxEvent:
    """What happened at a step, the same for all ranks.

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
    """What a rank remembers of one of its last steps."""

    step: int
    batches: list[Batch]
    loss_sum: Tensor
    grad_norm: float | Tensor | None
    seed: int


def box_folder(run_dir: Path, step: int) -> Path | None:
    """Where the box of `step` goes, None when there are enough of them."""
    folder = run_dir / FOLDER
    there = [path for path in folder.glob("step-*") if path.name != f"step-{step:08d}"]
    return folder / f"step-{step:08d}" if len(there) < MOST else None


def write_rank(folder: Path, rank: int, trained: TrainedStep, diagnosis: Diagnosis) -> None:
    """Write a rank's part of the box."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {
        f"micro-{number}.{key}": value.cpu().contiguous()
        for number, batch in enumerate(trained.batches)
        for key, value in batch.items()
        if isinstance(value, Tensor)
    }
    tensors["random.cpu"] = torch.get_rng_state()
    if torch.cuda.is_available():
        tensors["random.cuda"] = torch.cuda.get_rng_state()
    save_file(tensors, folder / (RANK_FILE.format(rank) + ".safetensors"))
    told = {"loss_sum": float(trained.loss_sum).hex(), "seed": trained.seed, **asdict(diagnosis)}
    write_atomic(folder / (RANK_FILE.format(rank) + ".json"), json.dumps(told, indent=1) + "\n")


def write_event(folder: Path, event: BlackBoxEvent, checkpoint: Path | None) -> None:
    """Write what all ranks share, and keep the checkpoint that a replay begins with."""
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
    """Read what `write_event` wrote. Raises ConfigError where it is missing or no event."""
    path = folder / EVENT_FILE
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
        return BlackBoxEvent(**{**raw, "samples": tuple(raw["samples"])})
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{path}: cannot be read ({error!r}): give a folder SAVE_DIR/{FOLDER}/step-N.") from None


def read_rank(folder: Path, rank: int) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Read what `write_rank` wrote. Raises ConfigError where it is missing or torn."""
    stem = RANK_FILE.format(rank)
    try:
        told = json.loads((folder / (stem + ".json")).read_text(encoding="utf-8"))
        return told, load_file(folder / (stem + ".safetensors"))
    except (OSError, ValueError, SafetensorError) as error:
        raise ConfigError(f"{folder}/{stem}: cannot be read ({error!r}).") from None


def batches_equal(batches: Sequence[Batch], recorded: dict[str, Tensor]) -> bool:
    """Whether these are the micro batches of the box."""
    wanted = {key for key in recorded if key.startswith("micro-")}
    found = {
        f"micro-{number}.{key}": value.cpu()
        for number, batch in enumerate(batches)
        for key, value in batch.items()
        if isinstance(value, Tensor)
    }
    return found.keys() == wanted and all(torch.equal(found[key], recorded[key]) for key in wanted)
