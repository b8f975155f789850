"""Bytes that a rank needs: weights, gradients, optimizer states, activations."""

from __future__ import annotations

from dataclasses import dataclass

from megatronish.config.model import ModelConfig
from megatronish.planning.layout import PlannedLayout
from megatronish.planning.parameters import StageLayers, rank_parameters

GRADIENT_BYTES = 4  # summed in fp32, as the files in ds_configs/ ask
ADDED_BYTES = 2  # the bf16 gradients that are added to the sums: ZeRO 0 and 1 hold all of them
STATE_BYTES = 4 + 4 + 4  # Adam: fp32 weight and two moments
USABLE_SHARE = 0.9  # of the GPU's memory; the rest goes to the CUDA context, NCCL's buffers and fragmentation


@dataclass(frozen=True)
class RankMemory:
    """Bytes on a rank at their peak; `gathered`: full weights that ZeRO-3 holds while it computes with them."""

    weights: float
    gradients: float
    states: float
    activations: float
    gathered: float

    @property
    def total(self) -> float:
        """All together."""
        return self.weights + self.gradients + self.states + self.activations + self.gathered


def rank_memory(
    model: ModelConfig, layout: PlannedLayout, layers: StageLayers, stage: int = 0, item_bytes: int = 2
) -> RankMemory:
    """What a rank of pipeline stage `stage` holds in mixed precision with Adam. Sequences have model.seq_length tokens."""
    count, shards = rank_parameters(model, layout.tensor, layers).total, layout.shards
    largest = max(
        rank_parameters(model, layout.tensor, StageLayers(1, False, False, False)).total,
        model.vocab_size * model.hidden_size * (layers.first or layers.last),
    )
    return RankMemory(
        weights=item_bytes * count / (shards if layout.zero == 3 else 1),
        gradients=GRADIENT_BYTES * count / shards
        if layout.zero >= 2
        else float((GRADIENT_BYTES + ADDED_BYTES) * count),
        states=STATE_BYTES * count / (shards if layout.zero >= 1 else 1),
        activations=_activations(model, layout, layers, stage, item_bytes),
        gathered=2.0 * item_bytes * largest if layout.zero == 3 and shards > 1 else 0.0,  # in use, and fetched ahead
    )


def _activations(model: ModelConfig, layout: PlannedLayout, layers: StageLayers, stage: int, item_bytes: int) -> float:
    """1F1B: a stage holds as many micro batches as there are stages from it on (Narayanan et al. 2021)."""
    tokens = layout.micro_batch * model.seq_length // layout.sequence
    in_flight = min(layout.accumulation, layout.pipeline - stage)
    kept = layers.blocks * block_activation_bytes(model, layout, item_bytes) * tokens * in_flight
    working = block_activation_bytes(model, layout, item_bytes, recompute="none") * tokens  # the block being recomputed
    # Logits and their gradient: ops.cross_entropy widens them a slab at a time.
    logits = layers.last * tokens * -(-model.vocab_size // layout.tensor) * 2 * item_bytes
    return kept + (working if layout.recompute != "none" else 0) + logits


def block_activation_bytes(
    model: ModelConfig, layout: PlannedLayout, item_bytes: int = 2, recompute: str | None = None
) -> float:
    """Bytes per token that a block keeps for its backward pass, with fused norms, rotation, activation and attention.

    Dropout masks are not counted. recompute: in place of the layout's.
    """
    mode = layout.recompute if recompute is None else recompute
    tensor = layout.tensor
    between = model.hidden_size / (tensor if layout.tensor_sequence else 1)  # of a tensor between the matrices
    if mode == "full":
        return item_bytes * between
    heads, kv_heads = model.num_attention_heads, max(model.resolved_kv_heads, tensor)
    attended = heads * model.resolved_head_dim / tensor
    projected = (heads + 2 * kv_heads) * model.resolved_head_dim / tensor
    up = (2 if model.is_gated else 1) * model.ffn_hidden_size / tensor
    statistics = 4.0 * heads / tensor  # attention's log-sum-exp, fp32
    if mode == "selective":  # the block's input, and what matrix products and attention put out
        return item_bytes * (3 * between + projected + attended + up) + statistics
    sums = 1 if model.parallel_block else 2
    normed = 2 if model.has_mlp_norm else 1
    unrotated = (heads + kv_heads) * model.resolved_head_dim / tensor if model.qk_norm else 0
    matrices = projected + unrotated + attended + up + model.ffn_hidden_size / tensor
    return item_bytes * ((sums + normed) * between + matrices) + statistics
