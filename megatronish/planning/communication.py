"""What a rank sends per optimizer step, collective by collective, and how long each takes.

Volumes are exact: tests/planning/test_counted_traffic.py counts the collectives of real steps. Times follow NCCL's own
cost model (NVIDIA/nccl, src/graph/tuning.cc): a base, a latency per ring or tree step, and bytes over the slower of NVLink and of the
network adapters that the group has in a node; the better of ring and tree, and of two protocols, is taken.

Shapes: t tokens of a micro batch on a rank, h hidden size.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from megatronish.config.model import ModelConfig
from megatronish.planning.hardware import Hardware
from megatronish.planning.layout import AxisName, Group, PlannedLayout
from megatronish.planning.parameters import StageLayers, rank_parameters
from megatronish.planning.stack import Stack

Kind = Literal["all_reduce", "all_gather", "reduce_scatter", "all_to_all", "point_to_point"]
Phase = Literal["forward", "backward", "recompute", "reduce", "update"]

# Multiples of payload * (n - 1) / n that each rank sends in a ring collective.
_RING_PASSES = {"all_reduce": 2, "all_gather": 1, "reduce_scatter": 1, "all_to_all": 1}


@dataclass(frozen=True)
class Traffic:
    """Equal collectives of one rank in one optimizer step.

    payload: bytes of the full tensor that is reduced or gathered, or that a rank exchanges or sends.
    """

    name: str
    axis: AxisName
    kind: Kind
    phase: Phase
    payload: float
    calls: float

    @property
    def bytes(self) -> float:
        """Payload of all calls."""
        return self.payload * self.calls

    def sent(self, ranks: int) -> float:
        """Bytes sent per rank for all calls by ring, in a group of `ranks`."""
        return sent_bytes(self.kind, self.payload, ranks) * self.calls


def traffic_group(entry: Traffic, layout: PlannedLayout, gpus_per_node: int) -> Group:
    """The ranks that take part: of a pipeline's reductions its two ends, which sit on different nodes."""
    if entry.axis == "pp" and entry.kind != "point_to_point":
        return Group(2, 1)
    return layout.group(entry.axis, gpus_per_node)


def sent_bytes(kind: Kind, payload: float, ranks: int) -> float:
    """Bytes that a rank sends for one collective by ring (Patarasuk and Yuan 2009), or for one message."""
    if ranks == 1:
        return 0.0
    return payload if kind == "point_to_point" else _RING_PASSES[kind] * payload * (ranks - 1) / ranks


@dataclass(frozen=True)
class _Protocol:
    """One of NCCL's protocols; seconds per ring or tree step, within a node and between nodes."""

    ring_base: float
    ring_local: float
    ring_network: float
    tree_base: float
    tree_local: float
    tree_network: float
    rate_share: float


_LL128 = _Protocol(14.0e-6, 1.9e-6, 4.0e-6, 14.0e-6, 1.25e-6, 8.5e-6, 0.92)
_SIMPLE = _Protocol(8.4e-6, 3.4e-6, 14.0e-6, 8.4e-6, 4.0e-6, 14.0e-6, 1.0)
_TREE_RATE_SHARE = 0.92


def collective_seconds(kind: Kind, payload: float, group: Group, hardware: Hardware) -> float:
    """Time of one collective in a group (0 for a single rank), were nothing else using the links.

    A group with k ranks on a node drives k network adapters, so its ring moves k times an adapter's rate between nodes, at
    most NVLink's.
    """
    if group.size == 1:
        return 0.0
    if kind in ("all_to_all", "point_to_point"):
        return _direct_seconds(kind, payload, group, hardware)
    return min(
        seconds
        for protocol in (_LL128, _SIMPLE)
        for seconds in (
            _ring_seconds(kind, payload, group, hardware, protocol),
            _tree_seconds(payload, group, hardware, protocol) if kind == "all_reduce" else math.inf,
        )
    )


def _bus_rate(group: Group, hardware: Hardware) -> float:
    if group.nodes == 1:
        return hardware.node_rate
    across = group.local * hardware.network_rate
    return across if group.local == 1 else min(hardware.node_rate, across)


def _ring_seconds(kind: Kind, payload: float, group: Group, hardware: Hardware, by: _Protocol) -> float:
    passes = _RING_PASSES[kind]
    network_steps = passes * (group.nodes - 1)
    local_steps = passes * (group.size - 1) - network_steps
    # NCCL: with one rank a node nothing hides a network step, and the tree's figure applies.
    network = by.tree_network if group.local == 1 else by.ring_network
    latency = by.ring_base + local_steps * by.ring_local + network_steps * network
    return latency + sent_bytes(kind, payload, group.size) / (_bus_rate(group, hardware) * by.rate_share)


def _tree_seconds(payload: float, group: Group, hardware: Hardware, by: _Protocol) -> float:
    depth = math.ceil(math.log2(group.nodes))
    latency = by.tree_base + 2 * ((group.local - 1) * by.tree_local + depth * by.tree_network)
    return latency + 2 * payload / (_bus_rate(group, hardware) * by.rate_share * _TREE_RATE_SHARE)


def _direct_seconds(kind: Kind, payload: float, group: Group, hardware: Hardware) -> float:
    """All-to-all and messages: every peer directly, those on other nodes through the rank's own adapter."""
    if kind == "point_to_point":
        apart = group.nodes > 1  # the slowest pair of neighbours sets the pace
        rate = hardware.network_rate if apart else hardware.node_rate
        return _SIMPLE.ring_base + (_SIMPLE.ring_network if apart else _SIMPLE.ring_local) + payload / rate
    near = payload * (group.local - 1) / group.size / hardware.node_rate
    far = payload * (group.size - group.local) / group.size / hardware.network_rate
    latency = _SIMPLE.ring_base + (_SIMPLE.ring_network if group.nodes > 1 else _SIMPLE.ring_local)
    return latency + max(near, far)


def step_traffic(
    model: ModelConfig, layout: PlannedLayout, stack: Stack, layers: StageLayers, item_bytes: int = 2
) -> list[Traffic]:
    """Everything that a rank of the stage sends in an optimizer step, but for a few scalars and one-off messages.

    item_bytes: of weights and activations. Sequences have model.seq_length tokens.
    """
    traffic: list[Traffic] = []
    if layout.tensor > 1:
        traffic += _tensor_traffic(model, layout, layers, item_bytes)
    if layout.sequence > 1:
        traffic += _ulysses_traffic(model, layout, layers, item_bytes)
    if layout.pipeline > 1:
        traffic += _pipeline_traffic(model, layout, stack, layers, item_bytes)
    if layout.shards > 1:
        traffic += _data_traffic(model, layout, stack, layers, item_bytes)
    return [entry for entry in traffic if entry.calls and entry.payload]


def _tensor_traffic(model: ModelConfig, layout: PlannedLayout, layers: StageLayers, item_bytes: int) -> list[Traffic]:
    """Sums after row-parallel matrices and the embedding, and of the gradients of column-parallel ones and the head."""
    tokens = layout.micro_batch * model.seq_length
    hidden, micro = float(tokens * model.hidden_size * item_bytes), layout.accumulation
    rows, columns = 2 * layers.blocks + layers.first, 2 * layers.blocks + layers.last
    again = (
        layers.blocks if layout.recompute != "none" else 0
    )  # of a block only what its saved tensors need: not the end

    def entry(name: str, kind: Kind, phase: Phase, payload: float, calls: float) -> Traffic:
        return Traffic(name, "tp", kind, phase, payload, calls * micro)

    if layout.tensor_sequence:
        found = [
            entry("rows to sequence", "reduce_scatter", "forward", hidden, rows),
            entry("sequence to columns", "all_gather", "forward", hidden, columns),
            entry("sequence to columns, again", "all_gather", "backward", hidden, columns),
            entry("columns' gradients", "reduce_scatter", "backward", hidden, columns),
            entry("rows' gradients", "all_gather", "backward", hidden, rows),
            entry("rows to sequence", "reduce_scatter", "recompute", hidden, again),
            entry("sequence to columns", "all_gather", "recompute", hidden, 2 * again),
        ]
        found += [
            entry("shared parameters' gradients", "all_reduce", "backward", float(size * item_bytes), count)
            for size, count in _shared_sizes(model, layers)
        ]
    else:
        found = [
            entry("sum of rows", "all_reduce", "forward", hidden, rows),
            entry("columns' gradients", "all_reduce", "backward", hidden, columns),
            entry("sum of rows", "all_reduce", "recompute", hidden, again),
        ]
    head_norms = 2 * layers.blocks if model.qk_norm else 0
    width = model.resolved_head_dim * item_bytes
    biased = model.norm == "layernorm" and model.norm_bias
    found.append(entry("head norms' gradients", "all_reduce", "backward", float(width), head_norms * (1 + biased)))
    if model.resolved_kv_heads < layout.tensor:
        rows_kv = 2 * model.resolved_kv_heads * model.resolved_head_dim * item_bytes
        found.append(
            entry(
                "shared key/value weights", "all_reduce", "backward", float(rows_kv * model.hidden_size), layers.blocks
            )
        )
        if model.attention_qkv_bias:
            found.append(entry("shared key/value biases", "all_reduce", "backward", float(rows_kv), layers.blocks))
    # Of each token, in fp32: the largest logit; then the sum of exponentials and the label's logit.
    found.append(entry("loss: maximum", "all_reduce", "forward", 4.0 * tokens, layers.last))
    found.append(entry("loss: sums", "all_reduce", "forward", 8.0 * tokens, layers.last))
    return found


def _shared_sizes(model: ModelConfig, layers: StageLayers) -> list[tuple[int, int]]:
    """(elements, tensors a stage) of parameters that all ranks hold and of which each sees a part of the sequence."""
    norms = layers.blocks * (2 if model.has_mlp_norm else 1) + layers.final_norm
    tensors = 2 if model.norm == "layernorm" and model.norm_bias else 1
    biases = layers.blocks * (model.attention_out_bias + model.mlp_bias)
    return [(model.hidden_size, norms * tensors + biases)]


def _ulysses_traffic(model: ModelConfig, layout: PlannedLayout, layers: StageLayers, item_bytes: int) -> list[Traffic]:
    """Heads against sequence before attention and back after it (Jacobs et al. 2023)."""
    tokens = layout.micro_batch * model.seq_length // layout.sequence
    heads, kv_heads = model.num_attention_heads, max(model.resolved_kv_heads, layout.sequence)
    there = float(tokens * (heads + 2 * kv_heads) * model.resolved_head_dim * item_bytes)
    back = float(tokens * heads * model.resolved_head_dim * item_bytes)
    calls = layers.blocks * layout.accumulation
    phases: list[Phase] = ["forward", "backward"]
    if layout.recompute != "none":
        phases.append("recompute")
    return [
        Traffic(name, "sp", "all_to_all", phase, payload, calls)
        for phase in phases
        for name, payload in (("heads to ranks", there), ("sequence to ranks", back))
    ]


def _pipeline_traffic(
    model: ModelConfig, layout: PlannedLayout, stack: Stack, layers: StageLayers, item_bytes: int
) -> list[Traffic]:
    """Hidden states to the next stage, their gradients to the one before, and the gradient of a tied embedding."""
    parts = layout.tensor if layout.tensor_sequence or stack.divides_messages else 1
    message = float(layout.micro_batch * model.seq_length * model.hidden_size * item_bytes / parts)
    each = layout.accumulation * layout.interleave
    wraps = layout.accumulation * (layout.interleave - 1)  # the ends also talk to one another
    found = [
        Traffic("hidden states", "pp", "point_to_point", "forward", message, wraps if layers.last else each),
        Traffic(
            "hidden states' gradients", "pp", "point_to_point", "backward", message, wraps if layers.first else each
        ),
    ]
    if model.tie_embeddings and (layers.first or layers.last):
        table = float(-(-model.vocab_size // layout.tensor) * model.hidden_size * item_bytes)
        found.append(Traffic("tied embedding's gradient", "pp", "all_reduce", "reduce", table, 1))
    return found


def _data_traffic(
    model: ModelConfig, layout: PlannedLayout, stack: Stack, layers: StageLayers, item_bytes: int
) -> list[Traffic]:
    """Gradients and weights, according to the ZeRO stage (Rajbhandari et al. 2020)."""
    count = rank_parameters(model, layout.tensor, layers).total
    weights, gradients = float(count * item_bytes), float(count * stack.gradient_bytes)
    if layout.zero == 3:
        # A tied table is gathered for the embedding and for the head.
        twice = float(model.vocab_size * model.hidden_size * item_bytes) if model.tie_embeddings else 0.0
        return [
            Traffic("weights", "data", "all_gather", "forward", weights + twice, layout.accumulation),
            Traffic("weights, again", "data", "all_gather", "backward", weights + twice, layout.accumulation),
            Traffic("gradients", "data", "reduce_scatter", "reduce", gradients, layout.accumulation),
        ]
    often = layout.accumulation if layout.zero == 2 and stack.reduces_each_micro_batch else 1
    kind: Kind = "reduce_scatter" if layout.zero and stack.shards_gradients else "all_reduce"
    found = [Traffic("gradients", "data", kind, "reduce", gradients, often)]
    if layout.zero:
        found.append(Traffic("updated weights", "data", "all_gather", "update", weights, 1))
    return found
