"""Attention of a few new tokens over a key/value cache, by the CPU kernel of csrc/cpu/cached_attention.cpp.

Rows have individual lengths, and a row's result does not depend on the others: a batch is bitwise equal to its rows computed
one by one.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from megatronish.ops.extension import EXTENSION

# Largest number of new tokens per row. Reading the cache dominates up to here; beyond it, matrix products do.
MAX_NEW = 16
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def fused_takes(q: Tensor, keys: Tensor) -> bool:
    """Whether the kernel computes attention of q [b, new, h, d] over a cache like `keys`."""
    return (
        EXTENSION.cpu
        and q.shape[1] <= MAX_NEW
        and q.device.type == "cpu"
        and q.dtype == keys.dtype
        and q.dtype in _DTYPES
        and q.shape[3] % 16 == 0
    )


def cached_attention_(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    keys: Tensor,
    values: Tensor,
    rows: Tensor,
    positions: Tensor,
    window: int | None = None,
) -> Tensor:
    """Write k, v [b, new, kv_heads, d] into the cache `keys`, `values` [rows, capacity, kv_heads, d], then attention of q
    [b, new, h, d] over it; returns [b, new, h, d].

    rows: int32 [b], the cache row of each batch row. positions: int32 [b, new], consecutive; position p is stored
    at p % capacity. A query reads its own position and earlier ones, with a window the last `window` of them. Raises
    RuntimeError for arguments that do not match.
    """
    scale = 1.0 / math.sqrt(q.shape[3])
    out: Tensor = torch.ops.megatronish.cached_attention_(q, k, v, keys, values, rows, positions, window or 0, scale)
    return out


def _register_fakes() -> None:
    """Shapes and dtypes of the results, for torch.compile and the meta device."""

    def cached_attention_fake(q: Tensor, *_: object) -> Tensor:
        return q.new_empty(q.shape)

    torch.library.register_fake("megatronish::cached_attention_", cached_attention_fake)


if EXTENSION.cpu:
    _register_fakes()
