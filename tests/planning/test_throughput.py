"""The step's arithmetic: bubbles by hand, what hides, what must never get slower, and the search over layouts."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatronish.config.presets import resolve_model
from megatronish.errors import ConfigError
from megatronish.model.accounting import flops_per_token
from megatronish.planning.communication import collective_seconds
from megatronish.planning.compute import stage_time
from megatronish.planning.hardware import H100
from megatronish.planning.layout import PlannedLayout
from megatronish.planning.memory_model import USABLE_SHARE
from megatronish.planning.parameters import StageLayers, all_layers
from megatronish.planning.published import llama3
from megatronish.planning.search import best_layouts
from megatronish.planning.stack import MEGATRON_2021, MEGATRON_CORE, MEGATRONISH
from megatronish.planning.throughput import estimate

MODEL = llama3("8B")
powers = st.sampled_from([1, 2, 4, 8])
EVEN = [StageLayers(8, False, False, False)] * 4


def test_a_single_gpu_only_computes() -> None:
    """One rank: products, attention, kernels and the optimizer; MFU is the model's operations over the peak."""
    layout = PlannedLayout(accumulation=4, micro_batch=2)
    found = estimate(MODEL, layout, H100)
    parts = found.parts
    assert parts.tensor == parts.pipeline_messages == parts.pipeline_bubble == parts.data == parts.recompute == 0
    assert found.tokens == 8 * 8192
    assert found.mfu == pytest.approx(flops_per_token(MODEL).train * found.tokens / found.seconds / H100.peak_flops)
    assert found.mfu < H100.attention_share


def test_products_by_hand() -> None:
    """Wide layers run at the matrix rate: six operations a weight and token, the backward pass twice the forward."""
    free = replace(H100, memory_rate=1e30, attention_share=1e9)
    time = stage_time(MODEL, PlannedLayout(), MEGATRONISH, free, all_layers(MODEL))
    weights = 32 * (4096 * 128 * (2 * 32 + 2 * 8) + 3 * 4096 * 14336) + 128256 * 4096
    assert time.forward == pytest.approx(2 * weights * 8192 / free.matmul_rate, rel=1e-6)
    assert time.backward == pytest.approx(2 * time.forward, rel=1e-6)
    full = stage_time(MODEL, PlannedLayout(recompute="full"), MEGATRONISH, free, all_layers(MODEL))
    blocks = time.forward - 2 * 128256 * 4096 * 8192 / free.matmul_rate
    assert full.recompute == pytest.approx(blocks, rel=1e-6)


def test_narrow_products_wait_for_memory() -> None:
    """A decode-like micro batch of one token: every weight is read, and that takes longer than its operations."""
    model = MODEL.model_copy(update={"seq_length": 1})
    time = stage_time(model, PlannedLayout(), MEGATRONISH, H100, StageLayers(1, False, False, False))
    weights = 4096 * 128 * (2 * 32 + 2 * 8) + 3 * 4096 * 14336
    assert time.forward > 2 * weights / H100.stream_rate > 10 * 2 * weights / H100.matmul_rate


@pytest.mark.parametrize(("micro", "interleave"), [(1, 1), (8, 1), (8, 2), (32, 8)])
def test_bubble_by_hand(micro: int, interleave: int) -> None:
    """Equal stages idle (stages - 1) / (parts x micro batches) of the time they compute (Narayanan et al. 2021, 2.2)."""
    layout = PlannedLayout(pipeline=4, accumulation=micro, interleave=interleave)
    parts = estimate(MODEL, layout, H100, stages=EVEN).parts
    assert parts.pipeline_bubble / parts.compute == pytest.approx(3 / (interleave * micro), rel=1e-9)


def test_an_uneven_pipeline_waits_for_its_slowest_stage() -> None:
    layout = PlannedLayout(pipeline=4, accumulation=1000)
    uneven = [StageLayers(blocks, False, False, False) for blocks in (7, 8, 9, 8)]
    parts = estimate(MODEL, layout, H100, stages=uneven).parts
    step = 1000 * 9 + 7 + 8 + 8  # in blocks: the slowest stage's micro batches, and one of each other stage
    assert parts.pipeline_bubble / parts.compute == pytest.approx(step / 8000 - 1, rel=1e-9)


def test_gradient_reduction_overlaps_with_the_backward_pass_in_stacks_that_hide_it() -> None:
    """With a long backward pass all buckets but one are hidden; a stack without overlap pays for all."""
    layout = PlannedLayout(data=64, zero=0, micro_batch=1, accumulation=1)
    ours, waits = (estimate(MODEL, layout, H100, stack).parts.data for stack in (MEGATRONISH, MEGATRON_2021))
    buckets = 130  # 8.03e9 parameters would fill 161 of 50e6, but there are 4 x 32 + 2 matrices, and none is cut
    payload = 2 * 8_030_261_248 / buckets
    total = buckets * collective_seconds("all_reduce", payload, layout.group("data", 8), H100)
    assert waits == pytest.approx(total, rel=1e-9)
    assert ours == pytest.approx(total / buckets, rel=1e-9)


def test_column_gradients_overlap_with_weight_gradients() -> None:
    """Ours hides the backward half of tensor-parallel sums, as far as a product is long enough; Megatron-Core hides more."""
    layout = PlannedLayout(tensor=2, micro_batch=1)
    visible = [
        estimate(MODEL, layout, H100, stack).parts.tensor for stack in (MEGATRON_2021, MEGATRONISH, MEGATRON_CORE)
    ]
    assert visible[0] > 1.8 * visible[1] > 1.8 * visible[2]


@settings(max_examples=60, deadline=None)
@given(
    tensor=powers,
    pipeline=powers,
    data=powers,
    accumulation=st.integers(1, 16),
    which=st.sampled_from(["peak_flops", "memory_rate", "node_rate", "network_rate"]),
    stack=st.sampled_from([MEGATRONISH, MEGATRON_2021, MEGATRON_CORE]),
)
def test_faster_hardware_is_never_slower(
    tensor: int, pipeline: int, data: int, accumulation: int, which: str, stack: Any
) -> None:
    layout = PlannedLayout(tensor=tensor, pipeline=pipeline, data=data, accumulation=accumulation)
    base = estimate(MODEL, layout, H100, stack)
    faster = replace(H100, **{which: getattr(H100, which) * 1.5})
    assert estimate(MODEL, layout, faster, stack).seconds <= base.seconds * (1 + 1e-12)
    assert base.parts.total == pytest.approx(base.seconds)
    assert all(value >= -1e-12 for value in vars(base.parts).values())


@given(pipeline=st.sampled_from([2, 4, 8]), accumulation=st.integers(1, 64))
def test_more_micro_batches_fill_a_pipeline_better(pipeline: int, accumulation: int) -> None:
    def speed(count: int) -> float:
        return estimate(MODEL, PlannedLayout(pipeline=pipeline, accumulation=count), H100).tokens_per_gpu_second

    assert speed(accumulation + 1) > speed(accumulation)


def test_the_search_finds_what_fits_and_nothing_faster_is_left() -> None:
    """7B on one node: all kept layouts fit, are sorted, hold the batch, and none of a few by hand is faster."""
    model = resolve_model({"preset": "s3_7b"})
    found = best_layouts(model, 8, 64, H100, keep=5)
    assert len(found) == 5
    seconds = [candidate.estimate.seconds for candidate in found]
    assert seconds == sorted(seconds)
    for candidate in found:
        candidate.layout.check(model)
        assert candidate.layout.samples == 64
        assert candidate.layout.ranks == 8
        assert candidate.estimate.memory.total <= USABLE_SHARE * H100.memory_bytes
    by_hand = [
        PlannedLayout(data=8, zero=3, micro_batch=2, accumulation=4, recompute="full"),
        PlannedLayout(tensor=8, tensor_sequence=True, micro_batch=4, accumulation=16),
        PlannedLayout(pipeline=8, accumulation=64),
    ]
    for layout in by_hand:
        slower = estimate(model, layout, H100)
        assert slower.memory.total <= USABLE_SHARE * H100.memory_bytes
        assert slower.seconds >= seconds[0]


def test_the_search_reports_when_nothing_fits() -> None:
    assert best_layouts(llama3("405B"), 8, 64, H100) == []
    with pytest.raises(ConfigError, match="0 GPUs"):
        best_layouts(MODEL, 0, 64, H100)
