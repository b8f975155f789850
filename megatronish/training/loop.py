"""Pretraining: everything is checked first, then the ranks meet, then steps, validations and checkpoints alternate."""

from __future__ import annotations

import hashlib
import json
import math
import shutil
import time
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path

import torch

from megatronish import __version__
from megatronish.config.errors import ConfigError, UserError
from megatronish.config.run import BatchPlan, RunConfig
from megatronish.data.dataset import Dataset
from megatronish.data.loader import MicroBatchLoader
from megatronish.data.sampler import MicroBatchSampler
from megatronish.data.training_data import TrainingData
from megatronish.interop.huggingface import HuggingFaceWeights
from megatronish.model.accounting import flops_per_token, layer_costs
from megatronish.model.checkpoints import TOKENIZER_RECORD_FILE
from megatronish.model.init import init_weights
from megatronish.model.transformer import Transformer
from megatronish.model.weights import WEIGHTS_FILE, save_model
from megatronish.parallel.agreement import Agreement
from megatronish.parallel.ending import SHUTDOWN_SECONDS, end_within
from megatronish.parallel.layers import TensorParallel
from megatronish.parallel.meeting import Meeting, meet_by_environment
from megatronish.parallel.mesh import ParallelMesh, build_mesh
from megatronish.parallel.pipeline import balanced_stages
from megatronish.parallel.startup import Rank, has_gpu
from megatronish.parallel.watchdog import Watchdog
from megatronish.training.announcement import announce
from megatronish.training.checkpoint import ENGINE_TAG, RUN_FILE, CheckpointStore
from megatronish.training.engine import (
    Batch,
    device,
    gathered,
    partitioned_construction,
    start_engine,
    start_process_group,
    stop_process_group,
)
from megatronish.training.host_copies import HostCopies
from megatronish.training.monitor import Monitor
from megatronish.training.peak import find_peak
from megatronish.training.preparation import Prepared, prepare
from megatronish.training.resume import settle_resume
from megatronish.training.run_lock import hold_run_dir
from megatronish.training.saving import Saver, Snapshot
from megatronish.training.schedules import rate_share
from megatronish.training.state import load_streams, save_streams

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class TrainingStopped(UserError):
    """Training cannot go on: the loss is no number."""


def pretrain(config: RunConfig, rank: Rank) -> Path:
    """Train the run to its last step; returns the run's folder. Every rank calls it.

    Raises UserError for whatever the user can mend, before the ranks meet wherever it can be known by then.
    """
    run_dir = Path(config.megatronish.train.save_dir)
    with hold_run_dir(run_dir, rank.is_first):
        run = prepare(config, rank)
        meeting = meet_by_environment(config.megatronish.train.start_timeout, what_ranks_share(config))
        run = settle_resume(run, meeting)
        if run.state.step < config.megatronish.train.steps:
            train_together(run, rank, meeting)
        elif rank.is_first:
            print(f"{run.resume_from} is already at step {run.state.step}: nothing left to train. Raise --train.steps.")
    return run_dir


def train_together(run: Prepared, rank: Rank, meeting: Meeting) -> None:
    """Train with the ranks of the meeting, and leave them in bounded time whatever comes."""
    train = run.config.megatronish.train
    try:
        with start_watchdog(meeting, run.config) as watchdog:
            start_process_group(collective_minutes(train.hang_timeout), meeting)
            _Trainer(run, rank, watchdog, meeting).train()
    except BaseException:
        end_within(SHUTDOWN_SECONDS, status=1)  # peers may wait for this rank in a collective: the launcher ends them
        raise
    stop_process_group()


def what_ranks_share(config: RunConfig) -> dict[str, str]:
    """What every rank must have been told alike."""
    digest = hashlib.sha256(json.dumps(config.to_json(), sort_keys=True).encode()).hexdigest()
    return {"configuration": digest[:12], "megatronish_version": __version__, "torch_version": torch.__version__}


def start_watchdog(meeting: Meeting, config: RunConfig) -> AbstractContextManager[Watchdog | None]:
    """Watch this rank and the run, unless train.hang_timeout is 0."""
    train, on_cpu = config.megatronish.train, not has_gpu()
    if not train.hang_timeout:
        return nullcontext()
    compare = (
        on_cpu and config.megatronish.parallel.pipeline == 1
    )  # pipeline stages wait for one another by their nature
    return Watchdog(meeting, train.hang_timeout, Path(train.save_dir), count_cpu=on_cpu, compare=compare)


def collective_minutes(hang_timeout: float) -> float:
    """How long a collective may last: torch's half an hour, or longer than the watchdog ever waits."""
    return max(30.0, 11 * hang_timeout / 60)


class _Trainer:
    """The loop of one rank."""

    def __init__(self, run: Prepared, rank: Rank, watchdog: Watchdog | None, meeting: Meeting) -> None:
        self._watchdog = watchdog
        ours = run.config.megatronish
        self.run, self.rank, self.train_config, self.schedule = run, rank, ours.train, ours.schedule
        self.device, self.state = device(), run.state
        self.dtype = DTYPES[run.config.deepspeed.dtype]
        self.flops = flops_per_token(ours.model).train
        self.store = CheckpointStore(run.run_dir, ours.train.keep_last, ours.train.keep_every)
        self.copies = HostCopies()
        self.saver = Saver(
            self.store,
            Agreement(meeting, "checkpoints"),
            background=ours.train.async_save,
            stop_on_error=ours.train.on_save_error == "stop",
            tell=self._say,
            local_ranks=rank.local_world_size,
        )
        peak = find_peak(self.device, self.dtype)
        if rank.is_first:
            announce(run, rank, self.device, peak)
        self.mesh = build_mesh(ours.parallel, self.device.type)
        model = build_model(run.config, run.plan, self.mesh, run.imported)
        self.engine = start_engine(model, run.config, run.plan, self.mesh)
        if run.resume_from:
            self.engine.load(run.resume_from, ENGINE_TAG)
        sampler = MicroBatchSampler(
            self.state.samples, run.plan.samples, run.plan.micro, self.mesh.dp.rank, run.plan.data_size
        )
        self.loader = MicroBatchLoader(
            run.data.train,
            sampler,
            document_mask=ours.data.document_mask and ours.data.pack,  # unpacked, a row is one document anyway
            num_workers=ours.data.num_workers,
            prefetch=2 * run.plan.accumulation,
            pin_memory=self.device.type == "cuda",
            stream_states=load_streams(run.resume_from, self.mesh.dp.rank) if run.resume_from else None,
        )
        self.monitor = None
        if rank.is_first:
            self.monitor = Monitor(run.config, run.run_dir, self.state.step, self.flops, peak, self.device)

    def _mark(self, phase: str, step: int) -> None:
        if self._watchdog:
            self._watchdog.mark(phase, step)

    def train(self) -> None:
        """Steps up to the last one, then the last checkpoint is waited for, and the loader and the logs are closed."""
        try:
            self._steps()
            self._mark("saving", self.state.step)
            self.saver.finish()
        except BaseException:
            self.saver.abandon()
            raise
        finally:
            self.loader.close()
            if self.monitor:
                self.monitor.close()

    def _steps(self) -> None:
        config, plan = self.train_config, self.run.plan
        losses: list[torch.Tensor] = []
        tokens: list[torch.Tensor] = []
        for step in range(self.state.step, config.steps):
            self._mark("training", step)
            torch.manual_seed(step_seed(config.seed, step, random_stream(self.mesh, self.run.config)))
            batches = [to_device(next(self.loader), self.device) for _ in range(plan.accumulation)]
            share = rate_share(step, config.steps, self.schedule)
            result = self.engine.train_step(batches, share)
            losses.append(result.loss_sum)
            tokens.append(result.tokens)
            done, last = step + 1, step + 1 == config.steps
            self.state = self.state.advance(plan.samples, self.run.data.tokens_of(self.state.samples, plan.samples))
            if self.monitor and step == self.run.state.step:
                self.monitor.first_step()
            if done % config.log_interval == 0 or last:
                self._report(done, losses, tokens, result.grad_norm)
                losses, tokens = [], []
            is_best = self._validate(done) if self._validates_at(done) else False
            if done % config.save_interval == 0 or last or is_best:
                self._save(done, is_best)

    def _report(
        self, done: int, losses: list[torch.Tensor], tokens: list[torch.Tensor], norm: float | torch.Tensor | None
    ) -> None:
        """Mean loss of the steps since the last report, over all ranks; stops when it is no number."""
        total = torch.stack(losses).sum()
        self.mesh.data.sum_(total)
        count = torch.stack(tokens).sum().item()
        loss = total.item() / count
        if self.monitor:
            grad_norm = None if norm is None else float(norm)
            self.monitor.step(done, loss, self.engine.learning_rate(), grad_norm, self.state.tokens, int(count))
        if not math.isfinite(loss):
            raise TrainingStopped(
                f"the loss is {loss} at step {done}. The last checkpoint is {self.store.newest()}. "
                "Lower --optimizer.params.lr, lengthen --schedule.warmup_steps, or clip with --gradient_clipping 1.0."
            )

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
        reason = reason or self.saver.reason_to_wait(self.engine.state_bytes() - self.copies.bytes)
        seconds = self.saver.save(done, self._snapshot, is_best, reason=reason)
        if self.monitor:
            self.monitor.pause_ends(seconds)

    def _snapshot(self, in_background: bool) -> Snapshot:
        """What this rank writes of the state as it is now; copied, if training goes on before it is written."""
        copies = self.copies if in_background else None
        engine, weights = self.engine.snapshot(ENGINE_TAG, copies), self.engine.weights()
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

        return Snapshot(engine.bytes + sum(tensor.nbytes for tensor in weights.values()), write)

    def _say(self, text: str) -> None:
        if self.monitor:
            self.monitor.say(text)


def build_model(
    config: RunConfig, plan: BatchPlan, mesh: ParallelMesh, imported: HuggingFaceWeights | None = None
) -> Transformer:
    """This rank's part of the run's model with its initial weights, partitioned from the start under ZeRO-3.

    imported: the weights to begin with instead of random ones; a tensor is read at a time. Raises ConfigError for a
    kernel that is asked for by name and not installed.
    """
    ours, zero3 = config.megatronish, config.deepspeed.zero_optimization.stage == 3
    try:
        with partitioned_construction(config, plan):
            tp = TensorParallel(mesh.tp, ours.parallel.tensor_sequence)
            costs = layer_costs(ours.model, ours.parallel.pipeline_balance)
            stage = balanced_stages(costs, mesh.pp.size)[mesh.pp.rank]
            seed = None if zero3 or imported else ours.train.seed
            model = Transformer(ours.model, ours.kernels, seed=seed, tp=tp, stage=stage, sp=mesh.sp)
    except ValueError as error:
        raise ConfigError(str(error)) from None
    if zero3 or imported:
        draw, gather = imported.initial if imported else None, gathered if zero3 else None
        init_weights(model, ours.model, ours.train.seed, gather=gather, draw=draw)
    if imported:
        imported.close()
    model.set_activation_checkpointing(ours.train.activation_checkpointing)
    if ours.train.compile:
        model.compile_blocks(ours.train.compile_mode)
    return model


def to_device(batch: Batch, target: torch.device) -> Batch:
    """The batch with its tensors on the device; from pinned memory the copies run beside the computation."""
    return {
        key: value.to(target, non_blocking=True) if isinstance(value, torch.Tensor) else value
        for key, value in batch.items()
    }


def copy_tokenizer(data: Dataset | TrainingData, folder: Path) -> None:
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
