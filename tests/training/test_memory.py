"""Fitting the micro batch to the machine keeps what a step computes."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatronish.config.model import ModelConfig
from megatronish.config.presets import resolve_model
from megatronish.config.run import BatchPlan
from megatronish.training import memory
from megatronish.training.memory import activation_bytes_per_token, fit_micro_batch, fit_to_host

small = st.integers(1, 64)


@given(micro=small, accumulation=small, data_size=small, sample=st.integers(1, 10**6), budget=st.integers(1, 10**8))
def test_smaller_micro_batches_keep_the_samples_per_step(
    micro: int, accumulation: int, data_size: int, sample: int, budget: int
) -> None:
    """The same samples per step, within the budget where one sample is, and no smaller than needed."""
    plan = BatchPlan(micro, accumulation, data_size)
    fitted = fit_micro_batch(plan, sample, budget)
    assert fitted.samples == plan.samples
    assert fitted.data_size == data_size
    assert fitted.micro == 1 or fitted.micro * sample <= budget
    larger = [part for part in range(fitted.micro + 1, micro + 1) if micro % part == 0]
    assert all(part * sample > budget for part in larger)


@pytest.mark.parametrize(
    ("budget", "expected"),
    [(1200, (12, 2)), (1199, (6, 4)), (599, (4, 6)), (399, (3, 8)), (250, (2, 12)), (150, (1, 24)), (1, (1, 24))],
)
def test_next_divisor(budget: int, expected: tuple[int, int]) -> None:
    fitted = fit_micro_batch(BatchPlan(12, 2, 4), bytes_per_sample=100, budget_bytes=budget)
    assert (fitted.micro, fitted.accumulation) == expected


def test_ranks_share_the_memory_of_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    """Twice the ranks on a machine have half the memory each."""
    model = resolve_model({"preset": "tiny"})
    sample = activation_bytes_per_token(model, "fp32", "none") * model.seq_length
    plan = BatchPlan(8, 1, 2)

    def fit(total: float, ranks: int) -> int:
        monkeypatch.setattr(memory.psutil, "virtual_memory", lambda: SimpleNamespace(total=total))
        return fit_to_host(plan, model, "fp32", "none", ranks).micro

    enough = 8 * sample * 2 / memory.CPU_SHARE * 1.001
    assert fit(enough, 2) == 8
    assert fit(enough, 4) == 4
    assert fit(enough / 2, 2) == 4


def test_activation_estimate_by_hand() -> None:
    """Per token and block 8 hidden + 4 ffn elements; besides one block's own and the logits (in dtype and twice fp32)."""
    model = ModelConfig(
        vocab_size=100, num_layers=3, hidden_size=16, num_attention_heads=2, ffn_hidden_size=40, seq_length=8
    )
    block = 8 * 16 + 4 * 40
    assert activation_bytes_per_token(model, "fp32", "none") == 3 * block * 4 + block * 4 + 100 * 12
    assert activation_bytes_per_token(model, "bf16", "none") == 3 * block * 2 + block * 2 + 100 * 10
    assert activation_bytes_per_token(model, "fp32", "selective") == 3 * block // 2 * 4 + block * 4 + 100 * 12
    assert activation_bytes_per_token(model, "fp32", "full") == 3 * 16 * 4 + block * 4 + 100 * 12
