"""Which keys a query may read, as a boolean mask."""

from __future__ import annotations

import torch
from torch import Tensor


def document_ids(cu_seqlens: Tensor, num_tokens: int) -> Tensor:
    """Number of the document that each of `num_tokens` flattened tokens belongs to.

    cu_seqlens: int [documents + 1], cumulative lengths from 0; repeated values (empty documents) are allowed.
    """
    tokens = torch.arange(num_tokens, device=cu_seqlens.device, dtype=cu_seqlens.dtype)
    return torch.bucketize(tokens, cu_seqlens[1:], right=True)


def attention_mask(
    batch: int,
    queries: int,
    keys: int,
    *,
    window: int | None = None,
    cu_seqlens: Tensor | None = None,
    device: torch.device,
) -> Tensor:
    """Causal mask, True where query i may read key j: [queries, keys], or [batch, 1, queries, keys] with documents.

    The last query is aligned with the last key (queries <= keys), so that a query of a cached sequence reads all
    earlier keys. window: a query reads itself and window - 1 earlier keys. cu_seqlens: documents of the flattened
    [batch * queries] tokens; tokens of one row read only their own document.
    """
    position = torch.arange(keys - queries, keys, device=device)[:, None]
    key = torch.arange(keys, device=device)
    mask = key <= position
    if window is not None:
        mask &= key > position - window
    if cu_seqlens is None:
        return mask
    if queries != keys:
        raise ValueError(
            f"cu_seqlens needs as many keys as queries, got {queries} queries and {keys} keys: packed documents "
            "cannot follow a key/value cache"
        )
    ids = document_ids(cu_seqlens.to(device), batch * queries).view(batch, 1, queries)
    return mask & (ids[..., :, None] == ids[..., None, :])
