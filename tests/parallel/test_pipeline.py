"""Stages are cut where the dearest is cheapest."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatronish.config.model import ModelConfig
from megatronish.config.parallel import ParallelConfig
from megatronish.model.accounting import flops_per_token, layer_costs, parameter_counts
from megatronish.parallel.pipeline import balanced_stages
from tests.parallel.test_model import SMALL


@given(st.lists(st.integers(0, 9), min_size=1, max_size=8), st.data())
def test_no_other_cut_is_better(costs: list[int], data: st.DataObject) -> None:
    stages = data.draw(st.integers(1, len(costs)))
    found = balanced_stages(costs, stages)
    assert [layer for stage in found for layer in stage] == list(range(len(costs)))
    assert all(len(stage) >= 1 for stage in found) and len(found) == stages

    def dearest(cuts: tuple[int, ...]) -> int:
        bounds = [0, *cuts, len(costs)]
        return max(sum(costs[start:stop]) for start, stop in itertools.pairwise(bounds))

    best = min(dearest(cuts) for cuts in itertools.combinations(range(1, len(costs)), stages - 1))
    assert max(sum(costs[layer] for layer in stage) for stage in found) == best


def test_more_stages_than_layers_are_refused() -> None:
    with pytest.raises(ValueError, match="2 layers cannot be cut into 3 pipeline stages"):
        balanced_stages([1, 2], 3)


def test_costs_are_those_of_the_model() -> None:
    """A layer's operations add up to the model's; its parameters too, a tied head holding the table once more."""
    for change in ({}, {"tie_embeddings": True}, {"norm_position": "post", "sliding_window": 4}):
        config = ModelConfig(**{**SMALL, **change})
        assert sum(layer_costs(config, "time")) == pytest.approx(flops_per_token(config).forward)
        copies = config.vocab_size * config.hidden_size if config.tie_embeddings else 0
        assert sum(layer_costs(config, "parameters")) == parameter_counts(config).total + copies


def test_a_large_vocabulary_makes_the_last_stage_short() -> None:
    config = ModelConfig(**{**SMALL, "vocab_size": 4096, "num_layers": 6})
    stages = balanced_stages(layer_costs(config, "time"), 2)
    assert len(stages[1]) < len(stages[0])
    ParallelConfig(pipeline=2).check_divides(config)
