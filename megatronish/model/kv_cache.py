"""Keys and values of the tokens read so far, kept for decoding."""

from __future__ import annotations

import torch
from torch import Tensor

from megatronish.config.model import ModelConfig


class KVCache:
    """Preallocated keys and values of every layer, [b, max_length, kv_heads, head_dim] each.

    `length` tokens are filled; `Transformer.forward` writes behind them and moves `length` on.
    """

    def __init__(
        self,
        config: ModelConfig,
        batch_size: int,
        max_length: int,
        *,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        """Allocates 2 * layers * b * max_length * kv_heads * head_dim elements of `dtype` on `device`."""
        if batch_size < 1 or max_length < 1:
            raise ValueError(
                f"KVCache needs batch_size and max_length of at least 1, got {batch_size} and {max_length}"
            )
        shape = (config.num_layers, batch_size, max_length, config.resolved_kv_heads, config.resolved_head_dim)
        self.keys = torch.zeros(shape, device=device, dtype=dtype)
        self.values = torch.zeros(shape, device=device, dtype=dtype)
        self.max_length = max_length
        self.length = 0

    def reset(self) -> None:
        """Forget all tokens; the memory stays."""
        self.length = 0

    def rewind(self, length: int) -> None:
        """Forget all tokens from `length` on. Raises ValueError if fewer are held."""
        if not 0 <= length <= self.length:
            raise ValueError(f"cannot rewind a cache of {self.length} tokens to {length}")
        self.length = length

    def check(self, tokens: Tensor) -> None:
        """Raise ValueError unless `tokens` [b, s] fit behind what is held."""
        batch, new = tokens.shape
        if batch != self.keys.shape[1]:
            raise ValueError(f"the cache was made for a batch of {self.keys.shape[1]}, got tokens of {batch} rows")
        if self.length + new > self.max_length:
            raise ValueError(
                f"{new} tokens do not fit behind the {self.length} in a cache of {self.max_length}: make the cache longer"
            )

    def readable(self, new: int, window: int | None) -> int:
        """How many keys `new` queries of a layer with this window can reach, themselves included."""
        total = self.length + new
        return total if window is None else min(total, window + new - 1)

    def update(self, layer: int, k: Tensor, v: Tensor, window: int | None) -> tuple[Tensor, Tensor]:
        """Write k, v [b, new, kv_heads, head_dim] of one layer; return the keys and values its queries can reach."""
        end = self.length + k.shape[1]
        self.keys[layer, :, self.length : end] = k
        self.values[layer, :, self.length : end] = v
        start = end - self.readable(k.shape[1], window)
        return self.keys[layer, :, start:end], self.values[layer, :, start:end]
