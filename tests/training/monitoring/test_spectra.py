"""Weight matrices of known singular values are measured exactly, and those of a run's checkpoints by step."""

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from megatronish.checkpoint.weights import WEIGHTS_FILE, save_model
from megatronish.config.model import ModelConfig
from megatronish.errors import UserError
from megatronish.model.transformer import Transformer
from megatronish.training.monitoring import spectra
from megatronish.training.monitoring.spectra import QUANTILES, draw_spectra, measure_matrix, measure_run, table
from tests.runs import MODEL
from tests.training.monitoring.test_curves import png_size, write_metrics

ROOT = Path(__file__).resolve().parents[3]
NAME = "blocks.3.mlp.up.weight"


def orthogonal(size: int, seed: int) -> torch.Tensor:
    return torch.linalg.qr(torch.randn(size, size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64))[
        0
    ]


def test_a_matrix_of_known_singular_values() -> None:
    values = torch.tensor([4.0, 2.0, 1.0, 1.0], dtype=torch.float64)
    weight = orthogonal(6, 0)[:, :4] @ torch.diag(values) @ orthogonal(4, 1)
    found = measure_matrix(weight, 5, NAME)
    assert (found.step, found.kind, found.layer, found.shape) == (5, "MLP in", 3, (6, 4))
    assert found.spectral_norm == pytest.approx(4.0, rel=1e-6)
    assert found.rms == pytest.approx(math.sqrt(22 / 24), rel=1e-6)
    assert found.stable_rank == pytest.approx(22 / 16, rel=1e-6)
    assert found.effective_rank == pytest.approx(
        math.exp(math.log(2) / 2 + 0.25 * math.log(4) + 2 * 0.125 * math.log(8))
    )
    assert len(found.quantiles) == QUANTILES
    assert (found.quantiles[0], found.quantiles[-1]) == pytest.approx((4.0, 1.0))


def test_ranks_at_their_limits() -> None:
    identity = measure_matrix(3 * torch.eye(8), 0, NAME)
    assert (identity.stable_rank, identity.effective_rank) == pytest.approx((8, 8))
    outer = measure_matrix(torch.outer(torch.arange(1.0, 9), torch.ones(5)).bfloat16(), 0, NAME)
    assert (outer.stable_rank, outer.effective_rank) == pytest.approx((1, 1), abs=1e-4)
    zero = measure_matrix(torch.zeros(4, 3), 0, NAME)
    assert (zero.rms, zero.spectral_norm, zero.stable_rank) == (0, 0, 0)
    broken = measure_matrix(torch.tensor([[1.0, math.inf], [0.0, 1.0]]), 0, NAME)
    assert math.isnan(broken.rms) and math.isnan(broken.effective_rank)


def test_a_sample_of_rows_stands_for_the_matrix(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = torch.randn(4096, 16, generator=torch.Generator().manual_seed(0))
    full = measure_matrix(weight, 0, "embedding.weight")
    monkeypatch.setattr(spectra, "MAX_ROWS", 1000)
    sample = measure_matrix(weight, 0, "embedding.weight")
    assert sample.shape == (4096, 16) and sample.layer is None
    # 820 of the rows: the relative standard error of a norm over 820 x 16 normal entries is 1 / sqrt(2 x 13,120) = 0.6%,
    # that of the largest singular value about sqrt(16 / 820) / 2 = 7%.
    assert sample.rms == pytest.approx(full.rms, rel=0.03) and sample.rms != full.rms
    assert sample.spectral_norm == pytest.approx(full.spectral_norm, rel=0.15)


def make_run(folder: Path, steps: tuple[int, ...], layers: int = 3) -> Path:
    """Checkpoints whose weights are those of the first one times 1 + step."""
    config = ModelConfig(**{**MODEL, "num_layers": layers, "tie_embeddings": False})
    state = Transformer(config, seed=0).state_dict()
    write_metrics(folder)
    for step in steps:
        checkpoint = folder / "checkpoints" / f"step-{step:08d}"
        save_model(checkpoint, {name: tensor * (1 + step) for name, tensor in state.items()}, config)
        (checkpoint / "state.json").write_text("{}")
    return folder


def test_norms_follow_the_steps_and_ranks_do_not(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", (0, 1, 3))
    done: list[float] = []
    found = measure_run(run, 5.0, progress=lambda part, total: done.append(part / total))
    assert [m.step for m in found] == [0] * 14 + [1] * 14 + [3] * 14
    first, last = ({m.name: m for m in found if m.step == step} for step in (0, 3))
    for name, measure in first.items():
        assert last[name].rms == pytest.approx(4 * measure.rms, rel=1e-5)
        assert last[name].effective_rank == pytest.approx(measure.effective_rank, rel=1e-4)
    assert done == sorted(done) and done[-1] == pytest.approx(1.0)
    lines = table(found).splitlines()
    assert lines[0].startswith("step 0 > 3") and len(lines) == 7 and lines[1].startswith("attention qkv (64 x 32)")
    assert png_size(draw_spectra(found, "title", tmp_path / "spectra.png")) > (1000, 500)


def test_time_and_layers_are_bounded(tmp_path: Path) -> None:
    """Without time only the newest checkpoint is measured; two layers are the first and the last."""
    run = make_run(tmp_path / "run", (0, 1, 3), layers=5)
    found = measure_run(run, 0.0, layers=2)
    assert {m.step for m in found} == {3} and {m.layer for m in found} == {0, 4, None}
    assert list(spectra._coarse_to_fine(6)) == [5, 0, 2, 4, 1, 3]
    assert measure_run(tmp_path / "none", 1.0) == []


def test_a_damaged_checkpoint_is_named(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", (2,))
    weights = run / "checkpoints" / "step-00000002" / WEIGHTS_FILE
    weights.write_bytes(weights.read_bytes()[:100])
    with pytest.raises(UserError, match=r"step-00000002/model.safetensors cannot be read"):
        measure_run(run, 1.0)


def test_the_tool_with_one_checkpoint(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", (7,))
    command = [sys.executable, str(ROOT / "tools" / "analyze_checkpoints.py"), "--run-dir", str(run)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "step 7 " in done.stdout and done.stdout.endswith(f"wrote {run / 'weights.json'}\n")
    assert png_size(run / "spectra.png") > (1000, 500)
    rows = json.loads((run / "weights.json").read_text())
    assert len(rows) == 14 and {row["kind"] for row in rows} == set(spectra.COLORS)
