"""Decisions of all ranks through the store of their rendezvous, from any thread."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch.distributed as dist

from megatronish.launch.consensus import Consensus, ConsensusError
from megatronish.launch.rendezvous import RankProcess, Rendezvous


def together(world_size: int, function: Callable[[Consensus], Any]) -> list[Any]:
    """What `function` returns or raises on each of `world_size` ranks, which are threads."""
    store, processes = dist.HashStore(), tuple(RankProcess.current(rank) for rank in range(world_size))

    def on_rank(rank: int) -> Any:
        try:
            return function(Consensus(Rendezvous(store, "", rank, processes), "test"))
        except Exception as error:
            return error

    with ThreadPoolExecutor(world_size) as pool:
        return list(pool.map(on_rank, range(world_size)))


@pytest.mark.parametrize("world_size", [1, 2, 5])
def test_every_rank_receives_the_decision_of_the_first(world_size: int) -> None:
    """Many decisions in a row: the values of one are not used in the next."""

    def decide(consensus: Consensus) -> list[Any]:
        results = [
            consensus.agree(
                {"rank": consensus.rank, "n": n}, lambda all_values: [v["rank"] * 10 + v["n"] for v in all_values]
            )
            for n in range(20)
        ]
        consensus.leave()
        return results

    expected = [[rank * 10 + n for rank in range(world_size)] for n in range(20)]
    assert together(world_size, decide) == [expected] * world_size


def test_a_failed_decision_is_raised_on_every_rank() -> None:
    def refuse(values: list[Any]) -> None:
        raise ValueError(f"{values}")

    first, *others = together(3, lambda consensus: consensus.agree(consensus.rank, refuse))
    assert isinstance(first, ValueError) and str(first) == "[0, 1, 2]"
    assert [str(other) for other in others] == ["rank 0 failed: ValueError: [0, 1, 2]"] * 2


def test_stop_ends_the_wait() -> None:
    consensus = Consensus(Rendezvous(dist.HashStore(), "", 1, (RankProcess.current(0), RankProcess.current(1))), "test")
    threading.Timer(0.05, consensus.stop).start()
    with pytest.raises(ConsensusError, match="this rank is exiting"):
        consensus.agree(1, lambda values: values)
