"""Pretraining: everything is checked first, then the ranks meet, then steps, validations and checkpoints alternate."""

from __future__ import annotations

import hashlib
import json
import math
import shutil
import time
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.distributed as dist

from megatronish import __version__
from megatronish.config.base import ConfigError, UserError
from megatronish.config.model import ModelConfig
from megatronish.config.parallel import ParallelConfig
from megatronish.config.run import BatchPlan, RunConfig
from megatronish.data.dataset import Dataset, check_tokenizer_fits
from megatronish.data.loader import MicroBatchLoader
from megatronish.data.sampler import MicroBatchSampler
from megatronish.data.training_data import TrainingData, open_training_data
from megatronish.interop.huggingface import HuggingFaceWeights
from megatronish.interop.tokenizer_files import fingerprints
from megatronish.model.accounting import flops_per_token, layer_costs, parameter_counts
from megatronish.model.checkpoints import TOKENIZER_RECORD_FILE
from megatronish.model.init import init_weights
from megatronish.model.transformer import Transformer
from megatronish.model.weights import load_config, save_model
from megatronish.parallel.ending import SHUTDOWN_SECONDS, end_within
from megatronish.parallel.layers import TensorParallel
from megatronish.parallel.meeting import Meeting, meet_by_environment
from megatronish.parallel.mesh import ParallelMesh, build_mesh
from megatronish.parallel.pipeline import balanced_stages
from megatronish.parallel.startup import Rank, has_gpu
from megatronish.parallel.watchdog import Watchdog
from megatronish.training.checkpoint import ENGINE_TAG, RUN_FILE, CheckpointStore, check_writable
from megatronish.training.engine import (
    Batch,
    device,
    gathered,
    partitioned_construction,
    start_engine,
    start_process_group,
    stop_process_group,
)
from megatronish.training.fragments import SavedFragments
from megatronish.training.held_state import can_move
from megatronish.training.memory import fit_to_host
from megatronish.training.monitor import Monitor, clock
from megatronish.training.peak import Peak, find_peak
from megatronish.training.schedules import rate_share
from megatronish.training.state import TrainState, load_streams, save_streams

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
CPU_EFFICIENCY = 0.4  # of the measured matmul rate, for the first guess of a step's time
SLOW_STEP_SECONDS = 60.0


class TrainingStopped(UserError):
    """Training cannot go on: the loss is no number."""


@dataclass(frozen=True)
class Prepared:
    """A run that has passed every check that needs no other rank."""

    config: RunConfig
    plan: BatchPlan
    data: TrainingData
    run_dir: Path
    resume_from: Path | None
    state: TrainState
    moved: str = ""  # how the layout differs from that of the checkpoint
    imported: HuggingFaceWeights | None = None  # what a run begins with instead of random weights


def prepare(config: RunConfig, rank: Rank) -> Prepared:
    """Check data, batch arithmetic, folder and checkpoint before any process group exists. Raises UserError."""
    ours = config.megatronish
    plan = config.batch_plan(ours.parallel.data_size(rank.world_size))
    if not has_gpu():
        kind, recompute = config.deepspeed.dtype, ours.train.activation_checkpointing
        plan = fit_to_host(plan, ours.model, kind, recompute, rank.local_world_size)
    data = open_training_data(
        ours.data,
        seq_length=ours.model.seq_length,
        vocab_size=ours.model.vocab_size,
        seed=ours.train.seed,
        samples=ours.train.steps * plan.samples,
        group=plan.samples,
    )
    run_dir = Path(ours.train.save_dir)
    check_writable(run_dir)
    state = TrainState.start(config, plan, data.fingerprint, data.order)
    found = CheckpointStore(run_dir, ours.train.keep_last, rank.is_first, lambda: None).find(ours.train.resume)
    if found is None:
        imported = None
        if ours.model.from_hf is not None:
            imported = HuggingFaceWeights(ours.model.from_hf, ours.model)
            check_imported_tokenizer(Path(ours.model.from_hf), data)
        return Prepared(config, plan, data, run_dir, found, state, imported=imported)
    check_same_model(found, config)
    check_same_tokenizer(found, data)
    moves = check_engine_state(found, ours.model) and can_move(config)
    saved = TrainState.load(found)
    moved = saved.moved(state)
    state = saved.continue_as(state, found, moves=moves)
    check_streams(found, saved, state)
    return Prepared(config, plan, data, run_dir, found, state, moved)


def check_same_model(checkpoint: Path, config: RunConfig) -> None:
    """Refuse a checkpoint of another model. Raises ConfigError naming the fields that differ."""
    try:
        saved = load_config(checkpoint)
    except ValueError as error:
        raise ConfigError(str(error)) from None
    now = config.megatronish.model
    differing = [
        f"{name} {getattr(saved, name)} (this run: {getattr(now, name)})"
        for name in type(now).model_fields
        if name not in ("preset", "from_hf") and getattr(saved, name) != getattr(now, name)
    ]
    if differing:
        raise ConfigError(
            f"{checkpoint} is of another model: {', '.join(differing)}. Give that model's fields, "
            "or train this one in another --train.save_dir."
        )


def check_same_tokenizer(checkpoint: Path, data: TrainingData) -> None:
    """Refuse data whose token ids mean something else than those the checkpoint learned. Raises UserError."""
    path = checkpoint / TOKENIZER_RECORD_FILE
    try:
        learned = json.loads(path.read_text(encoding="utf-8"))["sha256"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{path}: cannot be read ({error!r}); use an older checkpoint.") from None
    record = data.tokenizer_record
    check_tokenizer_fits(record, record.vocab_size, learned, place=data.sources[0].name)


def check_imported_tokenizer(folder: Path, data: TrainingData) -> None:
    """Refuse data whose token ids mean something else than those the imported model learned. Raises ConfigError."""
    learned, record = fingerprints(folder), data.tokenizer_record
    if learned and record.sha256 not in learned:
        raise ConfigError(
            f"{data.sources[0].name} was made with another tokenizer than that of the model in model.from_hf {folder}: its "
            f"token ids mean something else there. Prepare the data with --tokenizer-model {folder}."
        )


def check_engine_state(checkpoint: Path, model: ModelConfig) -> bool:
    """Whether the checkpoint's optimizer state can be read by any layout.

    Raises ConfigError where there is none, as in a copy made for inference, or not all of it.
    """
    folder = checkpoint / ENGINE_TAG
    if saved := SavedFragments(folder):
        with torch.device("meta"):
            saved.check_whole(name for name, _ in Transformer(model, seed=None).named_parameters())
        return True
    if not any(folder.glob("*.pt")):
        raise ConfigError(
            f"{folder} holds no training state, so this checkpoint can be read but not continued. "
            "Use another one, or begin afresh with --train.resume never and another --train.save_dir."
        )
    return False


def check_streams(checkpoint: Path, saved: TrainState, now: TrainState) -> None:
    """Refuse to divide streamed text anew among other ranks. Raises ConfigError."""
    if saved.data_size != now.data_size and load_streams(checkpoint, 0) is not None:
        raise ConfigError(
            f"{checkpoint} was saved with {saved.data_size} data-parallel ranks, each in a place of its own in streamed text; "
            f"this run has {now.data_size}. Start with {saved.data_size} to continue it."
        )


def pretrain(config: RunConfig, rank: Rank) -> Path:
    """Train the run to its last step; returns the run's folder. Every rank calls it.

    Raises UserError for whatever the user can mend, before the ranks meet wherever it can be known by then.
    """
    run = prepare(config, rank)
    if run.state.step >= config.megatronish.train.steps:
        if rank.is_first:
            print(f"{run.resume_from} is already at step {run.state.step}: nothing left to train. Raise --train.steps.")
        return run.run_dir
    meeting = meet_by_environment(config.megatronish.train.start_timeout, what_ranks_share(config))
    try:
        with start_watchdog(meeting, config) as watchdog:
            start_process_group(collective_minutes(config.megatronish.train.hang_timeout), meeting)
            _Trainer(run, rank, watchdog).train()
    except BaseException:
        end_within(SHUTDOWN_SECONDS, status=1)  # peers may wait for this rank in a collective: the launcher ends them
        raise
    stop_process_group()
    return run.run_dir


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

    def __init__(self, run: Prepared, rank: Rank, watchdog: Watchdog | None) -> None:
        self._watchdog = watchdog
        ours = run.config.megatronish
        self.run, self.rank, self.train_config, self.schedule = run, rank, ours.train, ours.schedule
        self.device, self.state = device(), run.state
        self.dtype = DTYPES[run.config.deepspeed.dtype]
        self.flops = flops_per_token(ours.model).train
        self.store = CheckpointStore(run.run_dir, ours.train.keep_last, rank.is_first, dist.barrier)
        peak = find_peak(self.device, self.dtype)
        if rank.is_first:
            self._announce(peak)
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
        """Steps up to the last one, then the loader and the logs are closed."""
        try:
            self._steps()
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
        start = time.monotonic()
        weights = self.engine.weights()

        def write(folder: Path) -> None:
            self.engine.save(folder, ENGINE_TAG)
            streams = self.loader.stream_states()
            if self.mesh.tp.rank == self.mesh.sp.rank == self.mesh.pp.rank == 0:  # the others read what this one reads
                save_streams(folder, self.mesh.dp.rank, streams)
            if self.rank.is_first:
                save_model(folder, weights, self.run.config.megatronish.model, metadata={"step": str(done)})
                copy_tokenizer(self.run.data, folder)
                self.run.config.save(folder / RUN_FILE)
                self.state.save(folder)

        saved = self.store.save(done, write, is_best)
        if self.monitor:
            self.monitor.say(f"saved {saved}")
            self.monitor.pause_ends(time.monotonic() - start)

    def _announce(self, peak: Peak | None) -> None:
        """Say once what is about to be trained, on what, and write the resolved configuration."""
        config, run, plan = self.run.config, self.run, self.run.plan
        ours, tokens = config.megatronish, run.data.tokens_of(0, plan.samples)
        counts = parameter_counts(ours.model)
        if self.device.type == "cpu":
            step_seconds = tokens * self.flops / (peak.flops * CPU_EFFICIENCY) if peak else 0.0
            slow = f"; a step may take about {clock(step_seconds)}" if step_seconds > SLOW_STEP_SECONDS else ""
            print(
                f"No GPU here: training on CPU, {self.rank.world_size} rank(s) x {torch.get_num_threads()} thread(s){slow}."
                + (" Try --model.preset tiny." if slow else "")
            )
        asked = config.batch_plan(plan.data_size)
        if asked != plan:
            print(
                f"Micro batch {asked.micro} -> {plan.micro}, accumulation {asked.accumulation} -> {plan.accumulation} "
                "to fit this machine's memory: the same samples and the same mean loss a step."
            )
        print(json.dumps(config.to_json(), indent=None, separators=(", ", ": ")))
        config.save(run.run_dir / RUN_FILE)
        stage, kind = config.deepspeed.zero_optimization.stage, config.deepspeed.dtype
        print(
            f"model {ours.model.preset or 'custom'}: {counts.total:,} parameters, {self.flops / 1e9:.3g} GFLOP a token; "
            f"{kind}, ZeRO-{stage}, {config.deepspeed.optimizer.type}; {tokens:,} tokens a step "
            f"({plan.micro} micro x {plan.accumulation} accumulation x {plan.data_size} ranks x {ours.model.seq_length})"
            + describe(ours.parallel)
        )
        print("\n".join(run.data.describe(ours.train.steps * plan.samples)))
        if ours.schedule.warmup_steps >= ours.train.steps:
            print(
                f"note: schedule.warmup_steps {ours.schedule.warmup_steps} lasts the whole run: lr stays below its peak"
            )
        if peak:
            print(f"MFU is of {peak.flops / 1e12:.4g} TFLOP/s: {peak.source}")
        if run.imported:
            print(f"beginning with the weights of {run.imported.folder}")
        if run.resume_from:
            print(f"continuing {run.resume_from} at step {run.state.step}" + (f": {run.moved}" if run.moved else ""))
            before = run.state.samples / run.state.step
            if before != plan.samples:
                print(
                    f"note: a step was {before:g} samples so far and is {plan.samples} from here on; give --train_batch_size "
                    f"{before:.0f} to go on as before"
                )


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


def describe(parallel: ParallelConfig) -> str:
    """How a sample is divided over ranks, for the announcement; '' when it is not."""
    told = f"; every matrix over {parallel.tensor} tensor-parallel ranks" if parallel.tensor > 1 else ""
    told += ", the sequence too" if parallel.tensor_sequence else ""
    told += f"; every sequence over {parallel.sequence} ranks" if parallel.sequence > 1 else ""
    return told + (f"; layers over {parallel.pipeline} pipeline stages" if parallel.pipeline > 1 else "")


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
