"""The tiny preset's losses under a fixed seed, kept in tests/golden/tiny_losses.json: a refactor must reproduce them.

Bit for bit on the kind of machine that wrote the file (same CPU model and torch), within 1e-5 elsewhere: other vector
widths add in another order, which over these 12 steps came to 1e-7 of the losses and 8e-7 of the gradient norms between
AVX-512 and AVX2 kernels (ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=AVX2). After a change that is meant to change them: python -m tests.training.test_golden
"""

from __future__ import annotations

import json
import platform
import tempfile
from pathlib import Path
from typing import Any

import pytest

from tests.distributed import run_ranks
from tests.runs import make_dataset, small_run
from tests.training.test_resume import pretrain_rank, read_losses

GOLDEN = Path(__file__).parent.parent / "golden" / "tiny_losses.json"
ELSEWHERE = 1e-5


def machine() -> dict[str, str]:
    """What the bits of a loss depend on besides the code."""
    import torch

    from megatronish.ops.dispatch import resolve_ops

    wanted = ("vendor_id", "cpu family", "model", "model name", "stepping")
    info = [line.partition(":") for line in Path("/proc/cpuinfo").read_text().split("\n\n")[0].splitlines()]
    cpu = ", ".join(value.strip() for key, _, value in info if key.strip() in wanted) or platform.machine()
    vector = torch.backends.cpu.get_cpu_capability()
    return {"cpu": cpu, "vector": vector, "torch": torch.__version__, "ops": resolve_ops("auto")}


def run_tiny(folder: Path) -> dict[str, Any]:
    """12 steps of the tiny preset on one rank: losses and gradient norms."""
    tiny = {"preset": "tiny", "seq_length": 64}
    config = small_run(make_dataset(folder, documents=200), folder / "run", {"megatronish": {"train": {"steps": 12}}})
    raw = config.to_json()
    raw["megatronish"]["model"] = tiny
    config = type(config).from_dict(raw, "golden")
    run_ranks(1, pretrain_rank, config, 1, group=False)
    steps = read_losses(folder / "run")
    return {"losses": [loss for _, loss, _ in steps], "grad_norms": [norm for _, _, norm in steps]}


@pytest.mark.distributed
def test_tiny_reproduces_its_golden_losses(tmp_path: Path) -> None:
    golden = json.loads(GOLDEN.read_text())
    found = run_tiny(tmp_path)
    assert len(found["losses"]) == 12
    if golden["machine"] == machine():
        assert found == golden["run"]
    else:
        for name, values in golden["run"].items():
            assert found[name] == pytest.approx(values, rel=ELSEWHERE), name


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as scratch:
        GOLDEN.write_text(json.dumps({"machine": machine(), "run": run_tiny(Path(scratch))}, indent=2) + "\n")
    print(f"wrote {GOLDEN}")
