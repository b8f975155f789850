"""What one rank can check alone before a run starts: data, batch arithmetic, the folder, the checkpoint to resume from."""

from __future__ import annotations

import json
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

from megatronish.checkpoint.optimizer_shards import SavedOptimizerShards
from megatronish.checkpoint.paths import TOKENIZER_RECORD_FILE
from megatronish.checkpoint.store import ENGINE_TAG, CheckpointStore, check_writable, no_good_checkpoint
from megatronish.checkpoint.train_state import TrainState, load_streams
from megatronish.checkpoint.weights import load_config
from megatronish.checkpoint.zero_state import can_move
from megatronish.config.model import ModelConfig
from megatronish.config.run import BatchPlan, RunConfig
from megatronish.data.samples.dataset import check_tokenizer_fits
from megatronish.data.training_data import TrainingData, open_training_data
from megatronish.errors import ConfigError
from megatronish.interop.huggingface import HuggingFaceWeights
from megatronish.interop.tokenizer_files import fingerprints
from megatronish.launch.process import Rank, has_gpu
from megatronish.model.transformer import Transformer
from megatronish.training.memory import fit_to_host


@dataclass(frozen=True)
class Prepared:
    """A run that has passed every check that needs no other rank."""

    config: RunConfig
    plan: BatchPlan
    data: TrainingData
    run_dir: Path
    store: CheckpointStore
    resume_from: Path | None
    state: TrainState
    shards: SavedOptimizerShards | None = field(default=None, repr=False)  # of resume_from, open until it is loaded
    moved: str = ""  # how the layout differs from that of the checkpoint
    imported: HuggingFaceWeights | None = None  # initial weights instead of random ones


def prepare(config: RunConfig, rank: Rank) -> Prepared:
    """Check data, batch arithmetic, folder and checkpoint before any process group exists. Raises UserError.

    The checkpoint is the first without visible faults; its files are verified by `resume_point.choose_resume_point` after the rendezvous.
    """
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
    store = CheckpointStore(run_dir, ours.train.keep_last, ours.train.keep_every)
    wanted = store.wanted(ours.train.resume)
    start = TrainState.start(config, plan, data.fingerprint, data.order)
    run = Prepared(config, plan, data, run_dir, store, None, start)
    if wanted:
        faults = {path: store.faults(path) for path in wanted}
        found = next((path for path in wanted if not faults[path]), None)
        if found is None:
            raise no_good_checkpoint(faults)
        return continue_from(run, found)
    if ours.model.from_hf is not None:
        run = replace(run, imported=HuggingFaceWeights(ours.model.from_hf, ours.model))
        check_imported_tokenizer(Path(ours.model.from_hf), data)
    return run


def continue_from(run: Prepared, found: Path) -> Prepared:
    """The run resumed from the checkpoint `found`. Raises UserError when that belongs to another run."""
    model = run.config.megatronish.model
    check_same_model(found, run.config)
    check_same_tokenizer(found, run.data)
    shards = open_optimizer_shards(found, model)
    moves = bool(shards) and can_move(run.config)
    fresh = TrainState.start(run.config, run.plan, run.data.fingerprint, run.data.order)
    saved = TrainState.load(found)
    state = saved.continue_as(fresh, found, moves=moves)
    check_streams(found, saved, state)
    return replace(run, resume_from=found, state=state, shards=shards, moved=saved.moved(fresh), imported=None)


def check_same_model(checkpoint: Path, config: RunConfig) -> None:
    """Raise ConfigError for a checkpoint of another model, naming the fields that differ."""
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
    """Raise UserError when the data was tokenized with another tokenizer than that of the checkpoint."""
    path = checkpoint / TOKENIZER_RECORD_FILE
    try:
        learned = json.loads(path.read_text(encoding="utf-8"))["sha256"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{path}: cannot be read ({error!r}); use an older checkpoint.") from None
    record = data.tokenizer_record
    check_tokenizer_fits(record, record.vocab_size, learned, place=data.sources[0].name)


def check_imported_tokenizer(folder: Path, data: TrainingData) -> None:
    """Raise ConfigError when the data was tokenized with another tokenizer than that of the imported model."""
    learned, record = fingerprints(folder), data.tokenizer_record
    if learned and record.sha256 not in learned:
        raise ConfigError(
            f"{data.sources[0].name} was made with another tokenizer than that of the model in model.from_hf {folder}: its "
            f"token ids mean something else there. Prepare the data with --tokenizer-model {folder}."
        )


def open_optimizer_shards(checkpoint: Path, model: ModelConfig) -> SavedOptimizerShards:
    """The checkpoint's optimizer state; empty if DeepSpeed wrote it, which can be read under the same layout only.

    Raises ConfigError if there is no optimizer state, as in a copy made for inference, or if it is incomplete.
    """
    folder = checkpoint / ENGINE_TAG
    shards = SavedOptimizerShards(folder)
    if shards:
        with torch.device("meta"):
            shards.check_complete(name for name, _ in Transformer(model, seed=None).named_parameters())
    elif not any(folder.glob("*.pt")):
        raise ConfigError(
            f"{folder} holds no training state, so this checkpoint can be read but not continued. "
            "Use another one, or begin afresh with --train.resume never and another --train.save_dir."
        )
    return shards


def check_streams(checkpoint: Path, saved: TrainState, now: TrainState) -> None:
    """Raise ConfigError for a checkpoint of streamed text and another number of data-parallel ranks."""
    if saved.data_size != now.data_size and load_streams(checkpoint, 0) is not None:
        raise ConfigError(
            f"{checkpoint} was saved with {saved.data_size} data-parallel ranks, each at its own position in streamed text; "
            f"this run has {now.data_size}. Start with {saved.data_size} to continue it."
        )
