"""The engine on one CUDA device equals the plain loop on the CPU. Skipped where there is no GPU."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.distributed import run_ranks
from tests.runs import engine_loop, make_dataset, plain_loop, small_run

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
OFFLOAD = {"stage": 2, "offload_optimizer": {"device": "cpu", "pin_memory": True}}


@pytest.mark.parametrize("zero", [{"stage": 0}, {"stage": 2}, {"stage": 3}, OFFLOAD], ids=["0", "2", "3", "2-offload"])
def test_fp32_on_the_gpu_equals_the_plain_loop_on_the_cpu(zero: dict[str, Any], tmp_path: Path) -> None:
    """10 steps in fp32 (torch's default: no TF32): other kernels add in another order, as between CPUs, hence 1e-4."""
    config = small_run(make_dataset(tmp_path), tmp_path, {"zero_optimization": zero})
    plain = plain_loop(config, data_size=1)
    (trace,) = run_ranks(1, engine_loop, config, 1)
    torch.testing.assert_close(trace.losses, plain.losses, rtol=1e-4, atol=0)
    torch.testing.assert_close(trace.norms, plain.norms, rtol=1e-4, atol=0)
