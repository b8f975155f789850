"""Bytes and seconds of collectives by hand, and how they must move with sizes."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatronish.config.model import ModelConfig
from megatronish.config.presets import resolve_model
from megatronish.errors import ConfigError
from megatronish.planning.communication import Kind, collective_seconds, sent_bytes, step_traffic
from megatronish.planning.hardware import A100, H100
from megatronish.planning.layout import AxisName, Group, PlannedLayout
from megatronish.planning.parameters import StageLayers, all_layers, stage_layers
from megatronish.planning.stack import MEGATRON_2021, MEGATRON_CORE, MEGATRONISH

KINDS: list[Kind] = ["all_reduce", "all_gather", "reduce_scatter", "all_to_all", "point_to_point"]
REDUCING: list[Kind] = ["all_reduce", "all_gather", "reduce_scatter"]
powers = st.sampled_from([1, 2, 4, 8])


def test_bytes_sent_by_hand() -> None:
    """A ring of 4 moves 3 of 4 parts once, and for a sum twice."""
    assert [sent_bytes(kind, 400, 4) for kind in KINDS] == [600, 300, 300, 300, 400]
    assert [sent_bytes(kind, 400, 1) for kind in KINDS] == [0] * 5


@pytest.mark.parametrize(
    ("layout", "axis", "expected"),
    [
        (PlannedLayout(tensor=8, data=4), "tp", Group(8, 8)),
        (PlannedLayout(tensor=8, data=4), "data", Group(4, 1)),
        (PlannedLayout(tensor=2, data=16), "data", Group(16, 4)),
        (PlannedLayout(data=48), "data", Group(48, 8)),
        (PlannedLayout(data=4, pipeline=4), "pp", Group(4, 2)),
        (PlannedLayout(tensor=8, data=4, pipeline=4), "pp", Group(4, 1)),
        (PlannedLayout(sequence=4, data=4), "sp", Group(4, 4)),
        (PlannedLayout(sequence=4, data=4), "data", Group(16, 8)),
        (PlannedLayout(tensor=2, data=2), "data", Group(2, 2)),
        (PlannedLayout(tensor=16), "tp", Group(16, 8)),
    ],
)
def test_where_the_ranks_of_an_axis_sit(layout: PlannedLayout, axis: AxisName, expected: Group) -> None:
    assert layout.group(axis, 8) == expected
    assert expected.nodes == -(-expected.size // expected.local)


def test_seconds_by_hand() -> None:
    """NCCL's model written out: a gather of 1 GB on 8 GPUs of a node, and a sum of 1 GB over 4 nodes of one GPU each."""
    node = 8.4e-6 + 7 * 3.4e-6 + 1e9 * 7 / 8 / (18 * 20.6e9)
    assert collective_seconds("all_gather", 1e9, Group(8, 8), H100) == pytest.approx(node, rel=1e-12)
    ring = 8.4e-6 + 6 * 14e-6 + 2e9 * 3 / 4 / 25e9
    assert collective_seconds("all_reduce", 1e9, Group(4, 1), A100) == pytest.approx(ring, rel=1e-12)
    message = 8.4e-6 + 14e-6 + 1e6 / 50e9
    assert collective_seconds("point_to_point", 1e6, Group(4, 1), H100) == pytest.approx(message, rel=1e-12)
    exchange = 8.4e-6 + 14e-6 + 8e8 * 8 / 16 / 50e9
    assert collective_seconds("all_to_all", 8e8, Group(16, 8), H100) == pytest.approx(exchange, rel=1e-12)


def test_small_sums_take_the_tree_and_the_quicker_protocol() -> None:
    """Over 512 nodes a ring needs 1,022 steps, a tree 2 x 9."""
    tree = 14.0e-6 + 2 * 9 * 8.5e-6
    assert collective_seconds("all_reduce", 4, Group(512, 1), H100) == pytest.approx(tree, rel=1e-4)
    assert collective_seconds("all_gather", 4, Group(512, 1), H100) == pytest.approx(14.0e-6 + 511 * 8.5e-6, rel=1e-4)


def test_more_adapters_of_a_node_carry_more() -> None:
    """Four ranks on a node drive four adapters: 200 GB/s of the 371 of NVLink; eight drive more than NVLink takes."""
    one, four, eight = (collective_seconds("all_gather", 1e12, Group(64, local), H100) for local in (1, 4, 8))
    assert one / four == pytest.approx(4, rel=1e-2)
    assert one / eight == pytest.approx(18 * 20.6 / 50, rel=1e-2)


@given(
    kind=st.sampled_from(KINDS),
    payload=st.floats(1, 1e12),
    nodes=st.integers(1, 64),
    local=powers,
    more=st.floats(1, 9),
)
def test_a_larger_payload_never_takes_less(kind: Kind, payload: float, nodes: int, local: int, more: float) -> None:
    group = Group(nodes * local, local)
    seconds = collective_seconds(kind, payload, group, H100)
    assert collective_seconds(kind, payload * more, group, H100) >= seconds
    assert seconds == 0 if group.size == 1 else seconds > 0
    if kind in REDUCING and group.size > 1:
        fastest = max(H100.node_rate, H100.network_rate)
        assert seconds >= sent_bytes(kind, payload, group.size) / fastest


@given(kind=st.sampled_from(REDUCING), payload=st.floats(1, 1e12), nodes=st.integers(1, 64), local=powers)
def test_more_nodes_never_take_less(kind: Kind, payload: float, nodes: int, local: int) -> None:
    few, many = Group(nodes * local, local), Group((nodes + 1) * local, local)
    assert collective_seconds(kind, payload, many, H100) >= collective_seconds(kind, payload, few, H100) * (1 - 1e-12)


def totals(
    model: ModelConfig, layout: PlannedLayout, layers: StageLayers, stack: Any = MEGATRONISH
) -> dict[tuple[str, str], float]:
    """(axis, kind) -> bytes of a step."""
    found: dict[tuple[str, str], float] = {}
    for entry in step_traffic(model, layout, stack, layers):
        found[entry.axis, entry.kind] = found.get((entry.axis, entry.kind), 0) + entry.bytes
    return found


SMALL = resolve_model({"preset": "tiny", "vocab_size": 1000, "tie_embeddings": False, "qk_norm": False})  # 4 x 256
HIDDEN = 2 * 256 * 256 * 2  # micro batch 2 of 256 tokens, hidden 256, bf16
PARAMETERS = 4 * (256 * 256 * 3 + 3 * 256 * 704 + 2 * 256) + 2 * 1000 * 256 + 256


def test_volumes_by_hand() -> None:
    """Per micro batch: of four layers two sums each way and one at either end; 12 bytes per token for the loss."""
    base: dict[str, Any] = {"micro_batch": 2, "accumulation": 3}
    layers = all_layers(SMALL)
    assert totals(SMALL, PlannedLayout(tensor=2, **base), layers) == {
        ("tp", "all_reduce"): 3 * (18 * HIDDEN + 512 * 12)
    }
    assert totals(SMALL, PlannedLayout(tensor=2, tensor_sequence=True, **base), layers) == {
        ("tp", "reduce_scatter"): 3 * 18 * HIDDEN,
        ("tp", "all_gather"): 3 * 27 * HIDDEN,
        ("tp", "all_reduce"): 3 * (512 * 12 + 9 * 512),
    }
    assert totals(SMALL, PlannedLayout(sequence=2, zero=0, **base), layers) == {
        # of a rank's 256 tokens: 4 query and twice 2 key/value heads of 64 there, 4 back; forward and backward
        ("sp", "all_to_all"): 3 * 4 * 2 * 256 * (8 + 4) * 64 * 2,
        ("data", "all_reduce"): 2 * PARAMETERS,
    }
    assert totals(SMALL, PlannedLayout(data=4, zero=2, **base), layers) == {
        ("data", "all_reduce"): 3 * 2 * PARAMETERS,
        ("data", "all_gather"): 2 * PARAMETERS,
    }
    assert totals(SMALL, PlannedLayout(data=4, zero=3, **base), layers) == {
        ("data", "all_gather"): 3 * 2 * 2 * PARAMETERS,
        ("data", "reduce_scatter"): 3 * 2 * PARAMETERS,
    }
    ends = [totals(SMALL, PlannedLayout(pipeline=2, **base), layers) for layers in stage_layers(SMALL, 2)]
    assert ends == [{("pp", "point_to_point"): 3 * HIDDEN}] * 2


def test_stacks_differ_in_what_they_declare() -> None:
    """Megatron-Core reduce-scatters fp32 gradients once; in 2021 all-reduced fp16; both send a part of hidden states."""
    layers = all_layers(SMALL)
    layout = PlannedLayout(data=4, accumulation=3)
    core, old = (
        totals(SMALL, layout, layers, MEGATRON_CORE),
        totals(SMALL, PlannedLayout(data=4, zero=0), layers, MEGATRON_2021),
    )
    assert core == {("data", "reduce_scatter"): 4 * PARAMETERS, ("data", "all_gather"): 2 * PARAMETERS}
    assert old == {("data", "all_reduce"): 2 * PARAMETERS}
    piped = PlannedLayout(tensor=4, pipeline=2, micro_batch=2)
    first = stage_layers(SMALL, 2)[0]
    ours, theirs = totals(SMALL, piped, first), totals(SMALL, piped, first, MEGATRON_2021)
    assert ours["pp", "point_to_point"] == 4 * theirs["pp", "point_to_point"] == HIDDEN


def test_interleaving_sends_every_part() -> None:
    """With v parts a rank sends v times as often, its ends v - 1 times in the direction that leaves the model."""
    model = SMALL.model_copy(update={"num_layers": 8})
    sent = []
    for layers in (StageLayers(4, first=True, last=False), StageLayers(4, first=False, last=True)):
        layout = PlannedLayout(pipeline=2, micro_batch=2, accumulation=6, interleave=4)
        sent.append(totals(model, layout, layers)["pp", "point_to_point"])
    assert sent == [(6 * 4 + 6 * 3) * HIDDEN] * 2


@given(accumulation=st.integers(1, 9), tensor=powers, data=powers, zero=st.integers(0, 2))
def test_volumes_grow_with_the_batch_alone_where_they_should(
    accumulation: int, tensor: int, data: int, zero: int
) -> None:
    """Tensor-parallel bytes are proportional to micro batches, gradients' and weights' are not but for ZeRO-2."""
    model = resolve_model({"preset": "tiny", "num_kv_heads": 4, "num_attention_heads": 8})
    layers = all_layers(model)
    once, often = (
        totals(model, PlannedLayout(tensor=tensor, data=data, zero=zero, accumulation=count), layers)
        for count in (1, accumulation)
    )
    for (axis, kind), size in often.items():
        repeats = axis == "tp" or (zero == 2 and kind == "all_reduce")
        assert size == once[axis, kind] * (accumulation if repeats else 1)


@pytest.mark.parametrize(
    ("layout", "message"),
    [
        (PlannedLayout(tensor=3), "does not divide over 3"),
        (PlannedLayout(pipeline=2, zero=2), "at most 1"),
        (PlannedLayout(tensor=2, zero=3), "at most 2"),
        (PlannedLayout(data=2, zero=4), "at most 3"),
        (PlannedLayout(sequence=2, tensor=2), "set sequence"),
        (PlannedLayout(tensor=2, zero=0), "use ZeRO 1"),
    ],
)
def test_what_the_engine_refuses_is_refused(layout: PlannedLayout, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        layout.check(resolve_model({"preset": "tiny"}))
