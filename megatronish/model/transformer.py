"""The decoder-only transformer: a list of layers, and the module that runs them on one pipeline stage.

Shapes: b batch, s sequence, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megatronish.config.model import KernelConfig, ModelConfig
from megatronish.model.attention import AttentionInputs
from megatronish.model.block import Block, build_block, check_recompute
from megatronish.model.init import init_weights
from megatronish.model.kv_cache import KVCache
from megatronish.model.norm import build_norm
from megatronish.model.rotary import RotaryTables
from megatronish.model.sharded_layers import (
    SINGLE,
    LinearCrossEntropy,
    ShardedEmbedding,
    VocabParallelHead,
    local_heads,
)
from megatronish.ops.attention import makes_no_mask, needs_mask
from megatronish.ops.attention_mask import attention_mask
from megatronish.ops.cross_entropy import cross_entropy, resolve_cross_entropy
from megatronish.ops.dispatch import Backends, resolve_attention, resolve_ops
from megatronish.ops.linear import linear
from megatronish.parallel.layers import TensorParallel
from megatronish.parallel.mesh import Axis

IGNORED_LABEL = -100


class TokenEmbedding(nn.Module):
    """Rows of the embedding table, with dropout."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(config.vocab_size, config.hidden_size))
        self.dropout = config.embedding_dropout

    def forward(self, tokens: Tensor) -> Tensor:
        """tokens [b, s] -> [b, s, hidden]."""
        return F.dropout(F.embedding(tokens, self.weight), self.dropout, self.training)


class Head(nn.Module):
    """Logits of the next token, or their loss. With tied embeddings `weight` becomes the embedding's."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(config.vocab_size, config.hidden_size))

    def forward(self, hidden: Tensor, labels: Tensor | None = None, loss: LinearCrossEntropy | None = None) -> Tensor:
        """hidden [b, s, hidden] -> logits [b, s, V]; with labels and a loss, that loss."""
        if loss is not None and labels is not None:
            return loss(hidden, self.weight, labels, None)
        return linear(hidden, self.weight)


@dataclass(frozen=True)
class LayerSpec:
    """One layer of the model: the prefix of its parameter names, and its constructor."""

    name: str
    build: Callable[[], nn.Module]


def layer_specs(config: ModelConfig, backends: Backends, tp: TensorParallel = SINGLE) -> list[LayerSpec]:
    """The layers in order: embedding, blocks.0 ..., final_norm (unless post-norm), head."""
    alone = tp.size == 1
    embedding = partial(TokenEmbedding, config) if alone else partial(ShardedEmbedding, config, tp)
    specs = [LayerSpec("embedding", embedding)]
    for layer in range(config.num_layers):
        specs.append(LayerSpec(f"blocks.{layer}", partial(build_block, config, layer, backends, tp)))
    if config.has_final_norm:
        specs.append(LayerSpec("final_norm", partial(build_norm, config, config.hidden_size, backends.ops, tp)))
    specs.append(LayerSpec("head", partial(Head, config) if alone else partial(VocabParallelHead, config, tp)))
    return specs


class Transformer(nn.Module):
    """Token ids to logits.

    seed: of the initial weights; with None they stay uninitialised (to be loaded, or set by `init_weights`, as on the meta
    device). tp: the ranks that shard every matrix. stage: the layers of `layer_specs` that a pipeline rank holds (all by
    default); names are those of the full model. sp: the ranks that shard every sequence: each passes its chunk of tokens,
    labels and positions, and cu_seqlens of the full sequence.
    """

    def __init__(
        self,
        config: ModelConfig,
        kernels: KernelConfig | None = None,
        *,
        seed: int | None = 0,
        tp: TensorParallel = SINGLE,
        stage: range | None = None,
        sp: Axis | None = None,
    ) -> None:
        super().__init__()
        self.config = config
        self.tp = tp
        self.sp = sp or Axis()
        self.kernels = kernels or KernelConfig()
        self.backends = Backends(resolve_attention(self.kernels.attention), resolve_ops(self.kernels.ops))
        self.cross_entropy = resolve_cross_entropy(self.kernels.cross_entropy, self.backends.ops)
        self.linear_cross_entropy: LinearCrossEntropy | None = None  # for kernels.cross_entropy "linear": see `loss`
        self.rotary = RotaryTables(config)
        specs = layer_specs(config, self.backends, tp)
        layers = {specs[layer].name: specs[layer].build() for layer in (stage or range(len(specs)))}
        self.embedding = layers.get("embedding")
        # Blocks of other stages are placeholders, so that indices and parameter names are those of the full model.
        self.blocks = nn.ModuleList(layers.get(f"blocks.{layer}", nn.Identity()) for layer in range(config.num_layers))
        self.final_norm = layers.get("final_norm")
        self.head = layers.get("head")
        self.tie_weights()
        if seed is not None and not next(self.parameters()).is_meta:
            init_weights(self, config, seed)

    def tie_weights(self) -> None:
        """Make the head share the embedding's weight, if the configuration ties them (to be called again after `to_empty`)."""
        if self.config.tie_embeddings and self.embedding is not None and self.head is not None:
            self.head.weight = self.embedding.weight

    def forward(
        self,
        tokens: Tensor,
        *,
        positions: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        max_seqlen: int | None = None,
        cache: KVCache | None = None,
        last: int | None = None,
    ) -> Tensor:
        """tokens [b, s] int -> logits [b, s, V] in the dtype of the weights, or only of the `last` tokens of each row. A
        tensor-parallel rank returns its columns of V.

        positions: [b, s] int; by default from 0, or from the length of the cache. cu_seqlens: int32 [documents + 1],
        cumulative document lengths over the flattened b * s tokens, including the end of every row; attention stays inside
        a document. max_seqlen: the longest document. cache: keys and values of earlier tokens, extended by these. Raises
        ValueError for shapes that do not match and for cu_seqlens together with a cache.
        """
        assert self.head is not None, "only the last stage computes logits"
        hidden = self._hidden(tokens, positions, cu_seqlens, max_seqlen, cache)
        return self.head(hidden if last is None else hidden[:, -last:])

    def last_hidden(self, tokens: Tensor, cache: KVCache, counts: Sequence[int]) -> Tensor:
        """The head's input for the last valid token of each row, [b, hidden]: tokens [b, s] after those in `cache`, of which
        the first counts[row] are valid."""
        hidden = self._hidden(tokens, None, None, None, cache, counts if len(counts) > 1 else None)
        return hidden[torch.arange(len(counts)), torch.tensor(counts) - 1]

    def _hidden(
        self,
        tokens: Tensor,
        positions: Tensor | None,
        cu_seqlens: Tensor | None,
        max_seqlen: int | None,
        cache: KVCache | None,
        counts: Sequence[int] | None = None,
    ) -> Tensor:
        """The head's input [b, s, hidden]. counts: as in KVCache.begin."""
        if tokens.ndim != 2:
            raise ValueError(f"tokens must be [batch, sequence], got shape {tuple(tokens.shape)}")
        if cu_seqlens is not None:
            _check_documents(cu_seqlens, tokens.shape[0], tokens.shape[1] * self.sp.size)
        if cache is not None:
            if cu_seqlens is not None:
                raise ValueError("packed documents cannot follow a key/value cache: leave out cu_seqlens or the cache")
            following = cache.begin(tokens, counts)
            positions = following if positions is None else positions
        hidden = self.run_stage(None, tokens, positions, cu_seqlens, max_seqlen, cache)
        if cache is not None:
            cache.advance()
        return hidden

    def embed(self, tokens: Tensor) -> Tensor:
        """The first block's input: tokens [b, s] -> [b, s, hidden], or the rank's chunk of the sequence."""
        assert self.embedding is not None, "only the first stage embeds tokens"
        x: Tensor = self.embedding(tokens)
        if not self.config.embedding_scaled:
            return x
        # The factor is rounded to the dtype first, as Gemma was trained with it.
        return x * torch.tensor(math.sqrt(self.config.hidden_size), dtype=x.dtype)

    def run_stage(
        self,
        x: Tensor | None,
        tokens: Tensor,
        positions: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        max_seqlen: int | None = None,
        cache: KVCache | None = None,
    ) -> Tensor:
        """All layers of this stage except the head, on the hidden states x of the previous stage (unused by the first).

        tokens [b, s] and the other arguments as in `forward`. Returns [b, s, hidden], or the rank's chunk of the sequence.
        """
        if self.embedding is not None:
            x = self.embed(tokens)
        assert x is not None, "a later stage needs hidden states"
        return self.run_blocks(x, self._attention_inputs(x, tokens, positions, cu_seqlens, max_seqlen, cache))

    def run_blocks(self, x: Tensor, inputs: AttentionInputs) -> Tensor:
        """The blocks and the final norm of this stage: hidden states x [b, s, hidden] -> [b, s, hidden]."""
        branch: Tensor | None = None  # the residual stream is x + branch (see model.block)
        for block in self.local_blocks:
            x, branch = block(x, branch, inputs)
        if self.final_norm is not None:
            _, x = self.final_norm(x, branch)
            return x
        return x if branch is None else x + branch

    @property
    def local_blocks(self) -> list[Block]:
        """The blocks of this stage, in order."""
        return [block for block in self.blocks if isinstance(block, Block)]

    def loss(
        self,
        tokens: Tensor,
        labels: Tensor,
        positions: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        max_seqlen: int | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Sum of the cross-entropy over labelled tokens (fp32 scalar, nats) and their number (int64 scalar).

        labels [b, s]: the token that should follow each of `tokens` (already shifted); -100 is ignored. With
        kernels.cross_entropy "linear" the head and the loss are fused into `linear_cross_entropy`, which the training engine
        sets; raises ValueError where it is not set.
        """
        hidden = self._hidden(tokens, positions, cu_seqlens, max_seqlen, None)
        return self.hidden_loss(hidden, labels), (labels != IGNORED_LABEL).sum()

    def hidden_loss(self, hidden: Tensor, labels: Tensor) -> Tensor:
        """The sum that `loss` returns, from the head's input; the same on all tensor-parallel ranks."""
        assert self.head is not None, "only the last stage computes a loss"
        if self.kernels.cross_entropy == "linear":
            if self.linear_cross_entropy is None:
                raise ValueError(
                    "kernels.cross_entropy is 'linear', but Transformer.linear_cross_entropy is not set: "
                    "training.engine.Engine sets it; elsewhere choose 'auto'"
                )
            if isinstance(self.head, VocabParallelHead):
                return self.head.linear_loss(hidden, labels, self.linear_cross_entropy)
            linear_loss: Tensor = self.head(hidden, labels, self.linear_cross_entropy)
            return linear_loss
        logits = self.head(hidden)
        if isinstance(self.head, VocabParallelHead):
            return self.head.loss(logits, labels, IGNORED_LABEL, self.cross_entropy)
        return cross_entropy(logits, labels, IGNORED_LABEL, backend=self.cross_entropy)

    def _attention_inputs(
        self,
        x: Tensor,
        tokens: Tensor,
        positions: Tensor | None,
        cu_seqlens: Tensor | None,
        max_seqlen: int | None,
        cache: KVCache | None,
    ) -> AttentionInputs:
        """What all blocks share, computed once: rotary tables, and masks where the backend needs them."""
        batch, new = tokens.shape
        offset = self.sp.rank * new if cache is None else cache.length
        cos, sin = self.rotary.get(x.device, offset + new)
        new *= self.sp.size
        if positions is not None:
            positions = positions.to(torch.int32)
        masks = {}
        if cache is None:  # a cache builds its own masks
            kv_heads = max(1, local_heads(self.config, self.tp)[1] // self.sp.size)
            dropout = self.config.attention_dropout if self.training else 0.0
            sizes = (batch, new, new, kv_heads, self.config.resolved_head_dim)
            unread = makes_no_mask(self.backends.attention, x, *sizes, dropout)
            for window in {self.config.layer_window(layer) for layer in range(self.config.num_layers)}:
                if not unread and needs_mask(new, new, window, cu_seqlens):
                    masks[window] = attention_mask(
                        batch, new, new, window=window, cu_seqlens=cu_seqlens, device=x.device
                    )
        return AttentionInputs(cos, sin, positions, offset, cu_seqlens, max_seqlen, masks, cache, sp=self.sp)

    def set_activation_checkpointing(self, mode: str) -> None:
        """What each block keeps for the backward pass: "none" (all), "full" (its input) or "selective" (see Block)."""
        recompute = check_recompute(mode)
        for block in self.local_blocks:
            block.recompute = recompute

    def compile_blocks(self, mode: str | None = None) -> None:
        """torch.compile every block in place (parameter names stay); mode as in torch.compile."""
        for block in self.local_blocks:
            block.compile(mode=mode)


def _check_documents(cu_seqlens: Tensor, rows: int, length: int) -> None:
    """Raise ValueError unless the documents cover the tokens. CPU tensors only: reading values would synchronise a GPU."""
    if cu_seqlens.ndim != 1 or cu_seqlens.dtype != torch.int32:
        raise ValueError(
            f"cu_seqlens must be int32 [documents + 1], got {cu_seqlens.dtype} of shape {tuple(cu_seqlens.shape)}"
        )
    if cu_seqlens.device.type != "cpu":
        return
    bounds = cu_seqlens.tolist()
    missing = set(range(0, rows * length + 1, length)) - set(bounds)
    if missing or bounds != sorted(bounds) or bounds[-1] != rows * length:
        raise ValueError(
            f"cu_seqlens must increase from 0 to {rows * length} ({rows} rows of {length} tokens) with the end of every row in "
            f"it, got {bounds if len(bounds) <= 20 else [*bounds[:20], '...']}"
        )
