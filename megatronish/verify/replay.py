"""Run the step of a black box again, from the checkpoint in the box or the beginning of the run."""

from __future__ import annotations

import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path

import torch.distributed as dist

from megatronish.config.base import merge
from megatronish.config.run import BLOCK, RunConfig
from megatronish.errors import ConfigError
from megatronish.launch.process import Rank
from megatronish.launch.rendezvous import join_rendezvous_from_env
from megatronish.training.engine import start_process_group, stop_process_group
from megatronish.training.loop import Trainer
from megatronish.training.monitoring.black_box import CHECKPOINT, BlackBoxEvent, batches_equal, read_event, read_rank
from megatronish.training.monitoring.diagnosis import Diagnosis, diagnose_step, weight_norms
from megatronish.training.setup.preparation import prepare
from megatronish.training.setup.resume_point import choose_resume_point
from megatronish.training.stopping import StopRequests


@dataclass(frozen=True)
class Replayed:
    """The result of a rank. same_loss: the sum of its token losses has the recorded bits; same_batches: so have its micro
    batches; same_norms: so have the norms of gradients, outputs and weights in the box (a spike records none)."""

    event: BlackBoxEvent
    steps_before: int
    loss_sum: float
    same_loss: bool
    same_batches: bool
    same_norms: bool
    diagnosis: Diagnosis

    @property
    def as_recorded(self) -> bool:
        """Whether all that was recorded has the same bits."""
        return self.same_batches and self.same_loss and self.same_norms


def replay(box: Path, rank: Rank) -> Replayed:
    """Run the step of the box again, on every rank of the layout that recorded it. Nothing is written to the run's folder.

    Raises ConfigError for a box that cannot be read, another number of ranks, or missing data.
    """
    event = read_event(box)
    ranks = event.layout["pp"] * event.layout["dp"] * event.layout["sp"] * event.layout["tp"]
    if rank.world_size != ranks:
        raise ConfigError(
            f"{box} was recorded by {ranks} rank(s), {layout_of(event)}; start that many, not {rank.world_size}."
        )
    values, recorded = read_rank(box, rank.rank)
    with tempfile.TemporaryDirectory() as scratch:
        config = replay_config(event, box, Path(scratch))
        run = prepare(config, rank)
        rendezvous = join_rendezvous_from_env(config.megatronish.train.start_timeout)
        run = choose_resume_point(run, rendezvous)
        start_process_group(rendezvous=rendezvous)
        trainer = Trainer(run, rank, None, StopRequests(), rendezvous)
        before = trainer.state.step
        while trainer.state.step < event.step - 1:
            trainer.next_step(trainer.next_batches())
        batches = trainer.next_batches()
        diagnosis = diagnose_step(trainer.engine, batches, trainer.seed())
        trainer.next_step(batches)
        norms = {**asdict(diagnosis), "weights": weight_norms(trainer.engine.module)}  # recorded after the step
        loss_sum = float(trainer.last.loss_sum)
        result = Replayed(
            event,
            event.step - 1 - before,
            loss_sum,
            loss_sum.hex() == values["loss_sum"],
            batches_equal(batches, recorded),
            all(_same(values[key], norms[key]) for key in ("weights", "outputs", "gradients") if values[key]),
            diagnosis,
        )
        trainer.close()
        if dist.get_world_size() > 1:
            dist.barrier()
    stop_process_group()
    return result


def replay_config(event: BlackBoxEvent, box: Path, scratch: Path) -> RunConfig:
    """The configuration of the run, with `scratch` as its folder and without checkpoints."""
    start = str(box / CHECKPOINT) if (box / CHECKPOINT).is_dir() else "never"
    train = {"save_dir": str(scratch), "resume": start, "hang_timeout": 0.0, "time_limit": None, "on_spike": "ignore"}
    log = {"tensorboard": False, "wandb": "off"}
    return RunConfig.from_dict(merge(event.config, {BLOCK: {"train": train, "log": log}}), str(box))


def layout_of(event: BlackBoxEvent) -> str:
    """As in "tp 2, dp 4"; "one rank" for one."""
    return ", ".join(f"{axis} {size}" for axis, size in event.layout.items() if size > 1) or "one rank"


def _same(recorded: dict[str, float], found: dict[str, float]) -> bool:
    """Whether these are the same numbers; a NaN equals a NaN."""
    return recorded.keys() == found.keys() and all(
        found[name] == norm or (norm != norm and found[name] != found[name]) for name, norm in recorded.items()
    )
