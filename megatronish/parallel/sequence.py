"""Attention over sequences that are sharded over ranks (Jacobs et al. 2023, DeepSpeed-Ulysses).

Outside attention a rank holds all heads of its part of the sequence, inside it all tokens for its part of the heads.

Shapes: b batch, s sequence, h heads, d head_dim, n ranks.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from megatronish.parallel.collectives import all_to_all


def heads_to_ranks(parts: tuple[Tensor, ...], group: ProcessGroup) -> list[Tensor]:
    """Tensors [b, s / n, h, d] -> [b, s, h / n, d], in one all-to-all.

    Fewer heads than ranks are repeated first, so that each rank gets the head that its part of more heads belongs to.
    Raises ValueError unless n divides h or h divides n.
    """
    n = group.size()
    by_rank = [_enough_heads(part, n).unflatten(2, (n, -1)) for part in parts]  # [b, s / n, n, heads of a rank, d]
    widths = [part.shape[3] for part in by_rank]
    sent = torch.cat(by_rank, dim=3).permute(2, 0, 1, 3, 4)
    received = all_to_all(sent, group)  # [n parts of the sequence, b, s / n, heads of this rank, d]
    return list(received.transpose(0, 1).flatten(1, 2).split(widths, dim=2))


def sequence_to_ranks(x: Tensor, group: ProcessGroup) -> Tensor:
    """[b, s, h / n, d] -> [b, s / n, h, d], the inverse."""
    sent = x.unflatten(1, (group.size(), -1)).transpose(0, 1)
    received = all_to_all(sent, group)  # [n parts of the heads, b, s / n, h / n, d]
    return received.permute(1, 2, 0, 3, 4).flatten(2, 3)


def _enough_heads(x: Tensor, n: int) -> Tensor:
    heads = x.shape[2]
    if heads % n and n % heads:
        raise ValueError(f"{heads} heads and {n} sequence-parallel ranks: neither divides the other")
    return x if heads % n == 0 else x.repeat_interleave(n // heads, dim=2)
