"""What a checkpoint of a training run holds: the engine's state, weights, tokenizer, configuration and counters."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch.distributed as dist

from megatronish.checkpoint.optimizer_shards import OptimizerShard
from megatronish.checkpoint.paths import RUN_FILE, TOKENIZER_RECORD_FILE
from megatronish.checkpoint.saver import CheckpointSnapshot
from megatronish.checkpoint.staging import StagingBuffers
from megatronish.checkpoint.store import ENGINE_TAG
from megatronish.checkpoint.train_state import TrainState, save_streams
from megatronish.checkpoint.weights import WEIGHTS_FILE, save_model
from megatronish.data.samples.dataset import IndexedDataset
from megatronish.data.training_data import TrainingData
from megatronish.training.engine import Engine
from megatronish.training.setup.preparation import Prepared


def take_snapshot(
    run: Prepared,
    state: TrainState,
    engine: Engine,
    shard: OptimizerShard | None,
    streams: dict[str, Any] | None,
    staging: StagingBuffers | None,
) -> CheckpointSnapshot:
    """What this rank writes of the current state. Every rank calls it.

    shard: of `engine.optimizer_shard`; streams: this rank's positions in streamed text; staging: buffers to copy the tensors to, needed where training
    continues before they are written.
    """
    engine_state, weights = engine.snapshot(ENGINE_TAG, staging, shard), engine.weights()
    if staging:
        weights = {name: staging.take(f"weights/{name}", tensor) for name, tensor in weights.items()}
        staging.wait()
    mesh, is_first = engine.mesh, dist.get_rank() == 0

    def write(folder: Path) -> list[Path]:
        written = engine_state.write(folder)
        if mesh.tp.rank == mesh.sp.rank == mesh.pp.rank == 0:  # the ranks that share a sample read the same stream
            save_streams(folder, mesh.dp.rank, streams)
        if is_first:
            save_model(folder, weights, run.config.megatronish.model, metadata={"step": str(state.step)})
            copy_tokenizer(run.data, folder)
            run.config.save(folder / RUN_FILE)
            state.save(folder)
            written.append(folder / WEIGHTS_FILE)
        return written

    return CheckpointSnapshot(engine_state.bytes + sum(tensor.nbytes for tensor in weights.values()), write)


def copy_tokenizer(data: IndexedDataset | TrainingData, folder: Path) -> None:
    """Copy the data's tokenizer into the folder of the weights, so that a checkpoint can be used alone."""
    record = data.tokenizer_record
    if (source := data.tokenizer_file) is not None:
        suffix = ".model" if source.suffix == ".model" else ".json"
        shutil.copyfile(source, folder / f"tokenizer{suffix}")
    (folder / TOKENIZER_RECORD_FILE).write_text(
        json.dumps({"kind": record.kind, "eod_id": record.eod_id, "sha256": record.sha256}, indent=2) + "\n"
    )
