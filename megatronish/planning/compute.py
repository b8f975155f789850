"""Time of one micro batch on one pipeline stage, with the tensor- and sequence-parallel communication that is not hidden.

Each matrix product takes the longer of its operations at the hardware's rate and of its bytes at the memory's; the kernels
between the products take their bytes. Launches, data loading and the host cost nothing here.
"""

from __future__ import annotations

from dataclasses import dataclass

from megatronish.config.model import ModelConfig
from megatronish.model.accounting import mean_attended_keys
from megatronish.planning.communication import Kind, collective_seconds
from megatronish.planning.hardware import Hardware
from megatronish.planning.layout import PlannedLayout
from megatronish.planning.parameters import StageLayers
from megatronish.planning.stack import Stack

# Bytes that cross memory for each query-key pair of a head where scores are kept (fp16): written, softmax, dropout with its
# mask, read again; and in the backward pass.
_SCORE_FORWARD, _SCORE_BACKWARD = 2 + 4 + 5 + 2, 2 + 5 + 6 + 6
_FUSED_BACKWARD = 2.5  # fused attention computes its scores again: five products for two
_LOGIT_FORWARD, _LOGIT_BACKWARD = 2 + 4 + 4, 4 + 2  # bytes a logit, through an fp32 copy


@dataclass(frozen=True)
class StageTime:
    """Seconds of a micro batch; `recompute` and both `tensor_` parts come on top of forward and backward.

    tensor_forward, tensor_backward: communication over "tp" and "sp" that nothing hides.
    """

    forward: float
    backward: float
    recompute: float
    tensor_forward: float
    tensor_backward: float

    @property
    def total(self) -> float:
        """All of it."""
        return self.forward + self.backward + self.recompute + self.tensor_forward + self.tensor_backward


@dataclass(frozen=True)
class _Products:
    """Seconds of one product of each matrix of a block and of the head: forward; backward has two of each."""

    qkv: float
    out: float
    up: float
    down: float
    head: float

    @property
    def block(self) -> float:
        return self.qkv + self.out + self.up + self.down


def stage_time(
    model: ModelConfig,
    layout: PlannedLayout,
    stack: Stack,
    hardware: Hardware,
    layers: StageLayers,
    item_bytes: int = 2,
) -> StageTime:
    """Time of a micro batch on a rank of the stage."""
    tokens = layout.micro_batch * model.seq_length // layout.sequence
    products = _product_times(model, layout, hardware, tokens, item_bytes)
    attention = _attention_times(model, layout, stack, hardware, tokens, layers)
    between = _between_times(model, layout, stack, hardware, tokens, layers, item_bytes)
    logits = layers.last * tokens * model.vocab_size / layout.tensor / hardware.stream_rate
    head = layers.last * products.head
    again = {
        "none": 0.0,
        "selective": between[0] + stack.recomputed_products * layers.blocks * products.block,
        "full": layers.blocks * products.block + attention[0] + between[0],
    }[layout.recompute]
    talk = _exposed(model, layout, stack, hardware, layers, products, item_bytes)
    return StageTime(
        forward=layers.blocks * products.block + head + attention[0] + between[0] + logits * _LOGIT_FORWARD,
        backward=2 * (layers.blocks * products.block + head) + attention[1] + between[1] + logits * _LOGIT_BACKWARD,
        recompute=again,
        tensor_forward=talk[0],
        tensor_backward=talk[1],
    )


def _product_times(
    model: ModelConfig, layout: PlannedLayout, hardware: Hardware, tokens: int, item_bytes: int
) -> _Products:
    tensor, hidden, head_dim = layout.tensor, model.hidden_size, model.resolved_head_dim
    kv_heads = max(model.resolved_kv_heads, tensor)

    def seconds(rows: float, columns: float) -> float:
        moved = item_bytes * (tokens * rows + rows * columns + tokens * columns)
        return max(2.0 * tokens * rows * columns / hardware.matmul_rate, moved / hardware.stream_rate)

    return _Products(
        qkv=seconds(hidden, (model.num_attention_heads + 2 * kv_heads) * head_dim / tensor),
        out=seconds(model.num_attention_heads * head_dim / tensor, hidden),
        up=seconds(hidden, (2 if model.is_gated else 1) * model.ffn_hidden_size / tensor),
        down=seconds(model.ffn_hidden_size / tensor, hidden),
        head=seconds(hidden, model.vocab_size / tensor),
    )


def _attention_times(
    model: ModelConfig, layout: PlannedLayout, stack: Stack, hardware: Hardware, tokens: int, layers: StageLayers
) -> tuple[float, float]:
    """Forward and backward seconds of the attention of a stage's blocks, windows averaged over the model."""
    heads = model.num_attention_heads / layout.tensor
    width = heads * model.resolved_head_dim
    if stack.fused_attention:
        windows = [model.layer_window(layer) for layer in range(model.num_layers)]
        keys = sum(mean_attended_keys(model.seq_length, window) for window in windows) / model.num_layers
        forward = layers.blocks * tokens * 4.0 * width * keys / hardware.attention_rate
        return forward, _FUSED_BACKWARD * forward
    pairs = layers.blocks * tokens * float(model.seq_length)  # of every head: the masked half is computed too
    products = pairs * 4.0 * width / hardware.matmul_rate
    scores = pairs * heads / hardware.stream_rate
    return products + scores * _SCORE_FORWARD, 2 * products + scores * _SCORE_BACKWARD


def _between_times(
    model: ModelConfig,
    layout: PlannedLayout,
    stack: Stack,
    hardware: Hardware,
    tokens: int,
    layers: StageLayers,
    item_bytes: int,
) -> tuple[float, float]:
    """Forward and backward seconds of norms with residual sums, rotation and activation: each tensor once in or out."""
    tensor = layout.tensor
    hidden = model.hidden_size / (tensor if layout.tensor_sequence else 1)
    rotated = (model.num_attention_heads + model.resolved_kv_heads) * model.resolved_head_dim / tensor
    up = (2 if model.is_gated else 1) * model.ffn_hidden_size / tensor
    down = model.ffn_hidden_size / tensor
    norms = (2 if model.has_mlp_norm else 1) * 4 * hidden
    dropout = 0.0 if stack.fused_attention else 2 * 2.5 * hidden  # the 2021 runs drop hidden states, masks of a byte
    forward, backward = norms + 2 * rotated + up + down + dropout, norms + 2 * rotated + 2 * up + down + dropout
    each = layers.blocks * tokens * item_bytes / hardware.stream_rate
    return forward * each, backward * each


def _exposed(
    model: ModelConfig,
    layout: PlannedLayout,
    stack: Stack,
    hardware: Hardware,
    layers: StageLayers,
    products: _Products,
    item_bytes: int,
) -> tuple[float, float]:
    """Seconds of "tp" and "sp" collectives that stay visible, forward and backward (recomputation among the latter)."""
    if layout.sequence > 1:
        return _exposed_ulysses(model, layout, hardware, layers, item_bytes)
    if layout.tensor == 1:
        return 0.0, 0.0
    tensor = layout.tensor
    payload = float(layout.micro_batch * model.seq_length * model.hidden_size * item_bytes)
    group = layout.group("tp", hardware.gpus_per_node)

    def visible(kind: Kind, product: float, independent: bool) -> float:
        """Seconds of a collective that are not hidden by a matrix product; independent: it neither feeds nor follows the product."""
        seconds = collective_seconds(kind, payload, group, hardware)
        if stack.hides_tensor == "none" or (stack.hides_tensor == "backward" and not independent):
            return seconds
        # Of a chunked collective the first chunk overlaps with nothing.
        return max(0.0, seconds - product * (1.0 if independent else (tensor - 1) / tensor))

    p, last, first = products, layers.last, layers.first
    if layout.tensor_sequence:
        columns = visible("all_gather", p.qkv, False) + visible("all_gather", p.up, False)
        rows = visible("reduce_scatter", p.out, False) + visible("reduce_scatter", p.down, False)
        ends = last * visible("all_gather", p.head, False) + first * visible("reduce_scatter", 0.0, False)
        forward = layers.blocks * (columns + rows) + ends
        back = visible("all_gather", p.out, False) + visible("all_gather", p.down, False)
        for product in (p.qkv, p.up):
            back += visible("all_gather", product, True) + visible("reduce_scatter", product, True)
        back += (columns + visible("reduce_scatter", p.out, False)) if layout.recompute != "none" else 0.0
        ends = last * (visible("all_gather", p.head, True) + visible("reduce_scatter", p.head, True))
        return forward, layers.blocks * back + ends + first * visible("all_gather", 0.0, False)
    rows = visible("all_reduce", p.out, False) + visible("all_reduce", p.down, False)
    back = visible("all_reduce", p.qkv, True) + visible("all_reduce", p.up, True)
    back += visible("all_reduce", p.out, False) if layout.recompute != "none" else 0.0
    forward = layers.blocks * rows + first * visible("all_reduce", 0.0, False)
    return forward, layers.blocks * back + last * visible("all_reduce", p.head, True)


def _exposed_ulysses(
    model: ModelConfig, layout: PlannedLayout, hardware: Hardware, layers: StageLayers, item_bytes: int
) -> tuple[float, float]:
    """All of it: attention waits for its heads, and what follows for its part of the sequence."""
    tokens = layout.micro_batch * model.seq_length // layout.sequence
    heads, kv_heads = model.num_attention_heads, max(model.resolved_kv_heads, layout.sequence)
    group = layout.group("sp", hardware.gpus_per_node)
    seconds = layers.blocks * sum(
        collective_seconds("all_to_all", float(tokens * width * model.resolved_head_dim * item_bytes), group, hardware)
        for width in (heads + 2 * kv_heads, heads)
    )
    return seconds, seconds * (2 if layout.recompute != "none" else 1)
