"""Learning rate schedules: exact values at the edges."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest

from megatronish.config.training import ScheduleConfig
from megatronish.training.schedules import learning_rate_multiplier


def multipliers(total: int, **fields: object) -> list[float]:
    """The multiplier at each step of a run."""
    schedule = ScheduleConfig.model_validate(fields)
    return [learning_rate_multiplier(step, total, schedule) for step in range(total)]


@pytest.mark.parametrize("kind", ["cosine", "linear", "constant", "wsd"])
def test_warmup_is_linear_and_reaches_the_peak(kind: str) -> None:
    """Step k (from 0) of a warmup of 4 has (k+1)/4; the first multiplier is not 0, so that every step has an effect."""
    assert multipliers(20, type=kind, warmup_steps=4)[:4] == [0.25, 0.5, 0.75, 1.0]
    assert multipliers(20, type=kind, warmup_steps=1)[0] == 1.0


@pytest.mark.parametrize("kind", ["cosine", "linear", "wsd"])
@pytest.mark.parametrize("min_ratio", [0.0, 0.1, 1.0])
def test_the_last_step_has_the_minimum(kind: str, min_ratio: float) -> None:
    assert multipliers(20, type=kind, warmup_steps=4, min_ratio=min_ratio)[-1] == pytest.approx(min_ratio, abs=1e-15)


def test_linear() -> None:
    """From 1 to 0.2 over the 4 steps after the warmup: quarters of 0.8."""
    assert multipliers(6, type="linear", warmup_steps=2, min_ratio=0.2) == pytest.approx([0.5, 1.0, 0.8, 0.6, 0.4, 0.2])


def test_cosine() -> None:
    """0.1 + 0.9 * (1 + cos(pi * k/4)) / 2 for k = 1..4; halfway it is the mean of the peak and the minimum."""
    expected = [0.1 + 0.9 * (1 + math.cos(math.pi * k / 4)) / 2 for k in (1, 2, 3, 4)]
    found = multipliers(5, type="cosine", warmup_steps=1, min_ratio=0.1)
    assert found == pytest.approx([1.0, *expected])
    assert found[2] == pytest.approx(0.55)


def test_constant_ignores_the_minimum() -> None:
    assert multipliers(5, type="constant", warmup_steps=2, min_ratio=0.1) == [0.5, 1.0, 1.0, 1.0, 1.0]


def test_wsd_holds_the_peak_and_decays_at_the_end() -> None:
    """Of 10 steps with a decay fraction of 0.3 the last 3 decay, linearly."""
    found = multipliers(10, type="wsd", warmup_steps=2, min_ratio=0.1, decay_fraction=0.3)
    assert found == pytest.approx([0.5, 1, 1, 1, 1, 1, 1, 0.7, 0.4, 0.1])
    assert multipliers(10, type="wsd", min_ratio=0.0, decay_fraction=0.01)[-2:] == [1.0, 0.0]  # one step at the least
    all_decay = multipliers(4, type="wsd", min_ratio=0.0, decay_fraction=1.0)
    assert all_decay == pytest.approx(multipliers(4, type="linear", min_ratio=0.0))


def test_wsd_decays_only_after_the_warmup() -> None:
    found = multipliers(10, type="wsd", warmup_steps=8, min_ratio=0.0, decay_fraction=0.5)
    assert found == pytest.approx([k / 8 for k in range(1, 9)] + [0.5, 0.0])


@pytest.mark.parametrize("kind", ["cosine", "linear", "constant", "wsd"])
def test_degenerate_runs(kind: str) -> None:
    """A warmup that lasts the run or longer only rises; a run of one step and steps past the end stay in [0, 1]."""
    assert multipliers(4, type=kind, warmup_steps=8) == [0.125, 0.25, 0.375, 0.5]
    assert multipliers(4, type=kind, warmup_steps=4)[-1] == 1.0
    one = 1.0 if kind == "constant" else 0.3
    assert multipliers(1, type=kind, min_ratio=0.3) == pytest.approx([one])
    schedule = ScheduleConfig.model_validate({"type": kind, "min_ratio": 0.3})
    assert learning_rate_multiplier(50, 10, schedule) == pytest.approx(one)


@pytest.mark.parametrize("kind", ["cosine", "linear", "wsd"])
def test_never_rises_after_the_warmup(kind: str) -> None:
    found = multipliers(100, type=kind, warmup_steps=10, min_ratio=0.05)
    assert all(later <= earlier for earlier, later in pairwise(found[9:]))
    assert min(found[9:]) == pytest.approx(0.05)
