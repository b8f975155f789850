"""The layers of a rank: plain ones in a single process, sharded ones under tensor parallelism.

Parameter names are those of the single process wherever possible; each sharded parameter records which part of the full
tensor it holds (`parallel.layers.TensorShard`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from megatronish.config.model import ModelConfig
from megatronish.model.linear import Linear
from megatronish.ops.cross_entropy import CrossEntropyBackend, token_losses
from megatronish.parallel.collectives import all_gather_sequence
from megatronish.parallel.layers import (
    ColumnParallelLinear,
    RowParallelLinear,
    SharedKVLinear,
    TensorParallel,
    TensorShard,
    VocabParallelEmbedding,
    column_linear,
    part_of,
    shard_of,
    sharded_parameter,
)

SINGLE = TensorParallel()


@dataclass(frozen=True)
class VocabularyPart:
    """The range [start, stop) of the vocabulary whose rows of the head this rank holds."""

    group: ProcessGroup
    start: int
    stop: int


# (hidden [b, s, hidden], weight [V, hidden], labels [b, s], the part of the vocabulary that weight is of; None: all) -> the
# sum of the cross-entropy over tokens, in fp32, without logits; ignored labels add nothing. With a part every rank is given
# the same hidden states, and the gradient of those is the sum over ranks.
LinearCrossEntropy = Callable[[Tensor, Tensor, Tensor, VocabularyPart | None], Tensor]


def local_heads(config: ModelConfig, tp: TensorParallel) -> tuple[int, int]:
    """Query heads and key/value heads that a rank computes."""
    return config.num_attention_heads // tp.size, max(1, config.resolved_kv_heads // tp.size)


def build_qkv(config: ModelConfig, tp: TensorParallel) -> nn.Module:
    """The packed projection [q heads; k; v] of the rank's heads."""
    heads, kv_heads, width = config.num_attention_heads, config.resolved_kv_heads, config.resolved_head_dim
    bias = config.attention_qkv_bias
    if kv_heads < tp.size:
        return SharedKVLinear(config.hidden_size, heads, kv_heads, width, bias, tp)
    return build_column(config.hidden_size, (heads * width, kv_heads * width, kv_heads * width), bias, tp)


def build_column(in_features: int, parts: Sequence[int], bias: bool, tp: TensorParallel) -> nn.Module:
    """A linear layer with packed outputs `parts`, each sharded over the ranks."""
    if tp.size == 1:
        return Linear(in_features, sum(parts), bias=bias)
    return ColumnParallelLinear(in_features, parts, bias, tp)


def build_row(in_features: int, out_features: int, bias: bool, tp: TensorParallel) -> nn.Module:
    """A linear layer whose input features are sharded over the ranks and whose outputs are summed over them."""
    if tp.size == 1:
        return Linear(in_features, out_features, bias=bias)
    return RowParallelLinear(in_features, out_features, bias, tp)


class ShardedEmbedding(VocabParallelEmbedding):
    """The token embedding, sharded by vocabulary, with dropout."""

    def __init__(self, config: ModelConfig, tp: TensorParallel) -> None:
        super().__init__(config.vocab_size, config.hidden_size, tp)
        self.dropout = config.embedding_dropout

    def forward(self, tokens: Tensor) -> Tensor:
        """tokens [b, s] -> [b, s, hidden], or the rank's chunk of the sequence."""
        return F.dropout(super().forward(tokens), self.dropout, self.training)


class VocabParallelHead(nn.Module):
    """Logits of the rank's part of the vocabulary."""

    def __init__(self, config: ModelConfig, tp: TensorParallel) -> None:
        super().__init__()
        self.tp = tp
        rows = part_of(config.vocab_size, tp.size, tp.rank)
        self.start, self.vocab_size = rows[0], config.vocab_size
        self.weight = sharded_parameter(TensorShard((config.vocab_size, config.hidden_size), 0, (rows,)))

    def forward(self, hidden: Tensor) -> Tensor:
        """hidden [b, s, hidden], or the rank's chunk of the sequence -> logits [b, s, V of the rank]."""
        return column_linear(hidden, self.weight, None, self.tp)

    def linear_loss(self, hidden: Tensor, labels: Tensor, loss: LinearCrossEntropy) -> Tensor:
        """`loss` of hidden [b, s, hidden], or of the rank's chunk of the sequence, without materialising logits."""
        if self.tp.sequence:
            hidden = all_gather_sequence(hidden, self.tp.group)
        part = VocabularyPart(self.tp.group, self.start, self.start + self.weight.shape[0])
        return loss(hidden, self.weight, labels, part)

    def loss(self, logits: Tensor, labels: Tensor, ignore_index: int, backend: CrossEntropyBackend) -> Tensor:
        """Sum over tokens of the cross-entropy, the same on every rank."""
        return token_losses(
            logits,
            labels,
            ignore_index,
            backend=backend,
            group=self.tp.group,
            vocab_start=self.start,
            vocab_size=self.vocab_size,
        ).sum()


def full_shapes(module: nn.Module) -> Iterator[tuple[str, nn.Parameter, tuple[int, ...]]]:
    """Every parameter with the name and the shape of its full tensor."""
    for name, parameter in module.named_parameters():
        shard = shard_of(parameter)
        if shard is None:
            yield name, parameter, tuple(parameter.shape)
        else:
            yield shard.full_name(name), parameter, shard.full
