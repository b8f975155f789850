"""Measure the cost of a checkpoint: how long training stops, with synchronous and asynchronous saves, and the time of hashing.

    python tools/bench/checkpoint.py [--models tiny,smollm2_135m] [--saves 5] [--zero_optimization.stage 2]

One process trains each model on random tokens and saves it repeatedly, in turns: waiting for the checkpoint (train.async_save
false), and training on while a thread writes it. Printed are medians, and the stall of the first asynchronous save, whose copy
touches new memory. Steps during a save are compared with other steps: on a CPU both share the cores. Reading and hashing is
timed by itself, on files in the page cache.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # run from a checkout that is not installed

from megatronish.config.cli import parse_options
from megatronish.errors import ConfigError, exit_on_user_error
from megatronish.launch.process import free_port, initialize_process

HEADER = (
    f"{'model':<16}{'MB':>9}{'sync stall':>12}{'async stall':>13}{'first':>11}{'written in':>12}{'hashing':>9}"
    f"{'GB/s':>7}{'step':>9}{'during save':>13}"
)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", default="tiny,smollm2_135m", help="presets, separated by commas")
    parser.add_argument("--saves", type=int, default=5, help="number of saves of each kind (5)")
    parser.add_argument("--folder", type=Path, help="folder for the checkpoints (default: the temporary folder)")
    arguments, rest = parser.parse_known_args()
    with exit_on_user_error():
        initialize_process()
        os.environ.update(
            RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(free_port())
        )
        file, overrides = parse_options(rest, "tools/bench/checkpoint.py")
        if file:
            raise ConfigError("tools/bench/checkpoint.py: takes no --deepspeed_config: choose presets with --models.")
        from megatronish.training.engine import start_process_group, stop_process_group

        start_process_group()
        print(HEADER, flush=True)
        for model in arguments.models.split(","):
            with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
                print(measure(model, overrides, arguments.saves, Path(folder)), flush=True)
        stop_process_group()
    return 0


def measure(preset: str, overrides: dict[str, Any], saves: int, folder: Path) -> str:
    """Measure one model; returns its row of the table."""
    from megatronish.checkpoint.manifest import hash_file
    from megatronish.checkpoint.saver import Saver
    from megatronish.checkpoint.staging import StagingBuffers
    from megatronish.checkpoint.store import CheckpointStore
    from megatronish.launch.consensus import Consensus
    from megatronish.launch.rendezvous import join_rendezvous

    step, take = trainer(preset, overrides, StagingBuffers())
    store = CheckpointStore(folder, 1)
    saver = Saver(
        store, Consensus(join_rendezvous(0, 1, "", 0, 1.0), "bench"), background=True, report=lambda line: None
    )
    stalls: dict[str, list[float]] = {"sync": [], "async": []}
    written, usual, during = [], [timed(step) for _ in range(3)], []
    for number in range(saves):
        stalls["async"].append(saver.save(2 * number, take))
        begin = time.monotonic()
        while (done := time.monotonic() - begin) < 0.5 or saver.is_writing():
            during.append(timed(step))
            if done > 60.0:
                break
        outcome = saver.wait()
        assert outcome is not None and not outcome.problem, outcome
        written.append(outcome.seconds)
        usual.append(timed(step))
        stalls["sync"].append(saver.save(2 * number + 1, take, reason="measured"))
    newest = store.newest()
    assert newest is not None
    manifest = store.manifest(newest)
    hashing = timed(lambda: [hash_file(newest / name) for name in manifest.files])
    first, *later = stalls["async"]
    return (
        f"{preset:<16}{manifest.bytes / 1e6:>9.1f}{statistics.median(stalls['sync']):>10.3f} s"
        f"{statistics.median(later or [first]):>11.3f} s{first:>9.3f} s{statistics.median(written):>10.3f} s"
        f"{hashing:>7.3f} s{manifest.bytes / hashing / 1e9:>7.1f}{statistics.median(usual):>7.3f} s"
        f"{statistics.median(during):>11.3f} s"
    )


def trainer(preset: str, overrides: dict[str, Any], copies: Any) -> tuple[Callable[[], Any], Callable[[bool], Any]]:
    """A function that trains one step, and one that takes the snapshot that the training loop writes."""
    import torch

    from megatronish.checkpoint.saver import CheckpointSnapshot
    from megatronish.checkpoint.weights import WEIGHTS_FILE, save_model
    from megatronish.config.base import merge
    from megatronish.config.run import BLOCK, RunConfig
    from megatronish.parallel.mesh import build_mesh
    from megatronish.training.engine import device, start_engine
    from megatronish.training.setup.construction import build_model

    raw = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_clipping": 1.0,
        "zero_optimization": {"stage": 1},
        "bf16": {"enabled": True},
        "data_types": {"grad_accum_dtype": "fp32"},
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-3}},
        BLOCK: {"model": {"preset": preset, "seq_length": 128}, "train": {"steps": 1, "save_dir": "unused"}},
    }
    config = RunConfig.from_dict(merge(raw, overrides), "bench_checkpoint")
    plan, mesh = config.batch_plan(1), build_mesh(config.megatronish.parallel, device().type)
    model = config.megatronish.model
    engine = start_engine(build_model(config, plan, mesh), config, plan, mesh)
    tokens = torch.randint(model.vocab_size, (plan.micro, model.seq_length), device=engine.device)
    batches = [{"tokens": tokens, "labels": tokens}] * plan.accumulation

    def take(in_background: bool) -> CheckpointSnapshot:
        state = engine.snapshot("engine", copies if in_background else None)
        weights = engine.weights()
        if in_background:
            weights = {name: copies.take(f"weights/{name}", tensor) for name, tensor in weights.items()}
            copies.wait()

        def write(folder: Path) -> list[Path]:
            written = state.write(folder)
            save_model(folder, weights, model)
            return [*written, folder / WEIGHTS_FILE]

        return CheckpointSnapshot(state.bytes, write)

    return lambda: engine.train_step(batches, 1.0), take


def timed(function: Callable[[], Any]) -> float:
    """The duration of a call in seconds."""
    begin = time.monotonic()
    function()
    return time.monotonic() - begin


if __name__ == "__main__":
    sys.exit(main())
