"""Recovery from steps that cannot be kept: out of memory, a non-finite loss or gradient, a loss spike."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
import torch.distributed as dist

from megatronish.checkpoint.train_state import LAYOUT, TrainState
from megatronish.training.memory import (
    GIB,
    ActivationBudget,
    OutOfMemory,
    describe_fallback,
    fits_in_memory,
    longest_batch,
    out_of_memory_fallback,
)
from megatronish.training.monitoring.black_box import BAD, SPIKE, TrainedStep
from megatronish.training.monitoring.incidents import Incidents
from megatronish.training.monitoring.spikes import BadSteps, spike_score
from megatronish.training.step import StepResult
from megatronish.training.step_agreement import StepRecord

if TYPE_CHECKING:
    from megatronish.training.loop import Trainer

Action = Literal["continue", "skip", "redo"]


class Recovery:
    """Decides how training proceeds after each step.

    "continue": the step counts. "skip": it counts, but nothing was updated. "redo": training resumes from the trainer's
    state, in smaller micro batches or from an earlier checkpoint. Every rank has a Recovery and calls the same methods at
    the same steps; trainer: whose plan, state and data it sets back.
    """

    def __init__(self, trainer: Trainer) -> None:
        self._trainer, self._config = trainer, trainer.train_config
        self._incidents = Incidents(trainer.rank, trainer.engine, trainer.store)
        self._bad_steps = BadSteps(self._config.max_skipped_steps)
        self._recompute: str = self._config.activation_checkpointing
        self._spiking = False

    def judge(self, result: StepResult) -> Action:
        """The action for a step that is not counted yet. Raises OutOfMemory when nothing is left to try."""
        if result.out_of_memory:
            self._reduce_memory(f"out of memory in step {self._trainer.state.step + 1}, which is repeated")
            return "redo"
        return "skip" if result.bad else "continue"

    def remember(self, trained: TrainedStep) -> None:
        """Keep a step until its loss is known, for the black box."""
        self._incidents.remember(trained)

    def after_step(self, action: Action, records: list[StepRecord]) -> Action:
        """The action for a counted step and the finished steps of `records`.

        "redo" after a loss spike that set the run back to a checkpoint. Raises TrainingStopped after too many skipped steps
        in a row.
        """
        trainer, state = self._trainer, self._trainer.state
        # A step whose samples are left out has no record: it was not trained on.
        bad = next((record for record in records if action == "skip" and record.step == state.step), None)
        if bad:
            trainer.saver.wait()
            box = self._incidents.record(BAD, bad, trainer.run, state)
            trainer.report(f"step {bad.step} skipped: non-finite loss or gradient{_kept_in(box)}")
            self._bad_steps.count(True, bad.step, trainer.store.newest())
        elif action == "continue":
            self._bad_steps.count(False, state.step, None)
        return "redo" if any(self._sets_back(record) for record in records) else action

    def _sets_back(self, record: StepRecord) -> bool:
        """Add the loss of a finished step to the window; whether it is a spike that set the run back to a checkpoint."""
        if not math.isfinite(record.loss):
            return False
        trainer, config = self._trainer, self._config
        score = spike_score(trainer.state.losses, record.loss)
        before, self._spiking = self._spiking, score > config.spike_threshold
        if self._spiking and not before and config.on_spike != "ignore" and self._handle_spike(record, score):
            return True
        losses = [*trainer.state.losses, record.loss][-config.spike_window :]
        trainer.state = replace(trainer.state, losses=losses)
        return False

    def _handle_spike(self, record: StepRecord, score: float) -> bool:
        """Report a loss spike and keep a black box of it; whether the run was rolled back."""
        trainer, config, state = self._trainer, self._config, self._trainer.state
        trainer.saver.wait()
        box = self._incidents.record(SPIKE, record, trainer.run, state, score)
        message = f"loss spike at step {record.step}: {record.loss:.4f}, {score:.1f} deviations above the median"
        message += _kept_in(box)
        if config.on_spike == "warn":
            trainer.report(message)
            return False
        first = max(record.step - config.spike_steps, 0)
        checkpoint = self._incidents.checkpoint_before(first + 1)
        if checkpoint is None:
            trainer.report(f"{message}; not rolled back: no checkpoint is old enough")
            return False
        if state.rollbacks >= config.max_rollbacks:
            trainer.report(f"{message}; not rolled back: train.max_rollbacks is {config.max_rollbacks}")
            return False
        samples = [state.samples - (state.step - step) * trainer.run.plan.samples for step in (first, record.step)]
        self._roll_back(checkpoint, samples)
        trainer.report(
            f"{message}; back at step {trainer.state.step}, samples {samples[0]} to {samples[1] - 1} will be skipped"
        )
        return True

    def _roll_back(self, checkpoint: Path, samples: list[int]) -> None:
        """Resume from a checkpoint of this run, without the samples [first, stop)."""
        now = self._trainer.state
        layout = {name: getattr(now, name) for name in LAYOUT}
        left_out = [*now.left_out, samples]
        state = replace(TrainState.load(checkpoint), **layout, left_out=left_out, rollbacks=now.rollbacks + 1)
        self._spiking = False
        self._trainer.return_to(checkpoint, state)

    def dry_run(self) -> None:
        """Before the first step run the largest possible micro batch, and reduce memory until it fits on all ranks."""
        trainer, engine = self._trainer, self._trainer.engine
        on_gpu = trainer.device.type == "cuda"
        if not engine.can_shrink or not (on_gpu or engine.budget):
            return
        model = trainer.run.config.megatronish.model
        budget = engine.budget or ActivationBudget(engine.module, None)
        while True:
            if on_gpu:
                torch.cuda.reset_peak_memory_stats(trainer.device)
            batch = longest_batch(trainer.run.plan.micro, model.seq_length, model.vocab_size, trainer.device)
            fits = torch.tensor(float(fits_in_memory(engine.module, batch, budget)), device=trainer.device)
            if dist.get_world_size() > 1:
                dist.all_reduce(fits, op=dist.ReduceOp.MIN)
            if fits:
                break
            self._reduce_memory("the largest micro batch does not fit")
        peak = f", peak {torch.cuda.max_memory_allocated(trainer.device) / GIB:.2f} GiB" if on_gpu else ""
        trainer.report(f"the largest micro batch fits: activations of {budget.used / GIB:.3g} GiB{peak}")

    def _reduce_memory(self, message: str) -> None:
        """Use smaller micro batches or recompute more. Raises OutOfMemory when nothing is left to try."""
        trainer, config = self._trainer, self._trainer.run.config
        seq_length, kind = config.megatronish.model.seq_length, trainer.device.type
        found = out_of_memory_fallback(trainer.run.plan, self._recompute, seq_length, config.deepspeed.dtype, kind)
        if found is None:
            raise OutOfMemory(
                f"{message}, but a micro batch of one sample does not fit, and every block is recomputed already. Shorten "
                "--model.seq_length, or use more ranks with --zero_optimization.stage 3 or --parallel.tensor."
            )
        plan, self._recompute = found
        if plan != trainer.run.plan and trainer.loader.stream_states() is not None:
            raise OutOfMemory(
                f"{message}, and streamed text cannot be divided into other micro batches during a run. Start with "
                f"--train_micro_batch_size_per_gpu {plan.micro} --gradient_accumulation_steps {plan.accumulation}."
            )
        model: Any = trainer.engine.module.model
        model.set_activation_checkpointing(self._recompute)
        trainer.report(describe_fallback(message, plan, self._recompute))
        trainer.use_plan(plan)


def _kept_in(box: Path | None) -> str:
    return f" (kept in {box})" if box else ""
