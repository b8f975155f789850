"""A checkpoint of one layout is resumed under another: every value of the optimizer state is preserved."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from megatronish.checkpoint.optimizer_shards import MASTER, Extent, OptimizerShard, SavedOptimizerShards
from megatronish.checkpoint.train_state import TrainState, save_streams
from megatronish.config.model import ModelConfig
from megatronish.config.run import RunConfig
from megatronish.errors import ConfigError, UserError
from megatronish.model.transformer import Transformer
from megatronish.parallel.layers import TensorShard
from megatronish.training.setup.preparation import check_streams
from tests.config.raw import read
from tests.distributed import run_ranks
from tests.runs import engine_loop, make_dataset, small_run
from tests.training.test_resume import BF16, LION, MUON, OFFLOAD, pretrain_rank, read_losses

# Ranks, parallel sizes and ZeRO stage. All train on 16 samples per step.
LAYOUTS: dict[str, tuple[int, dict[str, Any], dict[str, Any]]] = {
    "dp1 zero0": (1, {}, {"stage": 0}),
    "dp2 zero1": (2, {}, {"stage": 1}),
    "dp2 zero2 offload": (2, {}, {"stage": 2, "offload_optimizer": OFFLOAD}),
    "dp2 zero3": (2, {}, {"stage": 3, "stage3_param_persistence_threshold": 100}),
    "tp2 zero1": (2, {"tensor": 2, "tensor_sequence": True}, {"stage": 1}),
    "tp4 zero2": (4, {"tensor": 4}, {"stage": 2}),
    "pp2 zero1": (2, {"pipeline": 2}, {"stage": 1}),
    "tp2pp2 zero1": (4, {"tensor": 2, "pipeline": 2}, {"stage": 1}),
    "sp2dp2 zero3": (4, {"sequence": 2}, {"stage": 3}),
}


def layout_run(data: str, folder: Path | str, layout: str, changes: dict[str, Any], **train: Any) -> RunConfig:
    _, parallel, zero = LAYOUTS[layout]
    size = data_size(layout)
    ours = {"parallel": parallel, "train": train, "model": changes.get("model", {})}
    engine = {key: value for key, value in changes.items() if key != "model"}
    micro = {"train_batch_size": 16, "gradient_accumulation_steps": 8 // size}
    return small_run(data, folder, {**engine, **micro, "zero_optimization": zero, "megatronish": ours})


def data_size(layout: str) -> int:
    ranks, parallel, _ = LAYOUTS[layout]
    return ranks // (parallel.get("tensor", 1) * parallel.get("pipeline", 1) * parallel.get("sequence", 1))


def full_state(folder: Path, model: ModelConfig) -> dict[str, Tensor]:
    """Every number of a saved state, as flat full tensors."""
    saved = SavedOptimizerShards(folder)
    with torch.device("meta"):
        shapes = {name: tuple(p.shape) for name, p in Transformer(model, seed=None).named_parameters()}
    saved.check_complete(shapes)
    full = {name: Extent(name, shape, None, 0, shape.numel()) for name, shape in to_sizes(shapes).items()}
    return {
        f"{kind} {name}": saved.read(kind, extent) for kind in (MASTER, *saved.moments) for name, extent in full.items()
    }


def to_sizes(shapes: dict[str, tuple[int, ...]]) -> dict[str, torch.Size]:
    return {name: torch.Size(shape) for name, shape in shapes.items()}


def train_and_save(rank: int, config: RunConfig, size: int, folder: Path) -> None:
    """A few steps, then the engine's state."""
    import megatronish.training.engine as engine_module

    made: list[Any] = []
    start = engine_module.start_engine
    engine_module.start_engine = lambda *args: made.append(start(*args)) or made[-1]
    engine_loop(rank, config, size)
    made[0].save(folder, "engine")


def load_and_save(rank: int, config: RunConfig, size: int, source: Path, target: Path) -> dict[str, Tensor]:
    """Load what another layout saved and save it again; the full weights of the model after loading."""
    from megatronish.parallel.mesh import build_mesh
    from megatronish.training.engine import start_engine
    from megatronish.training.setup.construction import build_model

    plan = config.batch_plan(size)
    mesh = build_mesh(config.megatronish.parallel, "cpu")
    engine = start_engine(build_model(config, plan, mesh), config, plan, mesh)
    engine.load(source, "engine")
    engine.save(target, "engine")
    return {name: value.clone() for name, value in engine.weights().items()}


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("changes", "path"),
    [
        (
            {"model": {"num_kv_heads": 1, "qk_norm": True, "tie_embeddings": False}},
            ["tp4 zero2", "dp1 zero0", "tp2pp2 zero1", "dp2 zero3", "tp2 zero1"],
        ),
        (
            {"optimizer": LION, **BF16},
            ["dp2 zero2 offload", "tp2pp2 zero1", "sp2dp2 zero3", "dp2 zero1", "pp2 zero1", "dp2 zero2 offload"],
        ),
        ({"bf16": {"enabled": True}}, ["dp1 zero0", "pp2 zero1", "tp4 zero2", "dp1 zero0"]),
    ],
    ids=["fp32", "bf16 lion", "bf16"],
)
def test_moving_preserves_every_value(changes: dict[str, Any], path: list[str], tmp_path: Path) -> None:
    """Layout after layout loads what the previous one wrote: master weights and moments keep every bit."""
    data = make_dataset(tmp_path)
    first = layout_run(data, "unused", path[0], changes, steps=3)
    run_ranks(LAYOUTS[path[0]][0], train_and_save, first, data_size(path[0]), tmp_path / "0")
    expected = full_state(tmp_path / "0" / "engine", first.megatronish.model)
    assert all(value.abs().sum() > 0 for key, value in expected.items() if "bias" not in key)
    for number, layout in enumerate(path[1:]):
        config = layout_run(data, "unused", layout, changes, steps=3)
        folders = tmp_path / str(number), tmp_path / str(number + 1)
        weights = run_ranks(LAYOUTS[layout][0], load_and_save, config, data_size(layout), *folders)[0]
        found = full_state(folders[1] / "engine", config.megatronish.model)
        assert found.keys() == expected.keys()
        for key, value in expected.items():
            assert torch.equal(found[key], value), f"{layout}: {key}"
        for name, weight in weights.items():
            kept = expected[f"{MASTER} {'embedding.weight' if f'{MASTER} {name}' not in expected else name}"]
            assert torch.equal(weight.flatten(), kept.to(weight.dtype)), f"{layout}: weights of {name}"


@pytest.mark.distributed
def test_the_loss_scale_of_fp16_moves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Halved by overflows of the first steps, then good, it is loaded by another of DeepSpeed's optimizers."""
    from deepspeed.accelerator import get_accelerator

    monkeypatch.setattr(get_accelerator(), "is_fp16_supported", lambda: True)  # denied on CPUs, which are slow at it
    data = make_dataset(tmp_path)
    fp16 = {"fp16": {"enabled": True, "initial_scale_power": 24, "hysteresis": 1}}
    first = layout_run(data, "unused", "dp2 zero1", fp16, steps=8)
    run_ranks(2, train_and_save, first, 2, tmp_path / "0")
    saved = SavedOptimizerShards(tmp_path / "0" / "engine").scalars
    assert saved["cur_scale"] < 2**24 and saved["cur_iter"] == 8 and 0 < saved["step"] < 8
    config = layout_run(data, "unused", "dp1 zero0", {"fp16": {**fp16["fp16"], "loss_scale_window": 7}}, steps=2)
    run_ranks(1, load_and_save, config, 1, tmp_path / "0", tmp_path / "1")
    found = SavedOptimizerShards(tmp_path / "1" / "engine").scalars
    assert found.keys() >= {"cur_scale", "cur_iter", "last_overflow_iter", "step"}
    assert found == {key: saved[key] for key in found}


@pytest.mark.distributed
def test_a_run_resumes_under_other_layouts(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Two steps each under five layouts, by the trainer with resume auto: the losses are those of one process."""
    data = make_dataset(tmp_path)
    path = ["dp2 zero2 offload", "tp2 zero1", "pp2 zero1", "tp2pp2 zero1", "dp1 zero0"]
    run_ranks(1, pretrain_rank, run_of(data, tmp_path / "alone", "dp1 zero0", 2 * len(path)), 1, group=False)
    for number, layout in enumerate(path, start=1):
        ranks = LAYOUTS[layout][0]
        config = run_of(data, tmp_path / "moved", layout, 2 * number)
        capfd.readouterr()
        run_ranks(ranks, pretrain_rank, config, ranks, group=False)
        output = capfd.readouterr().out
        if number == 2:
            assert re.search(
                r"step-00000002 at step 2: data-parallel ranks 2 -> 1, ZeRO stage 2 -> 1, tensor-parallel ranks 1 -> 2\n",
                output,
            )
    alone, moved = read_losses(tmp_path / "alone"), read_losses(tmp_path / "moved")
    assert [step for step, _, _ in moved] == list(range(1, 11))
    for expected, found in zip(alone, moved, strict=True):
        assert found == pytest.approx(expected, rel=1e-5)  # sums in other orders, as in tests/parallel/test_engine.py
    states = [load_file(tmp_path / run / "checkpoints/step-00000010/model.safetensors") for run in ("alone", "moved")]
    for name, weight in states[0].items():
        torch.testing.assert_close(states[1][name], weight, rtol=0, atol=2e-5)


def run_of(data: str, folder: Path, layout: str, stop: int) -> RunConfig:
    """Up to `stop` of 10 steps; a constant rate, for the schedule reads the length of the run."""
    config = layout_run(data, folder, layout, {}, steps=stop)
    raw = config.to_json()
    raw["megatronish"]["schedule"] = {"type": "constant"}
    return RunConfig.from_dict(raw, "test")


@pytest.mark.distributed
def test_muon_stays_where_it_is(tmp_path: Path) -> None:
    """Only DeepSpeed knows the layout of its momentum: another layout is refused before the rendezvous."""
    data = make_dataset(tmp_path)
    muon = {"optimizer": MUON, "gradient_clipping": 0.0}
    run_ranks(1, pretrain_rank, layout_run(data, tmp_path / "run", "dp1 zero0", muon, steps=1), 1, group=False)
    config = layout_run(data, tmp_path / "run", "dp2 zero1", muon, steps=2)
    with pytest.raises(UserError, match=r"data-parallel ranks 1, this run has 2, and its optimizer state"):
        run_ranks(2, pretrain_rank, config, 2, group=False)


def parts(rows: int, columns: int) -> tuple[Tensor, dict[int, list[tuple[Extent, Tensor]]]]:
    """A full tensor [rows, columns] of distinct numbers and, by rank of 2 x 2, the runs of packed halves that it holds."""
    full = torch.arange(rows * columns, dtype=torch.float32).view(rows, columns)
    held: dict[int, list[tuple[Extent, Tensor]]] = {}
    for tp in range(2):
        quarter = rows // 4
        segments = ((tp * quarter, (tp + 1) * quarter), (2 * quarter + tp * quarter, 2 * quarter + (tp + 1) * quarter))
        shard = TensorShard((rows, columns), 0, segments)
        flat = shard.take(full).flatten()
        cut = flat.numel() // 3  # within a row
        for dp, (start, stop) in enumerate(((0, cut), (cut, flat.numel()))):
            held[2 * tp + dp] = [(Extent("w", shard.shape, shard, start, stop), flat[start:stop])]
    return full, held


def write(folder: Path) -> Tensor:
    full, held = parts(8, 5)
    for rank, runs in held.items():
        OptimizerShard({"w": (runs[0][0], {MASTER: runs[0][1], "m": -runs[0][1]})}, {"step": 3.0}).write(folder, rank)
    return full


def test_any_partition_is_reassembled(tmp_path: Path) -> None:
    full = write(tmp_path)
    saved = SavedOptimizerShards(tmp_path)
    saved.check_complete(["w"])
    assert saved.moments == ["m"] and saved.scalars == {"step": 3.0} and "w" in saved and "v" not in saved
    assert torch.equal(saved.read(MASTER, Extent("w", (8, 5), None, 0, 40)).view(8, 5), full)
    assert torch.equal(saved.read("m", Extent("w", (8, 5), None, 7, 19)), -full.flatten()[7:19])
    columns = TensorShard((8, 5), 1, ((1, 3),))
    assert torch.equal(saved.read(MASTER, Extent("w", (8, 2), columns, 3, 9)), full[:, 1:3].flatten()[3:9])
    _, held = parts(8, 5)
    for runs in held.values():
        extent, numbers = runs[0]
        assert torch.equal(saved.read(MASTER, extent), numbers)
        assert Extent.from_json(json.loads(json.dumps(extent.to_json()))) == extent


def test_missing_and_torn_files(tmp_path: Path) -> None:
    write(tmp_path)
    assert not SavedOptimizerShards(tmp_path / "nothing")
    one = tmp_path / "state-rank-00002.safetensors"
    kept = one.read_bytes()
    one.unlink()
    with pytest.raises(ConfigError, match=r"holds 34 numbers of w, not 40: a rank's file is missing"):
        SavedOptimizerShards(tmp_path).check_complete(["w"])
    with pytest.raises(ConfigError, match=r"holds 0 numbers of v, not all"):
        SavedOptimizerShards(tmp_path).check_complete(["v"])
    for torn in (b"", kept[:20], kept[:-8]):
        one.write_bytes(torn)
        with pytest.raises(
            ConfigError, match=r"state-rank-00002.safetensors: cannot be read .*use an older checkpoint"
        ):
            SavedOptimizerShards(tmp_path)


def test_streamed_text_keeps_its_data_parallel_size(tmp_path: Path) -> None:
    """Each data-parallel rank has its own position in the text: their number is fixed, other axes may change."""
    saved = TrainState.start(read(), read().batch_plan(2), "abc")
    check_streams(tmp_path, saved, replace(saved, data_size=1))  # nothing streamed
    save_streams(tmp_path, 0, {"parts": {}})
    check_streams(tmp_path, saved, replace(saved, tensor=2))
    with pytest.raises(ConfigError, match=r"saved with 2 data-parallel ranks.*; this run has 1\. Start with 2"):
        check_streams(tmp_path, saved, replace(saved, data_size=1))
