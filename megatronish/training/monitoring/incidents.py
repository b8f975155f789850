"""What a run keeps of its bad steps: it remembers the last ones, and writes a black box of one that turns out bad."""

from __future__ import annotations

import math
from collections import deque
from pathlib import Path
from typing import Any

import torch.distributed as dist

from megatronish.checkpoint.store import CheckpointStore
from megatronish.checkpoint.train_state import TrainState
from megatronish.launch.process import Rank
from megatronish.training.engine import Engine
from megatronish.training.monitoring.black_box import (
    BAD,
    BlackBoxEvent,
    TrainedStep,
    box_folder,
    write_event,
    write_rank,
)
from megatronish.training.monitoring.diagnosis import Diagnosis, diagnose_step, weight_norms
from megatronish.training.setup.preparation import Prepared

REMEMBERED = 2  # steps: on a GPU the loss of a step is known when the next one is done


class Incidents:
    """Every rank has one, and calls `record` together with the others."""

    def __init__(self, run: Prepared, rank: Rank, engine: Engine, store: CheckpointStore) -> None:
        self.run, self._rank, self._engine, self._store = run, rank, engine, store
        self._last: deque[TrainedStep] = deque(maxlen=REMEMBERED)

    def remember(self, trained: TrainedStep) -> None:
        """Keep a step until it is known whether it was a good one."""
        self._last.append(trained)

    def record(self, kind: str, step: int, state: TrainState, loss: float, score: float = 0.0) -> Path | None:
        """Write the box of step `step`; None when the run has enough boxes. state: as it is now, losses without this one's.

        Of a step that was left out the weights are still those that it began with, so it is run again and looked at.
        """
        trained = next(each for each in self._last if each.step == step)
        folder: Path | None = _first_says(box_folder(self.run.run_dir, step) if self._rank.is_first else None)
        if folder is None:
            return None
        if kind == BAD:
            diagnosis = diagnose_step(self._engine, trained.batches, trained.seed)
        else:
            diagnosis = Diagnosis(weights=weight_norms(self._engine.module))
        write_rank(folder, self._rank.rank, trained, diagnosis)
        if self._rank.is_first:
            checkpoint = self._store.newest_before(step)
            write_event(folder, self._event(kind, trained, state, loss, score, checkpoint), checkpoint)
        if dist.get_world_size() > 1:
            dist.barrier()
        return folder

    def checkpoint_before(self, step: int) -> Path | None:
        """The newest complete checkpoint of fewer than `step` steps, the same on every rank."""
        found: Path | None = _first_says(self._store.newest_before(step) if self._rank.is_first else None)
        return found

    def _event(
        self, kind: str, trained: TrainedStep, state: TrainState, loss: float, score: float, checkpoint: Path | None
    ) -> BlackBoxEvent:
        plan, mesh = self.run.plan, self._engine.mesh
        first = state.samples - (state.step - trained.step + 1) * plan.samples
        norm = math.nan if trained.grad_norm is None else float(trained.grad_norm)
        return BlackBoxEvent(
            kind=kind,
            step=trained.step,
            samples=(first, first + plan.samples),
            loss=loss,
            grad_norm=norm,
            score=score,
            losses=state.losses,
            documents=[self._documents(first, rank) for rank in range(plan.data_size)],
            layout={axis: getattr(mesh, axis).size for axis in ("pp", "dp", "sp", "tp")},
            checkpoint=None if checkpoint is None else checkpoint.name,
            config=self.run.config.to_json(),
        )

    def _documents(self, first: int, rank: int) -> list[dict[str, Any]]:
        """The samples of a data-parallel rank in a step that begins with sample `first`, in its order."""
        plan = self.run.plan
        starts = [first + (a * plan.data_size + rank) * plan.micro for a in range(plan.accumulation)]
        numbers = [start + place for start in starts for place in range(plan.micro)]
        found = [(number, *self.run.data.train.documents(number)) for number in numbers]
        return [{"sample": number, "data": name, "documents": documents} for number, name, documents in found]


def _first_says(told: Any) -> Any:
    """What the first rank says: folders are looked at by it alone."""
    said = [told]
    if dist.get_world_size() > 1:
        dist.broadcast_object_list(said, src=0)
    return said[0]
