"""Random numbers of ranks that must draw alike in one place and differently in another."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def fork_rng_per_rank(rank: int, device: torch.device) -> Iterator[None]:
    """Inside it ranks whose generators agree draw different numbers; after it they agree again.

    The inner seed comes from the generator of the CPU, so each use draws anew, and a recomputed block draws what it drew
    the first time. Costs two copies of the generators' states.
    """
    seed = int(torch.randint(1 << 62, (), device="cpu")) ^ (rank + 1)
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield
