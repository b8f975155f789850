"""A step with a non-finite loss or gradient on any rank changes nothing: no weight, no moment, no later step."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from megatronish.config.run import RunConfig
from tests.distributed import run_ranks
from tests.runs import make_dataset, rank_loader, small_run
from tests.training.test_resume import LAYOUTS as RESUMED

pytestmark = pytest.mark.distributed
BAD_STEP, STEPS, RANKS = 2, 5, 2
LAYOUTS: dict[str, dict[str, Any]] = {  # one for each optimizer class of DeepSpeed, and for each kind of parallel ranks
    **{name: RESUMED[name] for name in ("zero0", "zero0-bf16", "zero1-bf16", "zero1-muon", "zero2-offload-muon")},
    "zero2-bf16 sums": {"zero_optimization": {"stage": 2}, "bf16": {"enabled": True}},
    "zero2-offload": RESUMED["zero2-offload-bf16"],
    "zero3-offload": RESUMED["zero3-offload-bf16"],
    "tp2 zero1": {"megatronish": {"parallel": {"tensor": 2}}},
    "pp2 zero1 bf16": {"bf16": {"enabled": True}, "megatronish": {"parallel": {"pipeline": 2}}},
}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    return make_dataset(tmp_path_factory.mktemp("data"))


def break_loss(model: Any, value: float) -> Callable[[], None]:
    """Make the next loss of this rank `value` times itself, its gradient with it; returns what restores the model."""
    original = model.hidden_loss

    def broken(hidden: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        model.hidden_loss = original
        return original(hidden, labels) * value

    model.hidden_loss = broken
    return lambda: setattr(model, "hidden_loss", original)


def break_gradient(model: Any, value: float) -> Callable[[], None]:
    """Set one element of a gradient of this rank's next backward pass to `value`; the loss is unchanged."""
    weight = next(p for p in model.parameters() if p.requires_grad)

    def broken(gradient: torch.Tensor) -> torch.Tensor:
        handle.remove()
        gradient = gradient.clone()
        gradient.view(-1)[0] = value
        return gradient

    handle = weight.register_hook(broken)
    return handle.remove


def steps_of_engine(rank: int, config: RunConfig, data_size: int, fault: str | None) -> dict[str, Any]:
    """Steps with a fault on the last rank at BAD_STEP, or without that step; their results and final state."""
    from megatronish.parallel.mesh import build_mesh
    from megatronish.training.engine import start_engine
    from megatronish.training.setup.construction import build_model

    plan, ours = config.batch_plan(data_size), config.megatronish
    mesh = build_mesh(ours.parallel, "cpu")
    engine = start_engine(build_model(config, plan, mesh), config, plan, mesh)
    loader = rank_loader(config, mesh.dp.rank, data_size)
    results = []
    for step in range(STEPS):
        batches = [next(loader) for _ in range(plan.accumulation)]
        restore = None
        if step == BAD_STEP and fault is None:
            continue
        if step == BAD_STEP and rank == RANKS - 1:
            kind, value = fault.split()
            restore = {"loss": break_loss, "gradient": break_gradient}[kind](engine.module.model, float(value))
        result = engine.train_step(batches, 1.0)
        results.append((result.bad, result.skipped, math.isfinite(float(result.grad_norm))))
        if restore:
            restore()
    folder = Path(ours.train.save_dir) / (fault or "without").replace(" ", "-")
    engine.save(folder, "engine")
    return {
        "results": results,
        "weights": {name: value.clone() for name, value in engine.weights().items()},
        "folder": folder,
    }


def compare(rank: int, config: RunConfig, data_size: int, faults: list[str]) -> dict[str, list[Any]]:
    """Run the steps with each fault and without; their final states must be bit-identical."""
    without = steps_of_engine(rank, config, data_size, None)
    results = {}
    for fault in faults:
        found = steps_of_engine(rank, config, data_size, fault)
        results[fault] = found["results"]
        torch.distributed.barrier()
        for name, weight in without["weights"].items():
            assert torch.equal(weight, found["weights"][name]), f"{fault}: {name} differs"
        if rank == 0:
            files = sorted(path.relative_to(without["folder"]) for path in without["folder"].rglob("*.safetensors"))
            for file in files:
                one, other = (load_file(each["folder"] / file) for each in (without, found))
                assert one.keys() == other.keys()
                assert all(torch.equal(one[name], other[name]) for name in one), (fault, file)
    return results


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_bad_step_changes_nothing(layout: str, data: str, tmp_path: Path) -> None:
    """NaN or inf in the loss, and inf in a gradient, of one rank: all ranks skip, and continue as if the step had not been there."""
    changes = LAYOUTS[layout]
    parallel = changes.get("megatronish", {}).get("parallel", {})
    faults = ["loss inf"] if "zero3" in layout else ["loss nan", "gradient inf"]
    size = RANKS // math.prod(parallel.values())
    config = small_run(data, tmp_path, changes)
    for results in run_ranks(RANKS, compare, config, size, faults):
        for fault in faults:
            assert results[fault] == [(False, False, True)] * 2 + [(True, True, False)] + [(False, False, True)] * 2, (
                fault
            )


def steps_in_fp16(rank: int, config: RunConfig) -> list[tuple[bool, bool, float]]:
    """Seven steps whose loss scale begins far too high, the loss NaN on rank 1 in the last but one: (bad, skipped, scale)."""
    from deepspeed.accelerator import get_accelerator

    from megatronish.parallel.mesh import build_mesh
    from megatronish.training.engine import start_engine
    from megatronish.training.setup.construction import build_model

    get_accelerator().is_fp16_supported = lambda: True  # denied on CPUs, which are slow at it; of a forked rank
    plan = config.batch_plan(RANKS)
    mesh = build_mesh(config.megatronish.parallel, "cpu")
    engine = start_engine(build_model(config, plan, mesh), config, plan, mesh)
    loader = rank_loader(config, mesh.dp.rank, RANKS)
    results = []
    for step in range(7):
        if step == 5 and rank == RANKS - 1:
            break_loss(engine.module.model, math.nan)
        result = engine.train_step([next(loader) for _ in range(plan.accumulation)], 1.0)
        results.append((result.bad, result.skipped, engine.local_optimizer_state().scaler_numbers()["cur_scale"]))
    return results


def test_fp16_overflows_are_not_bad_steps_and_bad_steps_keep_the_loss_scale(data: str, tmp_path: Path) -> None:
    """Overflows halve the scale and are not bad steps; a non-finite loss is one, and leaves the scale unchanged."""
    fp16 = {"fp16": {"enabled": True, "initial_scale_power": 20, "hysteresis": 1}}
    results = run_ranks(RANKS, steps_in_fp16, small_run(data, tmp_path, fp16))
    assert results[0] == results[1]
    *before, bad, last = results[0]
    overflows = [scale for _, skipped, scale in before if skipped]
    assert overflows and overflows == [2.0 ** (19 - n) for n in range(len(overflows))]
    assert not any(step[0] for step in before) and not before[-1][1]
    assert bad == (True, True, before[-1][2]) and not last[0]
