"""The decoding step as one graph of torch.compile, for one new token per row.

Positions and rows are tensors, so no length is a constant of the graph, which would recompile it for every token.
Attention reads the cache with the CPU kernels or, for models that these do not support, in full and masked.
"""

from __future__ import annotations

import os
import shutil
from typing import Any

import torch
from torch import Tensor

from megatronish.errors import UserError
from megatronish.model.attention import AttentionInputs
from megatronish.model.kv_cache import KVCache
from megatronish.model.transformer import Transformer
from megatronish.ops.attention import attention
from megatronish.ops.cached_attention import cached_attention_, fused_takes
from megatronish.ops.dispatch import AttentionBackend


class _Static:
    """The tensors of a cache, as an input of the graph."""

    def __init__(self, keys: list[Tensor], values: list[Tensor], rows: Tensor, positions: Tensor) -> None:
        self.keys, self.values, self.rows, self.positions = keys, values, rows, positions

    def attend(
        self, layer: int, q: Tensor, k: Tensor, v: Tensor, window: int | None, backend: AttentionBackend
    ) -> Tensor:
        """As KVCache.attend."""
        keys, values, capacity = self.keys[layer], self.values[layer], self.keys[layer].shape[1]
        if backend != "reference" and fused_takes(q, keys):
            return cached_attention_(q, k, v, keys, values, self.rows, self.positions, window)
        rows, places = self.rows.long(), self.positions.long() % capacity
        keys[rows[:, None], places], values[rows[:, None], places] = k, v
        # A place holds the last position that maps to it, none if that would be negative.
        last = self.positions[:, -1:]
        place = torch.arange(capacity, dtype=torch.int32, device=q.device)
        held = (last - (last - place) % capacity)[:, None, None]
        query = self.positions[:, None, :, None]
        mask = (held >= 0) & (held <= query)
        if window is not None:
            mask = mask & (held > query - window)
        masked: AttentionBackend = "reference" if backend == "reference" else "sdpa"  # which support a mask
        return attention(q, keys[rows], values[rows], backend=masked, window=window, mask=mask)


class CompiledStep:
    """Logits [b, 1, V] of one more token per row, as `model(tokens, cache=cache)`.

    Compiled at the first call, and once more for the first call with several rows; this takes seconds per layer. Raises
    UserError if torch.compile has no C++ compiler for a CPU.
    """

    def __init__(self, model: Transformer) -> None:
        compilers = (os.environ.get("CXX"), "g++", "clang++")
        on_cpu = next(model.parameters()).device.type == "cpu"
        if on_cpu and not any(name and shutil.which(name) for name in compilers):
            raise UserError(
                "--compile needs a C++ compiler, and neither g++ nor clang++ is here: install one, or leave it out"
            )
        self._model = model
        self._graph = torch.compile(self._step)

    def __call__(self, tokens: Tensor, cache: KVCache) -> Tensor:
        """tokens [b, 1] int64; `cache` of these rows, extended by them."""
        positions, rows = cache.begin(tokens), cache.selected_rows
        cos, sin = self._model.rotary.get(tokens.device, cache.max_length)
        if len(tokens) > 1:  # one row always has a separate graph; the sizes of the cache remain constants
            for tensor in (tokens, positions, rows):
                torch._dynamo.mark_dynamic(tensor, 0)
        held: Any = _Static(cache.keys, cache.values, rows, positions)
        logits: Tensor = self._graph(tokens, AttentionInputs(cos, sin, positions, cache=held))
        cache.advance()
        return logits

    def _step(self, tokens: Tensor, inputs: AttentionInputs) -> Tensor:
        model = self._model
        assert model.head is not None, "generation needs all pipeline stages"
        logits: Tensor = model.head(model.run_blocks(model.embed(tokens), inputs))
        return logits
