"""Messages about ranks that fail, hang or are slow, by the status of the ranks."""

from __future__ import annotations

import pytest

from megatronish.launch import failure_messages
from megatronish.launch.rank_status import RankStatus
from megatronish.launch.rendezvous import RankProcess

PROCESSES = [RankProcess(rank, f"node{rank // 2}", 100 + rank, "space") for rank in range(4)]


def at(collective: str = "", location: str = "engine.py:9 (train_step)", step: int = 7, **more: int) -> RankStatus:
    return RankStatus(step, "training", collective, location, 60.0, **more)


WAITING = at("all_reduce")
NO_PROGRESS = [
    (
        {0: WAITING, 1: at(location="loader.py:3 (next)"), 2: WAITING, 3: WAITING},
        "rank 1 (node0, pid 101) has not reached all_reduce at step 7, where ranks 0, 2-3 wait; no progress for 60 s",
    ),
    (
        {0: at(), 1: WAITING, 2: at(), 3: WAITING},
        "ranks 0, 2 (first: rank 0 (node0, pid 100)) have not reached all_reduce at step 7, where ranks 1, 3 wait",
    ),
    (
        {0: WAITING, 1: at("broadcast"), 2: WAITING},
        "ranks wait in different collectives, with no progress for 60 s",
    ),
    ({0: WAITING, 1: at("all_reduce", step=8)}, "all ranks have waited in the same collective for 60 s"),
    ({0: at(), 1: at()}, "no rank has made progress for 60 s"),
    (
        {2: at()},
        "rank 2 (node1, pid 102) has made no progress for 60 s (last seen engine.py:9 (train_step), step 7, training)",
    ),
]


@pytest.mark.parametrize(("rank_statuses", "head"), NO_PROGRESS)
def test_no_progress(rank_statuses: dict[int, RankStatus], head: str) -> None:
    first, *where, cause = failure_messages.no_progress(PROCESSES, 60.0, rank_statuses).splitlines()
    assert first.startswith(head)
    assert cause.startswith("Likely cause: ")
    assert len(where) == len({(s.step, s.collective, s.location) for s in rank_statuses.values()}), (
        "ranks with equal statuses share a line"
    )


def test_several_ranks_without_heartbeat() -> None:
    text = failure_messages.no_heartbeat(PROCESSES[1:3], 300.0, {0: WAITING, 1: at(), 3: WAITING})
    head, where, _ = text.splitlines()
    assert head.startswith(
        "ranks 1-2 (first: rank 1 (node0, pid 101)) have sent no heartbeat for 300 s (last seen engine.py:9"
    )
    assert where == "  ranks 0, 3: step 7, training, in all_reduce, engine.py:9 (train_step)"


def test_a_rank_that_never_sent_a_heartbeat() -> None:
    assert failure_messages.process_ended(PROCESSES[3], {}).startswith(
        "rank 3 (node1, pid 103) ended without an error message\n"
    )


def test_the_number_of_locations_is_limited() -> None:
    text = failure_messages.process_ended(
        PROCESSES[0], {rank: at(location=f"x.py:{rank} (f)") for rank in range(1, 1000)}
    )
    assert text.count("\n") == failure_messages.MAX_GROUPS + 2 and "  and 991 more locations" in text


def test_a_slow_rank_spends_the_least_time_in_collectives() -> None:
    """Shares of the samples between two moments, not since the start."""
    before = {rank: at(waits=90, samples=100) for rank in range(4)}
    now = {rank: at(waits=90 + (0 if rank == 2 else 35), samples=200) for rank in range(4)}
    (note,) = failure_messages.slow_ranks(PROCESSES, before, now, min_samples=100).values()
    assert note.startswith(
        "rank 2 (node1, pid 102) is slow: it waits in collectives for 0% of the time, the others for 35%."
    )
    assert failure_messages.slow_ranks(PROCESSES, before, now, min_samples=101) == {}, "too few samples"
    even = {rank: at(waits=90 + 35 + rank, samples=200) for rank in range(4)}
    assert failure_messages.slow_ranks(PROCESSES, before, even, min_samples=100) == {}
    assert failure_messages.slow_ranks(PROCESSES, {}, {0: at(waits=0, samples=500)}, min_samples=100) == {}, "alone"
