"""Pretraining: check the configuration, start the ranks, then fetch, step, log, validate and save until the last step."""

from __future__ import annotations

import hashlib
import json
import math
import os
import time
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path

import torch

from megatronish import __version__
from megatronish.checkpoint.paths import RUN_FILE
from megatronish.checkpoint.run_lock import hold_run_dir
from megatronish.checkpoint.saver import Saver
from megatronish.checkpoint.staging import StagingBuffers
from megatronish.checkpoint.store import ENGINE_TAG
from megatronish.checkpoint.train_state import TrainState, load_streams
from megatronish.config.run import BatchPlan, RunConfig
from megatronish.data.loader import MicroBatchLoader
from megatronish.data.samples.sampler import MicroBatchSampler
from megatronish.errors import UserError
from megatronish.launch.consensus import Consensus
from megatronish.launch.exit import EXIT_SAVED, INTERRUPTED_SECONDS, SHUTDOWN_SECONDS, exit_within
from megatronish.launch.process import Rank, has_gpu
from megatronish.launch.rendezvous import Rendezvous, join_rendezvous_from_env
from megatronish.launch.watchdog import Watchdog
from megatronish.model.accounting import flops_per_token
from megatronish.ops.dtypes import DTYPES
from megatronish.parallel.mesh import build_mesh
from megatronish.parallel.rng import random_stream, step_seed
from megatronish.training.engine import device, start_engine, start_process_group, stop_process_group
from megatronish.training.monitoring.black_box import TrainedStep
from megatronish.training.monitoring.metrics import Monitor
from megatronish.training.monitoring.mfu import find_peak
from megatronish.training.recovery import Action, Recovery
from megatronish.training.schedules import learning_rate_multiplier
from megatronish.training.setup.announcement import announce
from megatronish.training.setup.construction import build_model
from megatronish.training.setup.preparation import Prepared, prepare
from megatronish.training.setup.resume_point import choose_resume_point
from megatronish.training.snapshot import take_snapshot
from megatronish.training.step import Batch, to_device
from megatronish.training.step_agreement import StepAgreement, StepRecord
from megatronish.training.stopping import StopRequests, seconds_left


def pretrain(config: RunConfig, rank: Rank) -> int:
    """Train the run to its last step; returns the exit status: 0, or EXIT_SAVED after a stop request. Every rank calls it.

    Raises UserError for what the user can fix, before the rendezvous wherever one rank can find it out alone.
    """
    train = config.megatronish.train
    stops = StopRequests(seconds_left(train.time_limit, os.environ))
    with hold_run_dir(Path(train.save_dir), rank.is_first):
        run = prepare(config, rank)
        rendezvous = join_rendezvous_from_env(train.start_timeout, shared_by_ranks(config))
        run = choose_resume_point(run, rendezvous)
        if run.state.step < train.steps:
            return train_together(run, rank, rendezvous, stops)
        if rank.is_first:
            print(f"{run.resume_from} is already at step {run.state.step}: nothing left to train. Raise --train.steps.")
    return 0


def train_together(run: Prepared, rank: Rank, rendezvous: Rendezvous, stops: StopRequests) -> int:
    """Train with the other ranks and leave the process group in bounded time, also on errors; returns the exit status."""
    hang_timeout = run.config.megatronish.train.hang_timeout
    try:
        with start_watchdog(rendezvous, run.config) as watchdog:
            # torch's default of 30 minutes, or longer than the watchdog ever waits
            start_process_group(max(30.0, 11 * hang_timeout / 60), rendezvous)
            stopped_by = Trainer(run, rank, watchdog, stops, rendezvous).train()
    except BaseException as error:
        # Peers may wait for this rank in a collective: the launcher ends them.
        interrupted = isinstance(error, KeyboardInterrupt)
        status = 130 if interrupted else 2 if isinstance(error, UserError) else 1
        exit_within(INTERRUPTED_SECONDS if interrupted else SHUTDOWN_SECONDS, status)
        raise
    stop_process_group()
    return EXIT_SAVED if stopped_by else 0


def shared_by_ranks(config: RunConfig) -> dict[str, str]:
    """What has to be equal on all ranks; the rendezvous compares it."""
    digest = hashlib.sha256(json.dumps(config.to_json(), sort_keys=True).encode()).hexdigest()
    return {"configuration": digest[:12], "megatronish_version": __version__, "torch_version": torch.__version__}


def start_watchdog(rendezvous: Rendezvous, config: RunConfig) -> AbstractContextManager[Watchdog | None]:
    """Watch this rank and the run, unless train.hang_timeout is 0."""
    train, on_cpu = config.megatronish.train, not has_gpu()
    if not train.hang_timeout:
        return nullcontext()
    compare = on_cpu and config.megatronish.parallel.pipeline == 1  # pipeline stages wait for one another in every step
    return Watchdog(rendezvous, train.hang_timeout, Path(train.save_dir), count_cpu=on_cpu, compare=compare)


class Trainer:
    """Trains this rank's part of a run.

    watchdog: of this rank, None where it is switched off; stops: the requests to stop that this rank receives.
    """

    def __init__(
        self, run: Prepared, rank: Rank, watchdog: Watchdog | None, stops: StopRequests, rendezvous: Rendezvous
    ) -> None:
        self._watchdog, self._stops = watchdog, stops
        ours = run.config.megatronish
        self.run, self.rank, self.train_config, self.state = run, rank, ours.train, run.state
        self.device = device()
        self.store = run.store
        self.staging = StagingBuffers()
        self.saver = Saver(
            self.store,
            Consensus(rendezvous, "checkpoints"),
            background=ours.train.async_save,
            stop_on_error=ours.train.on_save_error == "stop",
            report=self.report,
            local_ranks=rank.local_world_size,
        )
        peak = find_peak(self.device, DTYPES[run.config.deepspeed.dtype])
        if rank.is_first:
            run.config.save(run.run_dir / RUN_FILE)
            announce(run, rank, self.device, peak)
        self.mesh = build_mesh(ours.parallel, self.device.type)
        model = build_model(run.config, run.plan, self.mesh, run.imported)
        self.engine = start_engine(model, run.config, run.plan, self.mesh)
        if run.resume_from:
            self.engine.load(run.resume_from, ENGINE_TAG, run.shards)
        self.loader = self._open_loader(run.resume_from)
        self.monitor = None
        if rank.is_first:
            flops = flops_per_token(ours.model).train
            self.monitor = Monitor(run.config, run.run_dir, self.state.step, flops, peak, self.device)
        self.agreement = StepAgreement(self.device, self.mesh.tp.size * self.mesh.pp.size)
        self.recovery = Recovery(self)
        self.last: TrainedStep  # of this process
        self._unreported: list[StepRecord] = []  # since the last report
        self._stop: str | None = None  # why a rank asked to stop, known to all ranks

    def _open_loader(self, checkpoint: Path | None) -> MicroBatchLoader:
        """This rank's micro batches from the current sample on; checkpoint: where the positions in streamed text are saved."""
        plan, data = self.run.plan, self.run.config.megatronish.data
        return MicroBatchLoader(
            self.run.data.train,
            MicroBatchSampler(self.state.samples, plan.samples, plan.micro, self.mesh.dp.rank, plan.data_size),
            document_mask=data.document_mask and data.pack,  # unpacked, a row is one document anyway
            num_workers=data.num_workers,
            prefetch=2 * plan.accumulation,
            pin_memory=self.device.type == "cuda",
            stream_states=load_streams(checkpoint, self.mesh.dp.rank) if checkpoint else None,
        )

    def train(self) -> str | None:
        """Train to the last step and finish the last checkpoint; returns why a rank asked to stop early, else None."""
        try:
            with self._stops:
                self.recovery.dry_run()
                stopped_by = self._steps()
                self._mark("saving")
                self.saver.finish()
                return stopped_by
        except KeyboardInterrupt:
            self.saver.abandon(0.0)  # the second Ctrl-C: at once
            raise
        except BaseException:
            self.saver.abandon()
            raise
        finally:
            self.close()

    def close(self) -> None:
        """Close the loader and the logs."""
        self.loader.close()
        if self.monitor:
            self.monitor.close()

    def _steps(self) -> str | None:
        """Fetch, step, log, validate, save; returns why a rank asked to stop before the last step, else None."""
        config = self.train_config
        while self.state.step < config.steps:
            start = time.monotonic()
            self._mark("training")
            batches = self.next_batches()
            if self._step(batches) == "redo":
                continue
            if self._due(config.log_interval):
                self._log()
            is_best = self._validates() and self._validate()
            self._stops.step_took(time.monotonic() - start)
            if self._due(config.save_interval) or is_best or self._stop:
                self._save(is_best)
            if self._stop and self.state.step < config.steps:
                self.report(
                    f"stopped by {self._stop} after step {self.state.step}, saved; the same command resumes here"
                )
                return self._stop
        return None

    def _step(self, batches: list[Batch]) -> Action:
        """Train on the batches and let `recovery` decide what the results of finished steps mean for the run."""
        action = self.next_step(batches)
        if action == "redo":
            return action
        if self.monitor:
            self.monitor.advance(self.state.step)
        config = self.train_config
        needed = self._due(config.log_interval) or self._due(config.save_interval) or self._validates()
        records = self.agreement.completed(needed or action == "skip")
        self._unreported += records
        self._stop = next((record.stop for record in records if record.stop), None)
        return self.recovery.after_step(action, records)

    def next_batches(self) -> list[Batch]:
        """This rank's micro batches of the next step, on its device."""
        return [to_device(next(self.loader), self.device) for _ in range(self.run.plan.accumulation)]

    def seed(self) -> int:
        """Seed of this rank's random numbers in the next step."""
        stream = random_stream(self.mesh, self.run.config.megatronish.parallel)
        return step_seed(self.train_config.seed, self.state.step, stream)

    def next_step(self, batches: list[Batch]) -> Action:
        """Train on the micro batches of the next step; unless it has to be redone, it is counted. Every rank calls it."""
        config, plan, step, seed = self.train_config, self.run.plan, self.state.step, self.seed()
        if self.state.leaves_out(plan.samples):
            self.state = self.state.advance(plan.samples, 0, updated=False)
            self.report(f"step {self.state.step} skipped: its samples led to a loss spike")
            return "skip"
        torch.manual_seed(seed)
        schedule = self.run.config.megatronish.schedule
        multiplier = learning_rate_multiplier(step - self.state.skipped, config.steps, schedule)
        result = self.engine.train_step(batches, multiplier)
        action = self.recovery.judge(result)
        if action == "redo":
            return action
        tokens = self.run.data.train.num_inputs(self.state.samples, plan.samples)
        self.state = self.state.advance(plan.samples, tokens, updated=action == "continue")
        self.agreement.exchange(step + 1, result.loss_sum, result.tokens, self._stops.reason)
        self.last = TrainedStep(step + 1, batches, result.loss_sum, result.grad_norm, seed)
        self.recovery.remember(self.last)
        return action

    def use_plan(self, plan: BatchPlan) -> None:
        """Train with micro batches of another size from the next step on; the samples of a step stay the same."""
        self.run = replace(self.run, plan=plan)
        self.engine.set_plan(plan)
        self._reopen_loader(None)

    def return_to(self, checkpoint: Path, state: TrainState) -> None:
        """Set the run back to a checkpoint of its own with `state`, which is saved at once."""
        self._mark("starting")
        self.state = state
        self.engine.load(checkpoint, ENGINE_TAG)
        self.agreement.forget()
        self._unreported, self._stop = [], None
        self._reopen_loader(checkpoint)
        if self.monitor:
            self.monitor.rewind(state.step)
        self._save(is_best=False)

    def _reopen_loader(self, checkpoint: Path | None) -> None:
        self.loader.close()
        self.loader = self._open_loader(checkpoint)

    def report(self, text: str) -> None:
        """Print a line for the user, on the first rank."""
        if self.monitor:
            self.monitor.message(text)

    def _mark(self, phase: str) -> None:
        if self._watchdog:
            self._watchdog.mark(phase, self.state.step)

    def _due(self, interval: int) -> bool:
        """Whether the step just counted is a multiple of `interval` or the last one; never for an interval of 0."""
        step = self.state.step
        return interval > 0 and (step % interval == 0 or step == self.train_config.steps)

    def _validates(self) -> bool:
        return self._due(self.train_config.eval_interval) and bool(self.run.data.num_held_out)

    def _log(self) -> None:
        """Report the mean loss per token of the steps since the last report, over all ranks, without skipped steps."""
        records = [record for record in self._unreported if math.isfinite(record.loss)]
        self._unreported = []
        if self.monitor and records:
            count = sum(record.tokens for record in records)
            loss = sum(record.loss * record.tokens for record in records) / count
            norm = None if self.last.grad_norm is None else float(self.last.grad_norm)
            norm = norm if norm is not None and math.isfinite(norm) else None
            self.monitor.step(self.state.step, loss, self.engine.learning_rate(), norm, self.state.tokens, count)

    def _validate(self) -> bool:
        """Measure the loss on the held-out documents; returns whether it is the lowest so far."""
        ours, plan = self.run.config.megatronish, self.run.plan
        self._mark("validating")
        start = time.monotonic()
        windows = ours.train.eval_tokens and max(1, ours.train.eval_tokens // ours.model.seq_length)
        batches = self.run.data.validation_batches(
            plan.micro, self.mesh.dp.rank, plan.data_size, ours.data.document_mask, windows
        )
        loss_sum, count = self.engine.evaluate(to_device(batch, self.device) for batch in batches)
        loss = (loss_sum / count).item()
        is_best = self.state.best_loss is None or loss < self.state.best_loss
        if is_best:
            self.state = replace(self.state, best_loss=loss)
        if self.monitor:
            seconds = time.monotonic() - start
            self.monitor.validation(self.state.step, loss, int(count.item()), seconds, is_best)
            self.monitor.pause_ends(seconds)
        return is_best

    def _save(self, is_best: bool) -> None:
        """Save a checkpoint, in the background where the host has the memory for a copy of the state."""
        start = time.monotonic()
        self._mark("saving")
        reason = "" if self.engine.can_move else "DeepSpeed writes this optimizer's state"
        shard = self.engine.optimizer_shard()
        wanted = (shard.bytes if shard else 0) + (self.engine.weight_bytes() if self.rank.is_first else 0)
        reason = reason or self.saver.reason_to_wait(wanted - self.staging.bytes)
        seconds = self.saver.save(
            self.state.step,
            lambda in_background: take_snapshot(
                self.run,
                self.state,
                self.engine,
                shard,
                self.loader.stream_states(),
                self.staging if in_background else None,
            ),
            is_best,
            reason=reason,
        )
        if self.monitor:
            self.monitor.pause_ends(seconds)
        self._stops.save_took(max(time.monotonic() - start, self.saver.usual_seconds))
