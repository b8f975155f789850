"""ZeRO 0-3 and offload on 2 ranks equal a plain single-process loop. This test guards the DeepSpeed pin: some releases
computed wrong gradients silently (DeepSpeed issues 7718 and 8224)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from deepspeed.runtime.zero.muon import original_muon

from megatronish.config.run import RunConfig
from tests.distributed import run_ranks
from tests.runs import Trace, engine_loop, make_dataset, plain_loop, small_run

OFFLOAD = {"device": "cpu", "pin_memory": False}
LAYOUTS = {
    "zero0": {"stage": 0},
    "zero1": {"stage": 1},
    "zero2": {"stage": 2},
    "zero3": {"stage": 3, "stage3_param_persistence_threshold": 0},
    "zero2-offload": {"stage": 2, "offload_optimizer": OFFLOAD},
    "zero3-offload": {"stage": 3, "offload_optimizer": OFFLOAD, "offload_param": OFFLOAD},
}
pytestmark = pytest.mark.distributed


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    return make_dataset(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def plain_fp32(data: str) -> Trace:
    return plain_loop(small_run(data, "unused"), data_size=2)


@pytest.fixture(scope="module")
def plain_bf16(data: str) -> list[Trace]:
    """The plain bf16 loop, and the same with its initial weights moved by up to half a bf16 step, by two seeds."""
    return [
        plain_loop(small_run(data, "unused", {"bf16": {"enabled": True}}), 2, perturb=seed) for seed in (None, 1, 2)
    ]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_fp32_equals_the_plain_loop(layout: str, data: str, plain_fp32: Trace, tmp_path: Path) -> None:
    """Loss and gradient norm of 10 steps within 1e-5: clipping is active and micro batches hold uneven token counts."""
    config = small_run(data, tmp_path, {"zero_optimization": LAYOUTS[layout]})
    assert max(plain_fp32.norms) > config.deepspeed.gradient_clipping, (
        "clipping must act for this test to mean something"
    )
    trace, _ = run_ranks(2, engine_loop, config, 2)
    torch.testing.assert_close(trace.losses, plain_fp32.losses, rtol=1e-5, atol=0)
    torch.testing.assert_close(trace.norms, plain_fp32.norms, rtol=1e-5, atol=0)
    for name, weight in plain_fp32.weights.items():
        # AdamW divides by the gradient's own size: where that is near 0, 1e-7 of rounding moves a weight by up to 1e-5.
        torch.testing.assert_close(
            trace.weights[name].float(), weight, rtol=0, atol=2e-5, msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.mark.parametrize(
    ("layout", "fp32_sums"),
    [("zero0", False), ("zero1", False), ("zero1", True), ("zero2", True), ("zero3", True), ("zero2-offload", True)],
)
def test_bf16_is_within_rounding_of_the_plain_loop(
    layout: str, fp32_sums: bool, data: str, plain_bf16: list[Trace], tmp_path: Path
) -> None:
    """No further from the plain bf16 loop than that loop is from itself when rounding alone is changed.

    fp32_sums: micro batches are added up in fp32, as our configuration files ask for (ZeRO-0 cannot).
    """
    changes = {"zero_optimization": LAYOUTS[layout], "bf16": {"enabled": True}}
    if fp32_sums:
        changes["data_types"] = {"grad_accum_dtype": "fp32"}
    config = small_run(data, tmp_path, changes)
    plain, *others = plain_bf16
    trace, _ = run_ranks(2, engine_loop, config, 2)
    for kind in ("losses", "norms"):
        spread = max(distance(getattr(other, kind), getattr(plain, kind)) for other in others)
        found = distance(getattr(trace, kind), getattr(plain, kind))
        print(f"{layout} bf16 {kind}: {found:.2e} from the plain loop; rounding spread {spread:.2e}")
        assert found <= spread, f"{kind} differ by {found:.2e}, rounding alone gives {spread:.2e}"


def distance(a: list[float], b: list[float]) -> float:
    """The largest relative difference of two series."""
    return max(abs(x - y) / abs(y) for x, y in zip(a, b, strict=True))


MUON = {"type": "Muon", "params": {"lr": 0.02, "adam_lr": 3e-3, "weight_decay": 0.01}}
LION = {"type": "Lion", "params": {"lr": 3e-4, "weight_decay": 0.1}}
# A step's loss is an fp32 sum over 256 tokens, whose rounding errors add up as a random walk: sqrt(256) 2^-24.
LOSS_ROUNDING = 2.0**-20


def optimizer_run(data: str, folder: Path, optimizer: dict[str, Any]) -> RunConfig:
    return small_run(
        data, folder, {"optimizer": optimizer, "gradient_clipping": 0.0, "zero_optimization": {"stage": 2}}
    )


def reference(config: RunConfig) -> tuple[Trace, float]:
    """The plain loop, and the bound on the distance of losses from it: twice that of four other orders of summation.

    The sums differ in fp32, by 2^-24. A difference in the momentum makes some entries round to another fp16 or bf16 number at
    the start of Newton-Schulz; each of its five steps multiplies small singular values by up to 3.44 and rounds again, so that
    the updates of two correct runs differ by that dtype's rounding errors.
    """
    plain = plain_loop(config, 2)
    orders = [plain_loop(config, 2, parts=parts) for parts in (2, 3, 4, 8)]
    return plain, 2 * max(distance(other.losses, plain.losses) for other in orders) + LOSS_ROUNDING


def set_newton_schulz(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype) -> None:
    """DeepSpeed takes fp16 where the CPU has fp16 arithmetic, else fp32; here one dtype on all CPUs."""
    monkeypatch.setattr(original_muon, "ns_compute_dtype", lambda ns_method="gram": dtype)


@pytest.mark.parametrize(
    ("optimizer", "dtype"),
    [(MUON, torch.float32), (MUON, torch.float16), (LION, torch.float32)],
    ids=["muon-fp32", "muon-fp16", "lion"],
)
def test_muon_and_lion_under_zero2_are_within_rounding_of_the_plain_loop(
    optimizer: dict[str, Any], dtype: torch.dtype, data: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    set_newton_schulz(monkeypatch, dtype)
    config = optimizer_run(data, tmp_path, optimizer)
    plain, bound = reference(config)
    trace, _ = run_ranks(2, engine_loop, config, 2)
    found = distance(trace.losses, plain.losses)
    print(f"{optimizer['type']}, Newton-Schulz in {dtype}: losses differ by {found:.2e}, bound {bound:.2e}")
    assert found <= bound


def test_the_bounds_of_muon_expose_faults(data: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A momentum of 0.94 in place of 0.95 in fp32, and in fp16 a shard of matrices that is never updated."""
    set_newton_schulz(monkeypatch, torch.float32)
    plain, bound = reference(optimizer_run(data, tmp_path, MUON))
    params = {**MUON["params"], "momentum": 0.94}
    wrong = plain_loop(optimizer_run(data, tmp_path, {**MUON, "params": params}), 2)
    assert distance(wrong.losses, plain.losses) > 10 * bound

    set_newton_schulz(monkeypatch, torch.float16)
    config = optimizer_run(data, tmp_path, MUON)
    plain, bound = reference(config)
    stale, _ = run_ranks(2, stale_loop, config)
    assert distance(stale.losses, plain.losses) > 100 * bound


def stale_loop(rank: int, config: RunConfig) -> Trace:
    """`engine_loop`, where gradients on the second rank do not reach the momentum."""
    update = original_muon.muon_update
    if rank == 1:
        original_muon.muon_update = lambda grad, momentum, *rest, **options: update(
            momentum.clone(), momentum, *rest, **options
        )
    return engine_loop(rank, config, 2)
