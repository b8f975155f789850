"""The planner against published runs: docs/scaling.md states these bounds, and the one number fitted for each GPU."""

from __future__ import annotations

import pytest

from megatronish.model.accounting import parameter_counts
from megatronish.planning.hardware import A100, H100
from megatronish.planning.published import PublishedRun, fit_matmul_share, llama3, published_runs

RUNS = published_runs()
# Largest error of throughput that docs/scaling.md states, of runs that were fitted and of all others.
BOUNDS = {
    ("Megatron-LM 2021, A100", True): 0.02,
    ("Megatron-LM 2021, A100", False): 0.08,
    ("Megatron-LM 2024, H100", True): 0.13,
    ("Megatron-LM 2024, H100", False): 0.18,
    ("torchtitan, A100", False): 0.14,
    ("torchtitan, H100", False): 0.13,
}


@pytest.mark.parametrize("run", RUNS, ids=lambda run: f"{run.table}: {run.name}")
def test_error_is_within_what_the_document_states(run: PublishedRun) -> None:
    assert abs(run.error) <= BOUNDS[run.table, run.fitted]


def test_the_fitted_shares_are_the_best_ones_of_the_fitted_runs() -> None:
    assert fit_matmul_share("Megatron-LM 2021, A100") == A100.matmul_share
    assert fit_matmul_share("Megatron-LM 2024, H100") == H100.matmul_share
    with pytest.raises(ValueError, match="torchtitan"):
        fit_matmul_share("torchtitan, H100")


def test_few_runs_are_fitted() -> None:
    assert sum(run.fitted for run in RUNS) == 8
    assert len(RUNS) == 26


@pytest.mark.parametrize("run", RUNS, ids=lambda run: f"{run.table}: {run.name}")
def test_the_shapes_have_the_sizes_of_their_names(run: PublishedRun) -> None:
    """A name such as 70B states the size to its last digit; Megatron counts position embeddings as well."""
    name = next(word for word in run.name.replace(",", " ").split() if word[-1] in "BT")
    size = float(name[:-1]) * (1e12 if name[-1] == "T" else 1e9)
    assert parameter_counts(run.model).total == pytest.approx(size, rel=0.05)


def test_layouts_use_the_reported_gpus_and_batches() -> None:
    """Numbers of the sources' own columns: GPUs, and samples of a step."""
    reported = {"1.7B": (32, 512), "18B": (256, 1024), "145B": (1536, 2304), "530B": (2520, 2520), "1T": (3072, 3072)}
    found = {run.name: (run.layout.ranks, run.layout.samples) for run in RUNS if "2021" in run.table}
    assert {name: found[name] for name in reported} == reported
    reported = {"1.7B": (48, 192), "70B": (768, 384), "462B": (6144, 3072)}
    found = {run.name: (run.layout.ranks, run.layout.samples) for run in RUNS if "2024" in run.table}
    assert {name: found[name] for name in reported} == reported
    titan = [(run.layout.ranks, run.layout.samples) for run in RUNS if run.table == "torchtitan, H100"]
    assert titan == [(8, 16), (128, 256), (64, 96), (256, 512), (128, 32)]


def test_llama_sizes() -> None:
    """Parameters of Llama 3 as released."""
    counts = [parameter_counts(llama3(size)).total for size in ("8B", "70B", "405B")]
    assert counts == [8_030_261_248, 70_553_706_496, 405_853_388_800]
