"""Key/value cache for decoding, of rows of unequal lengths."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from megatronish.config.model import ModelConfig
from megatronish.ops.attention import attention
from megatronish.ops.cached_attention import cached_attention_, fused_takes
from megatronish.ops.dispatch import AttentionBackend

CACHE_CHUNK = 512  # tokens per prefill pass: bounds the memory of the activations and logits of a long prompt


def cache_capacity(window: int | None, length: int, chunk: int = CACHE_CHUNK) -> int:
    """Tokens per row that a KVCache of `length` keeps in a layer with this sliding window.

    In a forward pass of `chunk` tokens the first one reads window - 1 tokens before the chunk, and the last one itself.
    """
    return length if window is None else min(length, window + min(chunk, length) - 1)


def kv_cache_bytes(config: ModelConfig, batch_size: int, length: int, bytes_per_element: int = 2) -> int:
    """Memory of a KVCache."""
    heads = config.resolved_kv_heads * config.resolved_head_dim
    tokens = sum(cache_capacity(config.layer_window(layer), length) for layer in range(config.num_layers))
    return 2 * tokens * batch_size * heads * bytes_per_element


class KVCache:
    """Preallocated keys and values of every layer, [rows, capacity, kv_heads, head_dim] each.

    Position p of a row is stored at p % capacity. A layer with full attention has capacity max_length; one with a sliding
    window is a ring buffer of window + chunk - 1 tokens. A row holds `lengths[row]` tokens; `Transformer.forward` appends to
    them. `select` returns a cache of some of the rows that shares their memory and lengths.
    """

    def __init__(
        self,
        config: ModelConfig,
        batch_size: int,
        max_length: int,
        *,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        chunk: int = CACHE_CHUNK,
    ) -> None:
        """chunk: with sliding windows, the most tokens that one forward pass appends to a row and that `rewind` removes."""
        if batch_size < 1 or max_length < 1:
            raise ValueError(
                f"KVCache needs batch_size and max_length of at least 1, got {batch_size} and {max_length}"
            )
        self.max_length, self.chunk = max_length, min(chunk, max_length)
        self.slides = config.sliding_window is not None and config.sliding_window + self.chunk - 1 < max_length
        self.keys, self.values = [], []
        for layer in range(config.num_layers):
            capacity = cache_capacity(config.layer_window(layer), max_length, self.chunk)
            shape = (batch_size, capacity, config.resolved_kv_heads, config.resolved_head_dim)
            self.keys.append(torch.zeros(shape, device=device, dtype=dtype))
            self.values.append(torch.zeros(shape, device=device, dtype=dtype))
        self.lengths = [0] * batch_size  # of all rows, including those not selected
        self.rows = list(range(batch_size))
        self._device = self.keys[0].device
        self._rows_tensor = torch.tensor(self.rows, dtype=torch.int32, device=self._device)
        self._positions = torch.zeros(batch_size, 0, dtype=torch.int32)
        self._masks: dict[tuple[int, int, int | None], Tensor] = {}
        self._parts: list[KVCache] = []  # one cache per row, in a forward pass of rows with different valid lengths

    @property
    def nbytes(self) -> int:
        """Memory of keys and values."""
        return sum(tensor.nbytes for tensor in (*self.keys, *self.values))

    @property
    def length(self) -> int:
        """Tokens of the longest of the selected rows."""
        return max(self.lengths[row] for row in self.rows)

    @property
    def selected_rows(self) -> Tensor:
        """The selected rows, int32 [rows] on the cache's device."""
        return self._rows_tensor

    def select(self, rows: Sequence[int]) -> KVCache:
        """A cache of these rows, in this order: a forward pass with it reads and extends only them."""
        selected = object.__new__(KVCache)
        selected.__dict__.update(self.__dict__)
        selected.rows = [self.rows[row] for row in rows]
        selected._rows_tensor = torch.tensor(selected.rows, dtype=torch.int32, device=self._device)
        selected._masks, selected._parts = {}, []
        return selected

    def reset(self) -> None:
        """Remove all tokens of the selected rows; the memory stays allocated."""
        for row in self.rows:
            self.lengths[row] = 0

    def rewind(self, length: int) -> None:
        """Remove the tokens of the selected rows from position `length`. Raises ValueError where fewer are held, or where a
        sliding window has overwritten keys that the tokens before `length` need."""
        for row in self.rows:
            if not 0 <= length <= self.lengths[row]:
                raise ValueError(f"cannot rewind a cache of {self.lengths[row]} tokens to {length}")
            if not self.can_rewind(self.lengths[row] - length):
                raise ValueError(
                    f"cannot rewind a sliding window by {self.lengths[row] - length} tokens: it keeps {self.chunk}"
                )
            self.lengths[row] = length

    def can_rewind(self, tokens: int) -> bool:
        """Whether the last `tokens` tokens of a row can be removed without recomputing earlier ones."""
        return not self.slides or tokens <= self.chunk

    def begin(self, tokens: Tensor, counts: Sequence[int] | None = None) -> Tensor:
        """Prepare for a forward pass of `tokens` [b, s]: their positions, int32 [b, s] on the cache's device.

        counts: valid lengths, the number of tokens of each row that are not padding. Padding is not stored, and attention is
        computed row by row, so that a row's result does not depend on the others. Raises ValueError unless the tokens fit
        after those held.
        """
        batch, new = tokens.shape
        if batch != len(self.rows):
            raise ValueError(f"the cache was made for a batch of {len(self.rows)}, got tokens of {batch} rows")
        self._parts = []
        if counts is not None:
            self._parts = [self.select([row]) for row in range(batch)]
            for row, (part, count) in enumerate(zip(self._parts, counts, strict=True)):
                part.begin(tokens[row : row + 1, :count])
        elif self.length + new > self.max_length:
            raise ValueError(
                f"{new} tokens do not fit after the {self.length} in a cache of {self.max_length}: make the cache longer"
            )
        elif self.slides and new > self.chunk:
            raise ValueError(
                f"{new} tokens at once do not fit a sliding window's cache: give at most {self.chunk}, its chunk"
            )
        starts = torch.tensor([self.lengths[row] for row in self.rows], dtype=torch.int32)
        self._positions = (starts[:, None] + torch.arange(new, dtype=torch.int32)).to(self._device)
        self._masks = {}
        return self._positions

    def advance(self) -> None:
        """Count the tokens of the forward pass as stored."""
        for part in self._parts or [self]:
            for row in part.rows:
                self.lengths[row] += part._positions.shape[1]

    def attend(
        self, layer: int, q: Tensor, k: Tensor, v: Tensor, window: int | None, backend: AttentionBackend
    ) -> Tensor:
        """Write k, v [b, new, kv_heads, head_dim] of one layer, then attention of q [b, new, heads, head_dim] over the
        keys that each query can reach; returns [b, new, heads, head_dim]."""
        if self._parts:
            out = torch.zeros_like(q)
            for row, part in enumerate(self._parts):
                mine = slice(row, row + 1), slice(part._positions.shape[1])
                out[mine] = part.attend(layer, q[mine], k[mine], v[mine], window, backend)
            return out
        keys, values = self.keys[layer], self.values[layer]
        new = q.shape[1]
        if backend != "reference" and fused_takes(q, keys):
            return cached_attention_(q, k, v, keys, values, self._rows_tensor, self._positions, window)
        start, capacity = self.lengths[self.rows[0]], keys.shape[1]
        uniform = self.rows == list(range(self.rows[0], self.rows[-1] + 1)) and all(
            self.lengths[row] == start for row in self.rows
        )
        end = start + new
        if uniform and end <= capacity:
            rows = slice(self.rows[0], self.rows[-1] + 1)
            keys[rows, start:end], values[rows, start:end] = k, v
            first = 0 if window is None else max(0, start - window + 1)
            return attention(q, keys[rows, first:end], values[rows, first:end], backend=backend, window=window)
        rows_index = self._rows_tensor[:, None].long()
        places = self._positions.long() % capacity
        keys[rows_index, places], values[rows_index, places] = k, v
        span = min(capacity, self.length + new)
        chosen = self._rows_tensor.long()
        return attention(
            q,
            keys[chosen, :span],
            values[chosen, :span],
            backend="reference" if backend == "reference" else "sdpa",  # those that take a mask
            window=window,
            mask=self._mask(span, capacity, window),
        )

    def _mask(self, span: int, capacity: int, window: int | None) -> Tensor:
        """Which of the first `span` slots each query may read, bool [b, 1, new, span]; computed once per forward pass.

        A slot holds the latest position that maps to it, or none.
        """
        key = (span, capacity, window)
        if key not in self._masks:
            last = self._positions[:, -1:]
            place = torch.arange(span, dtype=torch.int32, device=self._device)
            position = (last - (last - place) % capacity)[:, None, None]
            query = self._positions[:, None, :, None]
            mask = (position >= 0) & (position <= query)
            self._masks[key] = mask if window is None else mask & (position > query - window)
        return self._masks[key]
