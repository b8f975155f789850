"""Keeps the last steps of a run, and writes a black box of one that was non-finite or a loss spike."""

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
from megatronish.training.step_agreement import StepRecord

REMEMBERED = 2  # steps: on a GPU the loss of a step is known when the next one is done


class Incidents:
    """Writes black boxes. Every rank has an Incidents, and all call `record` at the same steps."""

    def __init__(self, rank: Rank, engine: Engine, store: CheckpointStore) -> None:
        self._rank, self._engine, self._store = rank, engine, store
        self._last: deque[TrainedStep] = deque(maxlen=REMEMBERED)

    def remember(self, trained: TrainedStep) -> None:
        """Keep a step until its loss is known on all ranks."""
        self._last.append(trained)

    def record(
        self, kind: str, record: StepRecord, run: Prepared, state: TrainState, score: float = 0.0
    ) -> Path | None:
        """Write the box of a step; returns its folder, or None when the run has enough boxes.

        run, state: the current ones, with the losses of the steps before; score: of a spike. A skipped step left the
        weights unchanged, so it is run again for its diagnosis.
        """
        trained = next(each for each in self._last if each.step == record.step)
        folder: Path | None = _from_first_rank(box_folder(run.run_dir, record.step) if self._rank.is_first else None)
        if folder is None:
            return None
        if kind == BAD:
            diagnosis = diagnose_step(self._engine, trained.batches, trained.seed)
        else:
            diagnosis = Diagnosis(weights=weight_norms(self._engine.module))
        write_rank(folder, self._rank.rank, trained, diagnosis)
        if self._rank.is_first:
            first = state.samples - (state.step - record.step + 1) * run.plan.samples
            checkpoint = self._store.newest_before(record.step)
            event = BlackBoxEvent(
                kind=kind,
                step=record.step,
                samples=(first, first + run.plan.samples),
                loss=record.loss,
                grad_norm=math.nan if trained.grad_norm is None else float(trained.grad_norm),
                score=score,
                losses=state.losses,
                documents=[_documents(run, first, rank) for rank in range(run.plan.data_size)],
                layout={axis: getattr(self._engine.mesh, axis).size for axis in ("pp", "dp", "sp", "tp")},
                checkpoint=None if checkpoint is None else checkpoint.name,
                config=run.config.to_json(),
            )
            write_event(folder, event, checkpoint)
        if dist.get_world_size() > 1:
            dist.barrier()
        return folder

    def checkpoint_before(self, step: int) -> Path | None:
        """The newest complete checkpoint of fewer than `step` steps, the same on every rank."""
        found: Path | None = _from_first_rank(self._store.newest_before(step) if self._rank.is_first else None)
        return found


def _documents(run: Prepared, first: int, rank: int) -> list[dict[str, Any]]:
    """The samples of a data-parallel rank in a step that begins with sample `first`, in its order."""
    plan = run.plan
    starts = [first + (a * plan.data_size + rank) * plan.micro for a in range(plan.accumulation)]
    numbers = [start + place for start in starts for place in range(plan.micro)]
    found = [(number, *run.data.train.documents(number)) for number in numbers]
    return [{"sample": number, "data": name, "documents": documents} for number, name, documents in found]


def _from_first_rank(value: Any) -> Any:
    """Broadcast a value of the first rank, which alone reads the folders of the run."""
    values = [value]
    if dist.get_world_size() > 1:
        dist.broadcast_object_list(values, src=0)
    return values[0]
