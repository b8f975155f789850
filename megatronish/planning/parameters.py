"""Which parameters a rank holds: its part of each matrix, its stage's layers."""

from __future__ import annotations

from dataclasses import dataclass

from megatronish.config.model import ModelConfig
from megatronish.model.accounting import layer_costs
from megatronish.parallel.pipeline import balanced_stages


@dataclass(frozen=True)
class StageLayers:
    """The layers of a pipeline stage: some blocks, and whether it holds the embedding, the final norm and the head."""

    blocks: int
    first: bool = True
    last: bool = True
    final_norm: bool = True


def all_layers(model: ModelConfig) -> StageLayers:
    """All layers, on one stage."""
    return StageLayers(model.num_layers, final_norm=model.has_final_norm)


def stage_layers(model: ModelConfig, stages: int, balance: str = "time") -> list[StageLayers]:
    """How `training.loop` cuts the model into pipeline stages. Raises ValueError for more stages than layers."""
    if stages == 1:
        return [all_layers(model)]
    cuts = balanced_stages(layer_costs(model, balance), stages)
    blocks = range(1, 1 + model.num_layers)
    head = model.num_layers + model.has_final_norm + 1
    return [
        StageLayers(
            blocks=len(range(max(cut.start, blocks.start), min(cut.stop, blocks.stop))),
            first=0 in cut,
            last=head in cut,
            final_norm=model.has_final_norm and head - 1 in cut,
        )
        for cut in cuts
    ]


@dataclass(frozen=True)
class RankParameters:
    """Elements on a rank: its part of divided tensors, and tensors that all tensor-parallel ranks hold."""

    divided: int
    copied: int

    @property
    def total(self) -> int:
        """Both."""
        return self.divided + self.copied


def rank_parameters(model: ModelConfig, tensor: int, layers: StageLayers) -> RankParameters:
    """Parameters of a tensor-parallel rank of a stage; of an uneven vocabulary the first rank's part, the largest.

    A tied table is counted once on a stage that holds both its ends.
    """
    hidden, head_dim, ffn = model.hidden_size, model.resolved_head_dim, model.ffn_hidden_size
    heads, kv_heads = model.num_attention_heads, model.resolved_kv_heads
    shares_kv = kv_heads < tensor
    up = (2 if model.is_gated else 1) * ffn
    query_rows, kv_rows = heads * head_dim, 2 * kv_heads * head_dim
    divided = (2 * query_rows * hidden + (up + ffn) * hidden) // tensor
    copied = 0
    for parameters in (kv_rows * hidden, kv_rows if model.attention_qkv_bias else 0):
        if shares_kv:
            copied += parameters
        else:
            divided += parameters // tensor
    if model.attention_qkv_bias:
        divided += query_rows // tensor
    copied += hidden if model.attention_out_bias else 0
    if model.mlp_bias:
        divided += up // tensor
        copied += hidden
    norm = 2 if model.norm == "layernorm" and model.norm_bias else 1
    copied += norm * hidden * (2 if model.has_mlp_norm else 1) + (2 * norm * head_dim if model.qk_norm else 0)
    tables = 1 if model.tie_embeddings and layers.first and layers.last else layers.first + layers.last
    vocabulary = tables * -(-model.vocab_size // tensor) * hidden
    if tensor == 1:
        return RankParameters(0, layers.blocks * (divided + copied) + vocabulary + layers.final_norm * norm * hidden)
    return RankParameters(
        layers.blocks * divided + vocabulary, layers.blocks * copied + layers.final_norm * norm * hidden
    )
