"""Pretraining: everything is checked first, then the ranks meet, then steps, validations and checkpoints alternate."""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
import time
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megatronish import __version__
from megatronish.checkpoint.optimizer_shards import OptimizerShard
from megatronish.checkpoint.paths import RUN_FILE, TOKENIZER_RECORD_FILE
from megatronish.checkpoint.run_lock import hold_run_dir
from megatronish.checkpoint.saver import CheckpointSnapshot, Saver
from megatronish.checkpoint.staging import StagingBuffers
from megatronish.checkpoint.store import ENGINE_TAG
from megatronish.checkpoint.train_state import LAYOUT, TrainState, load_streams, save_streams
from megatronish.checkpoint.weights import WEIGHTS_FILE, save_model
from megatronish.config.run import RunConfig
from megatronish.data.loader import MicroBatchLoader
from megatronish.data.samples.dataset import IndexedDataset
from megatronish.data.samples.sampler import MicroBatchSampler
from megatronish.data.training_data import TrainingData
from megatronish.errors import UserError
from megatronish.launch.consensus import Consensus
from megatronish.launch.exit import EXIT_SAVED, INTERRUPTED_SECONDS, SHUTDOWN_SECONDS, exit_within
from megatronish.launch.process import Rank, has_gpu
from megatronish.launch.rendezvous import Rendezvous, join_rendezvous_from_env
from megatronish.launch.watchdog import Watchdog
from megatronish.model.accounting import flops_per_token
from megatronish.ops.dtypes import DTYPES
from megatronish.parallel.mesh import ParallelMesh, build_mesh
from megatronish.training.engine import (
    device,
    start_engine,
    start_process_group,
    stop_process_group,
)
from megatronish.training.memory import (
    GIB,
    ActivationBudget,
    OutOfMemory,
    longest_batch,
    rehearse,
    relief,
    told,
)
from megatronish.training.monitoring.black_box import BAD, SPIKE, TrainedStep
from megatronish.training.monitoring.incidents import Incidents
from megatronish.training.monitoring.metrics import Monitor
from megatronish.training.monitoring.mfu import find_peak
from megatronish.training.monitoring.spikes import BadSteps, spike_score
from megatronish.training.schedules import learning_rate_multiplier
from megatronish.training.setup.announcement import announce
from megatronish.training.setup.construction import build_model
from megatronish.training.setup.preparation import Prepared, prepare
from megatronish.training.setup.resume_point import choose_resume_point
from megatronish.training.step import Batch, StepResult
from megatronish.training.step_agreement import StepAgreement, StepRecord
from megatronish.training.stopping import StopRequests, seconds_left


def pretrain(config: RunConfig, rank: Rank) -> int:
    """Train the run to its last step; returns the exit status: 0, or EXIT_SAVED if it was asked to stop. Every rank calls it.

    Raises UserError for whatever the user can mend, before the ranks meet wherever it can be known by then.
    """
    train = config.megatronish.train
    stops = StopRequests(seconds_left(train.time_limit, os.environ))
    with hold_run_dir(Path(train.save_dir), rank.is_first):
        run = prepare(config, rank)
        rendezvous = join_rendezvous_from_env(train.start_timeout, what_ranks_share(config))
        run = choose_resume_point(run, rendezvous)
        if run.state.step < train.steps:
            return train_together(run, rank, rendezvous, stops)
        if rank.is_first:
            print(f"{run.resume_from} is already at step {run.state.step}: nothing left to train. Raise --train.steps.")
    return 0


def train_together(run: Prepared, rank: Rank, rendezvous: Rendezvous, stops: StopRequests) -> int:
    """Train with the ranks of the rendezvous, and leave them in bounded time whatever comes; returns the exit status."""
    train = run.config.megatronish.train
    try:
        with start_watchdog(rendezvous, run.config) as watchdog:
            start_process_group(collective_minutes(train.hang_timeout), rendezvous)
            stopped_by = Trainer(run, rank, watchdog, stops, rendezvous).train()
    except BaseException as error:
        # Peers may wait for this rank in a collective: the launcher ends them.
        interrupted = isinstance(error, KeyboardInterrupt)
        status = 130 if interrupted else 2 if isinstance(error, UserError) else 1
        exit_within(INTERRUPTED_SECONDS if interrupted else SHUTDOWN_SECONDS, status)
        raise
    stop_process_group()
    return EXIT_SAVED if stopped_by else 0


def what_ranks_share(config: RunConfig) -> dict[str, str]:
    """What every rank must have been told alike."""
    digest = hashlib.sha256(json.dumps(config.to_json(), sort_keys=True).encode()).hexdigest()
    return {"configuration": digest[:12], "megatronish_version": __version__, "torch_version": torch.__version__}


def start_watchdog(rendezvous: Rendezvous, config: RunConfig) -> AbstractContextManager[Watchdog | None]:
    """Watch this rank and the run, unless train.hang_timeout is 0."""
    train, on_cpu = config.megatronish.train, not has_gpu()
    if not train.hang_timeout:
        return nullcontext()
    compare = (
        on_cpu and config.megatronish.parallel.pipeline == 1
    )  # pipeline stages wait for one another by their nature
    return Watchdog(rendezvous, train.hang_timeout, Path(train.save_dir), count_cpu=on_cpu, compare=compare)


def collective_minutes(hang_timeout: float) -> float:
    """How long a collective may last: torch's half an hour, or longer than the watchdog ever waits."""
    return max(30.0, 11 * hang_timeout / 60)


class Trainer:
    """The loop of one rank."""

    def __init__(
        self, run: Prepared, rank: Rank, watchdog: Watchdog | None, stops: StopRequests, rendezvous: Rendezvous
    ) -> None:
        self._watchdog, self._stops = watchdog, stops
        ours = run.config.megatronish
        self.run, self.rank, self.train_config, self.schedule = run, rank, ours.train, ours.schedule
        self.device, self.state = device(), run.state
        self.dtype = DTYPES[run.config.deepspeed.dtype]
        self.flops = flops_per_token(ours.model).train
        self.store = run.store
        self.copies = StagingBuffers()
        self.saver = Saver(
            self.store,
            Consensus(rendezvous, "checkpoints"),
            background=ours.train.async_save,
            stop_on_error=ours.train.on_save_error == "stop",
            report=self._say,
            local_ranks=rank.local_world_size,
        )
        peak = find_peak(self.device, self.dtype)
        if rank.is_first:
            announce(run, rank, self.device, peak)
        self.mesh = build_mesh(ours.parallel, self.device.type)
        model = build_model(run.config, run.plan, self.mesh, run.imported)
        self.engine = start_engine(model, run.config, run.plan, self.mesh)
        if run.resume_from:
            self.engine.load(run.resume_from, ENGINE_TAG, run.shards)
        self.loader = self._open_loader(run.resume_from)
        self.monitor = None
        if rank.is_first:
            self.monitor = Monitor(run.config, run.run_dir, self.state.step, self.flops, peak, self.device)
        self.agreement = StepAgreement(self.device, self.mesh.tp.size * self.mesh.pp.size)
        self.bad_steps = BadSteps(ours.train.max_skipped_steps)
        self.incidents = Incidents(run, rank, self.engine, self.store)
        self.last: TrainedStep  # of this process
        self.recompute: str = ours.train.activation_checkpointing
        self._unreported: list[StepRecord] = []
        self._spiking = False

    def _open_loader(self, checkpoint: Path | None) -> MicroBatchLoader:
        """This rank's micro batches from where the state stands; checkpoint: where streamed text is taken up again."""
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

    def _mark(self, phase: str, step: int) -> None:
        if self._watchdog:
            self._watchdog.mark(phase, step)

    def train(self) -> str | None:
        """Steps up to the last one, then the last checkpoint is waited for and all is closed; why it ended before, if it did."""
        try:
            with self._stops:
                self._rehearse()
                stopped_by = self._steps()
                self._mark("saving", self.state.step)
                self.saver.finish()
                return stopped_by
        except KeyboardInterrupt:
            self.saver.abandon(0.0)  # the second one: at once
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
        config = self.train_config
        while self.state.step < config.steps:
            start = time.monotonic()
            self._mark("training", self.state.step)
            result = self.next_step(self.next_batches())
            if result is not None and result.out_of_memory:
                self._relieve(f"out of memory in step {self.state.step + 1}, which is done again")
                continue
            done = self.state.step
            last = done == config.steps
            if self.monitor and done == self.run.state.step + 1:
                self.monitor.first_step()
            reports, saves = done % config.log_interval == 0 or last, done % config.save_interval == 0 or last
            bad = result is not None and result.bad
            records = self.agreement.settled(reports or saves or bad or self._validates_at(done))
            if result is not None:
                self._count(result.bad, records)
            if self._went_back(records):
                continue
            if reports:
                self._report(done)
            is_best = self._validate(done) if self._validates_at(done) else False
            stop = next((record.stop for record in records if record.stop), None)
            if stop and self._went_back(self.agreement.settled(True)):
                continue  # and stop there
            self._stops.step_took(time.monotonic() - start)
            if saves or is_best or stop:
                self._timed_save(done, is_best)
            if stop and not last:
                self._say(f"stopped by {stop} after step {done}, saved; the same command goes on from here")
                return stop
        return None

    def next_batches(self) -> list[Batch]:
        """This rank's micro batches of the next step, on its device."""
        return [to_device(next(self.loader), self.device) for _ in range(self.run.plan.accumulation)]

    def seed(self) -> int:
        """Of the random numbers of this rank in the next step."""
        return step_seed(self.train_config.seed, self.state.step, random_stream(self.mesh, self.run.config))

    def next_step(self, batches: list[Batch]) -> StepResult | None:
        """Train on the micro batches of the next step, or pass them over (None), and count it done. Every rank calls it."""
        config, plan, step, seed = self.train_config, self.run.plan, self.state.step, self.seed()
        if self.state.leaves_out(plan.samples):
            self.state = self.state.advance(plan.samples, 0, updated=False)
            self._say(f"step {self.state.step} left out: its samples are among those of a loss spike")
            return None
        torch.manual_seed(seed)
        result = self.engine.train_step(
            batches, learning_rate_multiplier(step - self.state.skipped, config.steps, self.schedule)
        )
        if result.out_of_memory:
            return result
        tokens = self.run.data.train.num_inputs(self.state.samples, plan.samples)
        self.state = self.state.advance(plan.samples, tokens, updated=not result.bad)
        self.agreement.exchange(step + 1, result.loss_sum, result.tokens, self._stops.reason)
        self.last = TrainedStep(step + 1, batches, result.loss_sum, result.grad_norm, seed)
        self.incidents.remember(self.last)
        return result

    def _relieve(self, message: str) -> None:
        """Take smaller micro batches, or recompute more, so that a step fits. Raises OutOfMemory when nothing is left."""
        ours, dtype = self.run.config.megatronish, self.run.config.deepspeed.dtype
        found = relief(self.run.plan, self.recompute, ours.model.seq_length, dtype, self.device.type)
        if found is None:
            raise OutOfMemory(
                f"{message}, but a micro batch of one sample does not fit, and every block is recomputed already. Shorten "
                "--model.seq_length, or use more ranks with --zero_optimization.stage 3 or --parallel.tensor."
            )
        plan, self.recompute = found
        if plan != self.run.plan and self.loader.stream_states() is not None:
            raise OutOfMemory(
                f"{message}, and streamed text cannot be divided into other micro batches on the way. Start with "
                f"--train_micro_batch_size_per_gpu {plan.micro} --gradient_accumulation_steps {plan.accumulation}."
            )
        model: Any = self.engine.module.model
        model.set_activation_checkpointing(self.recompute)
        self._say(told(message, plan, self.recompute))
        self.run = replace(self.run, plan=plan)
        self.engine.set_plan(plan)
        self.incidents.run = self.run
        self.loader.close()
        self.loader = self._open_loader(None)

    def _rehearse(self) -> None:
        """Before the first step run the largest micro batch that can come, and take smaller ones until all ranks have room."""
        on_gpu = self.device.type == "cuda"
        if not self.engine.can_shrink or not (on_gpu or self.engine.budget):
            return
        model, module = self.run.config.megatronish.model, self.engine.module
        budget = self.engine.budget or ActivationBudget(module, None)
        while True:
            if on_gpu:
                torch.cuda.reset_peak_memory_stats(self.device)
            batch = longest_batch(self.run.plan.micro, model.seq_length, model.vocab_size, self.device)
            fits = torch.tensor(float(rehearse(module, batch, budget)), device=self.device)
            if dist.get_world_size() > 1:
                dist.all_reduce(fits, op=dist.ReduceOp.MIN)
            if fits:
                break
            self._relieve("the largest micro batch does not fit")
        peak = f", {torch.cuda.max_memory_allocated(self.device) / GIB:.2f} GiB at most" if on_gpu else ""
        self._say(f"the largest micro batch fits: it keeps {budget.used / GIB:.3g} GiB for its backward pass{peak}")

    def _count(self, bad: bool, records: list[StepRecord]) -> None:
        """Keep what is to be known of a step that was left out; raises TrainingStopped when they do not end."""
        if bad:
            self.saver.wait()
            box = self.incidents.record(BAD, records[-1].step, self.state, records[-1].loss)
            self._say(f"step {records[-1].step} left out: a loss or gradient is no number" + _kept(box))
        self.bad_steps.count(bad, self.state.step, self.store.newest() if bad else None)

    def _went_back(self, records: list[StepRecord]) -> bool:
        """Take up what is known of finished steps; whether one of them sent the run back to a checkpoint."""
        config = self.train_config
        for record in records:
            self._unreported.append(record)
            if not math.isfinite(record.loss):
                continue
            score = spike_score(self.state.losses, record.loss)
            rises, before = score > config.spike_threshold, self._spiking
            self._spiking = rises
            if rises and not before and config.on_spike != "ignore" and self._meet_spike(record, score):
                return True
            self.state = replace(self.state, losses=[*self.state.losses, record.loss][-config.spike_window :])
        return False

    def _meet_spike(self, record: StepRecord, score: float) -> bool:
        """Tell of a loss spike and keep its box; whether the run went back."""
        self.saver.wait()
        box = self.incidents.record(SPIKE, record.step, self.state, record.loss, score)
        told = (
            f"loss spike at step {record.step}: {record.loss:.4f}, {score:.1f} deviations above the median{_kept(box)}"
        )
        if self.train_config.on_spike == "warn":
            self._say(told)
            return False
        plan, first = self.run.plan, max(record.step - self.train_config.spike_steps, 0)
        checkpoint = self.incidents.checkpoint_before(first + 1)
        if checkpoint is None or self.state.rollbacks >= self.train_config.max_rollbacks:
            why = (
                "no checkpoint is old enough" if checkpoint is None else f"{self.state.rollbacks} rollbacks are enough"
            )
            self._say(f"{told}; not rolled back: {why}")
            return False
        samples = [self.state.samples - (self.state.step - step) * plan.samples for step in (first, record.step)]
        self._roll_back(checkpoint, samples)
        self._say(f"{told}; back at step {self.state.step}, samples {samples[0]} to {samples[1] - 1} will be left out")
        return True

    def _roll_back(self, checkpoint: Path, samples: list[int]) -> None:
        """Go on from a checkpoint of this run, without these samples [first, stop); that is saved at once."""
        self._mark("starting", self.state.step)
        now, saved = self.state, TrainState.load(checkpoint)
        layout = {name: getattr(now, name) for name in LAYOUT}
        left_out = [*now.left_out, samples]
        self.state = replace(saved, **layout, left_out=left_out, rollbacks=now.rollbacks + 1)
        self.engine.load(checkpoint, ENGINE_TAG)
        self.agreement.forget()
        self._unreported, self._spiking = [], False
        self.loader.close()
        self.loader = self._open_loader(checkpoint)
        if self.monitor:
            self.monitor.rewind(self.state.step)
        self._timed_save(self.state.step, False)

    def _say(self, text: str) -> None:
        if self.monitor:
            self.monitor.say(text)

    def _timed_save(self, done: int, is_best: bool) -> None:
        start = time.monotonic()
        self._save(done, is_best)
        self._stops.save_took(max(time.monotonic() - start, self.saver.usual_seconds))

    def _report(self, done: int) -> None:
        """Mean loss of the steps since the last report, over all ranks, without those that were left out."""
        records = [record for record in self._unreported if math.isfinite(record.loss)]
        self._unreported = []
        if self.monitor and records:
            count = sum(record.tokens for record in records)
            loss = sum(record.loss * record.tokens for record in records) / count
            norm = None if self.last.grad_norm is None else float(self.last.grad_norm)
            norm = norm if norm is not None and math.isfinite(norm) else None
            self.monitor.step(done, loss, self.engine.learning_rate(), norm, self.state.tokens, count)

    def _validates_at(self, done: int) -> bool:
        interval = self.train_config.eval_interval
        at = interval and (done % interval == 0 or done == self.train_config.steps)
        return bool(at and self.run.data.num_held_out)

    def _validate(self, done: int) -> bool:
        """Loss on the held-out documents; returns whether it is the lowest so far."""
        ours, plan = self.run.config.megatronish, self.run.plan
        self._mark("validating", done)
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
            self.monitor.validation(done, loss, int(count.item()), seconds, is_best)
            self.monitor.pause_ends(seconds)
        return is_best

    def _save(self, done: int, is_best: bool) -> None:
        self._mark("saving", done)
        reason = "" if self.engine.can_move else "DeepSpeed writes this optimizer's state"
        shard = self.engine.optimizer_shard()
        wanted = (shard.bytes if shard else 0) + (self.engine.weight_bytes() if self.rank.is_first else 0)
        reason = reason or self.saver.reason_to_wait(wanted - self.copies.bytes)
        seconds = self.saver.save(done, partial(self._snapshot, shard), is_best, reason=reason)
        if self.monitor:
            self.monitor.pause_ends(seconds)

    def _snapshot(self, shard: OptimizerShard | None, in_background: bool) -> CheckpointSnapshot:
        """What this rank writes of the state as it is now; copied, if training goes on before it is written."""
        copies = self.copies if in_background else None
        engine, weights = self.engine.snapshot(ENGINE_TAG, copies, shard), self.engine.weights()
        if copies:
            weights = {name: copies.take(f"weights/{name}", tensor) for name, tensor in weights.items()}
            copies.wait()
        state, streams = self.state, self.loader.stream_states()

        def write(folder: Path) -> list[Path]:
            written = engine.write(folder)
            if self.mesh.tp.rank == self.mesh.sp.rank == self.mesh.pp.rank == 0:  # the others read what this one reads
                save_streams(folder, self.mesh.dp.rank, streams)
            if self.rank.is_first:
                save_model(folder, weights, self.run.config.megatronish.model, metadata={"step": str(state.step)})
                copy_tokenizer(self.run.data, folder)
                self.run.config.save(folder / RUN_FILE)
                state.save(folder)
                written.append(folder / WEIGHTS_FILE)
            return written

        return CheckpointSnapshot(engine.bytes + sum(tensor.nbytes for tensor in weights.values()), write)


def _kept(box: Path | None) -> str:
    return f" (kept in {box})" if box else ""


def to_device(batch: Batch, target: torch.device) -> Batch:
    """The batch with its tensors on the device; from pinned memory the copies run beside the computation."""
    return {
        key: value.to(target, non_blocking=True) if isinstance(value, torch.Tensor) else value
        for key, value in batch.items()
    }


def copy_tokenizer(data: IndexedDataset | TrainingData, folder: Path) -> None:
    """Put the data's tokenizer beside the weights, so that a checkpoint can be used alone."""
    record = data.tokenizer_record
    if (source := data.tokenizer_file) is not None:
        suffix = ".model" if source.suffix == ".model" else ".json"
        shutil.copyfile(source, folder / f"tokenizer{suffix}")
    (folder / TOKENIZER_RECORD_FILE).write_text(
        json.dumps({"kind": record.kind, "eod_id": record.eod_id, "sha256": record.sha256}, indent=2) + "\n"
    )


def random_stream(mesh: ParallelMesh, config: RunConfig) -> int:
    """Which stream of random numbers a rank draws from: one a data-parallel rank, which is its number.

    Tensor-parallel ranks share it, for they hold the same activations, unless they divide the sequence.
    """
    parallel = config.megatronish.parallel
    return mesh.random_stream * parallel.tensor + mesh.tp.rank if parallel.tensor_sequence else mesh.random_stream


def step_seed(seed: int, step: int, stream: int) -> int:
    """Seed of the random numbers (dropout) of one step in one stream: distinct for any step and stream, 63 bits."""
    mixed = (seed * 0x9E3779B97F4A7C15 + step * 0xBF58476D1CE4E5B9 + stream * 0x94D049BB133111EB) & (2**64 - 1)
    return (mixed ^ (mixed >> 31)) >> 1
