"""A run folder as training leaves it, made without training: random weights, the byte tokenizer, a small data set."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from megatronish.checkpoint.paths import RUN_FILE
from megatronish.checkpoint.store import CheckpointStore
from megatronish.checkpoint.train_state import TrainState
from megatronish.checkpoint.weights import save_model
from megatronish.config.run import RunConfig
from megatronish.data.samples.dataset import IndexedDataset, open_dataset
from megatronish.model.transformer import Transformer
from megatronish.training.snapshot import copy_tokenizer
from tests.runs import make_dataset, small_run
from tests.saves import save_alone


@dataclass(frozen=True)
class Run:
    folder: Path
    config: RunConfig
    dataset: IndexedDataset


def save_checkpoint(
    run_dir: Path, config: RunConfig, dataset: IndexedDataset, step: int, seed: int, best: bool
) -> None:
    """A checkpoint of a model with weights drawn from `seed`, saved as the training loop saves one."""
    ours = config.megatronish
    state = TrainState.start(config, config.batch_plan(1), dataset.reader.identity)

    def write(folder: Path) -> None:
        save_model(folder, Transformer(ours.model, seed=seed).state_dict(), ours.model)
        copy_tokenizer(dataset, folder)
        config.save(folder / RUN_FILE)
        for _ in range(step):
            state_after.append(state_after[-1].advance(4, 128))
        state_after[-1].save(folder)

    state_after = [state]
    assert not save_alone(CheckpointStore(run_dir, 5), step, write, best).problem


@pytest.fixture(scope="session")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Steps 2 (best, seed 2) and 3 (latest, seed 3); without a document mask. Weights larger than usual, so that the
    distributions are far from uniform."""
    folder = tmp_path_factory.mktemp("run")
    data = make_dataset(folder)
    changes = {"megatronish": {"data": {"document_mask": False}, "model": {"init_std": 0.3}}}
    config, dataset = small_run(data, folder / "r", changes), open_dataset(data)
    save_checkpoint(folder / "r", config, dataset, 2, seed=2, best=True)
    save_checkpoint(folder / "r", config, dataset, 3, seed=3, best=False)
    return Run(folder / "r", config, dataset)


@pytest.fixture(scope="session")
def model(run: Run) -> Transformer:
    return Transformer(run.config.megatronish.model, seed=2).eval()


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(7)
