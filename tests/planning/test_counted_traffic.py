"""The planner's volumes equal, byte for byte, what ranks of real training steps send (bf16, two micro batches a step)."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from megatronish.planning.communication import step_traffic
from megatronish.planning.layout import PlannedLayout
from megatronish.planning.parameters import stage_layers
from megatronish.planning.stack import MEGATRONISH
from tests.distributed import run_ranks
from tests.planning.traffic_counter import count_step
from tests.runs import make_dataset, small_run

pytestmark = pytest.mark.distributed
# A tiny model is within ZeRO-3's defaults for what may stay unpartitioned: with these settings nothing does, as in a large one.
NOTHING_STAYS = {
    "stage3_param_persistence_threshold": 0,
    "stage3_max_live_parameters": 0,
    "stage3_max_reuse_distance": 0,
    "stage3_prefetch_bucket_size": 0,
}
GPT = {
    "norm": "layernorm",
    "activation": "gelu",
    "attention_qkv_bias": True,
    "attention_out_bias": True,
    "mlp_bias": True,
    "tie_embeddings": False,
}
# name: layout, changes of the model
CASES: dict[str, tuple[PlannedLayout, dict[str, Any]]] = {
    "zero0": (PlannedLayout(data=2, zero=0), {}),
    "zero1": (PlannedLayout(data=2, zero=1), {}),
    "zero2": (PlannedLayout(data=2, zero=2), {}),
    "zero3": (PlannedLayout(data=2, zero=3), {}),
    "tp2, GPT, full recomputation": (PlannedLayout(tensor=2, recompute="full"), GPT),
    "tp2 with sequence, GPT, QK norm, selective": (
        PlannedLayout(tensor=2, tensor_sequence=True, recompute="selective"),
        GPT | {"qk_norm": True},
    ),
    "tp4 of 2 KV heads, biased": (PlannedLayout(tensor=4), {"attention_qkv_bias": True, "parallel_block": True}),
    "tp2, dp2, zero2": (PlannedLayout(tensor=2, data=2, zero=2), {"vocab_size": 258}),
    "ulysses4 of 2 KV heads, full recomputation": (PlannedLayout(sequence=4, recompute="full"), {}),
    "pp2, tied": (PlannedLayout(pipeline=2), {}),
    "pp2, tp2": (PlannedLayout(pipeline=2, tensor=2), GPT | {"vocab_size": 258, "num_layers": 3}),
}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    return make_dataset(tmp_path_factory.mktemp("data"))


@pytest.mark.parametrize("name", CASES)
def test_volumes_are_those_of_a_real_step(name: str, data: str, tmp_path: Path) -> None:
    """Every rank, every axis, every kind of collective: no tolerance, and nothing that the planner does not know of."""
    case, changes = CASES[name]
    layout = PlannedLayout(**{**vars(case), "micro_batch": 2, "accumulation": 2})
    zero: dict[str, Any] = {"stage": layout.zero} | (NOTHING_STAYS if layout.zero == 3 else {})
    ours = {
        "model": changes,
        "parallel": {
            "tensor": layout.tensor,
            "pipeline": layout.pipeline,
            "sequence": layout.sequence,
            "tensor_sequence": layout.tensor_sequence,
        },
        "train": {"activation_checkpointing": layout.recompute},
    }
    config = small_run(data, tmp_path, {"bf16": {"enabled": True}, "zero_optimization": zero, "megatronish": ours})
    model = config.megatronish.model
    layout.check(model)
    assert PlannedLayout.of_run(config, layout.ranks) == layout
    counted = run_ranks(layout.ranks, count_step, config, layout.data)
    stages = stage_layers(model, layout.pipeline)
    for rank, found in enumerate(counted):
        expected: Counter[tuple[str, str]] = Counter()
        for entry in step_traffic(model, layout, MEGATRONISH, stages[rank // (layout.ranks // layout.pipeline)]):
            expected[entry.axis, entry.kind] += entry.bytes
        assert found == dict(expected), f"rank {rank}"
