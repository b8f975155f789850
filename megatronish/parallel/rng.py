"""Random numbers that differ between ranks whose generators are otherwise in the same state."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from megatronish.config.parallel import ParallelConfig
from megatronish.parallel.mesh import ParallelMesh


@contextmanager
def fork_rng_per_rank(rank: int, device: torch.device) -> Iterator[None]:
    """Context in which ranks with equal generator states draw different numbers; afterwards the states are equal again.

    The seed inside is drawn from the CPU generator, so that each use differs and a recomputed block repeats its numbers.
    Costs two copies of the generator states.
    """
    seed = int(torch.randint(1 << 62, (), device="cpu")) ^ (rank + 1)
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield


def random_stream(mesh: ParallelMesh, config: ParallelConfig) -> int:
    """The number of the random stream of this rank.

    Tensor-parallel ranks hold the same activations and share a stream, unless they divide the sequence.
    """
    return mesh.random_stream * config.tensor + mesh.tp.rank if config.tensor_sequence else mesh.random_stream


def step_seed(seed: int, step: int, stream: int) -> int:
    """Seed of the random numbers (dropout) of one step in one stream: distinct for any step and stream, 63 bits."""
    mixed = (seed * 0x9E3779B97F4A7C15 + step * 0xBF58476D1CE4E5B9 + stream * 0x94D049BB133111EB) & (2**64 - 1)
    return (mixed ^ (mixed >> 31)) >> 1
