"""How often the files of a checkpoint are opened, and the local optimizer state is gathered, in a save and in a load."""

from __future__ import annotations

import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from megatronish.checkpoint import optimizer_shards
from megatronish.checkpoint.manifest import MANIFEST_FILE
from megatronish.checkpoint.zero_state import LocalOptimizerState
from megatronish.config.run import RunConfig
from megatronish.inference.load import load_for_inference
from megatronish.launch.process import Rank
from tests.distributed import run_ranks
from tests.runs import make_dataset, small_run

SHARD = "state-rank-00000.safetensors"


class Accesses:
    """Counts accesses in this process from `start` to `stop`: opened files by name, safetensors files, gathered states."""

    def __init__(self) -> None:
        self._counts: Counter[str] | None = None
        sys.addaudithook(self._audit)  # it cannot be removed, so it is switched off by `stop`
        self.patch = pytest.MonkeyPatch()

    def _audit(self, event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open" and self._counts is not None and isinstance(arguments[0], str | Path):
            mode = arguments[1]
            if mode is not None:  # os.open has none: folders and files are synced through it
                self._counts[f"{'write' if 'w' in mode else 'read'} {Path(arguments[0]).name}"] += 1

    def start(self) -> None:
        counts = self._counts = Counter()
        opened, gathered = optimizer_shards.safe_open, LocalOptimizerState.shard

        def counting_open(path: Path, framework: str) -> Any:
            counts[f"map {path.name}"] += 1
            return opened(path, framework=framework)

        def counting_shard(self: LocalOptimizerState) -> Any:
            counts["gather"] += 1
            return gathered(self)

        self.patch.setattr(optimizer_shards, "safe_open", counting_open)
        self.patch.setattr(LocalOptimizerState, "shard", counting_shard)

    def stop(self) -> dict[str, int]:
        """What was counted of the manifest, the optimizer's shards and the local optimizer state."""
        counts, self._counts = self._counts, None
        self.patch.undo()
        assert counts is not None
        return {name: count for name, count in counts.items() if name.split()[-1] in (MANIFEST_FILE, SHARD, "gather")}


def train(rank: int, config: RunConfig) -> dict[str, int]:
    """Train the run, from its newest checkpoint to one save at its end; the accesses."""
    from megatronish.training.loop import pretrain

    accesses = Accesses()
    accesses.start()
    pretrain(config, Rank(rank, 1, rank, 1, "test"))
    return accesses.stop()


def test_one_opening_per_file(tmp_path: Path) -> None:
    data = make_dataset(tmp_path)

    def run(steps: int) -> RunConfig:
        return small_run(data, tmp_path / "run", {"megatronish": {"train": {"steps": steps, "save_interval": 4}}})

    saved = {"gather": 1, f"write {MANIFEST_FILE}": 1, f"read {SHARD}": 1}  # read again for its hash
    assert run_ranks(1, train, run(2), group=False) == [saved]
    loaded = {f"read {MANIFEST_FILE}": 1, f"map {SHARD}": 1, f"read {SHARD}": 1}  # read for its hash
    assert run_ranks(1, train, run(4), group=False) == [Counter(saved) + Counter(loaded)]

    accesses = Accesses()
    accesses.start()
    load_for_inference(tmp_path / "run")
    assert accesses.stop() == {f"read {MANIFEST_FILE}": 1}
