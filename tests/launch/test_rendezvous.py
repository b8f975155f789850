"""Ranks join the rendezvous, or each fails within bounded time with a message that names who is missing or differs."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import pytest

from megatronish import errors
from megatronish.errors import exit_on_user_error
from megatronish.launch.process import LaunchError, free_port
from megatronish.launch.rendezvous import join_rendezvous, join_rendezvous_from_env, ranks_text
from tests.launch.faulty_ranks import start_ranks

SECONDS = 1.5  # that the others are waited for, where one never comes


def meet_all(world_size: int, told: dict[int, dict[str, str]], ranks: list[int], seconds: float) -> dict[int, str]:
    """Each of `ranks` meets in a thread; what each got: "met" or the error's text."""
    port, results, joined = free_port(), {}, []

    def one(rank: int, place: int) -> None:
        try:
            rendezvous = join_rendezvous(rank, world_size, "127.0.0.1", port, seconds, told.get(rank))
            joined.append(rendezvous)  # rank 0's holds the store for the others
            results[place] = f"met {rendezvous.world_size}"
        except LaunchError as error:
            results[place] = str(error)

    threads = [threading.Thread(target=one, args=(rank, place)) for place, rank in enumerate(ranks)]
    for thread in threads:
        thread.start()
        time.sleep(0.1)  # of two that claim the same number, which comes second is known
    for thread in threads:
        thread.join(60)
    return results


def test_all_come() -> None:
    same = {rank: {"configuration": "abc"} for rank in range(3)}
    assert meet_all(3, same, [2, 0, 1], 60) == {place: "met 3" for place in range(3)}


def test_one_alone_needs_no_port() -> None:
    assert join_rendezvous(0, 1, "no such host", 1, 1.0).world_size == 1


def test_ranks_that_do_not_come() -> None:
    """Fewer ranks than announced: those who came are told by rank 0."""
    results = meet_all(3, {}, [0, 1], SECONDS)
    for message in results.values():
        assert "of 3 ranks only 2 came to 127.0.0.1:" in message
        assert "within 1.5 s: rank 2 is missing. ranks 0-1 came from" in message
        assert "--train.start_timeout" in message


def test_rank_0_does_not_come() -> None:
    (message,) = meet_all(2, {}, [1], 1.0).values()
    assert message.startswith("rank 1 (") and "finds no rank 0 at 127.0.0.1:" in message
    assert "Connection refused" in message and "MASTER_ADDR is not the address of its machine" in message


def test_an_address_that_is_none() -> None:
    with pytest.raises(LaunchError, match=r"finds no rank 0 at no-such-host.invalid:29 within 0.5 s \(.+\)"):
        join_rendezvous(1, 2, "no-such-host.invalid", 29, 0.5)


def test_a_rank_that_comes_twice() -> None:
    """Two nodes with the same node number."""
    results = meet_all(3, {}, [0, 1, 1], SECONDS)
    assert "and a rank 1 had come before: two nodes were started with the same node number" in results[2]
    assert "rank 2 is missing" in results[0]


def test_ranks_that_were_told_otherwise() -> None:
    """Nobody waits for the timeout then."""
    for told, words in [
        ({0: {"configuration": "abc"}, 1: {"configuration": "abd"}}, "was told another configuration than rank 0"),
        ({0: {"torch_version": "2.12"}, 1: {}}, "was told another torch version than rank 0"),
    ]:
        results = meet_all(3, told, [0, 1], 600)
        assert len(results) == 2 and all(text.startswith("rank 1 (") and words in text for text in results.values())


def test_two_sizes_of_the_world() -> None:
    port = free_port()
    results: list[str] = []

    def one(rank: int, size: int) -> None:
        with pytest.raises(LaunchError) as refused:
            join_rendezvous(rank, size, "127.0.0.1", port, 600)
        results.append(str(refused.value))

    threads = [threading.Thread(target=one, args=pair) for pair in ((0, 2), (1, 4))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert len(results) == 2 and all("was told another world size than rank 0 " in text for text in results)
    assert all(": 4, not 2." in text for text in results)


def test_a_taken_port() -> None:
    """Another run's rank 0 listens there: this one's does not join it."""
    port = free_port()

    def wait_in_vain() -> None:
        with pytest.raises(LaunchError, match="rank 1 is missing"):
            join_rendezvous(0, 2, "127.0.0.1", port, 1.5)

    first = threading.Thread(target=wait_in_vain)
    first.start()
    time.sleep(0.5)
    with pytest.raises(
        LaunchError, match=r"cannot join the rendezvous at 127.0.0.1:\d+: .*EADDRINUSE(.|\n)*--master_port"
    ):
        join_rendezvous(0, 2, "127.0.0.1", port, 1.5)
    first.join(60)


def meet_and_leave(rank: int) -> None:
    with exit_on_user_error(rank == 0, f"rank {rank}"):
        join_rendezvous_from_env(SECONDS)


@pytest.mark.distributed
def test_one_message_for_all_ranks(tmp_path: Path) -> None:
    """In real processes, as launched: rank 0 says who is missing, status 2 everywhere; the other's voice comes later."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(errors, "OTHER_RANK_DELAY_SECONDS", 1.0)
        ranks = start_ranks(3, tmp_path, meet_and_leave, ranks=[0, 2])
        try:
            assert ranks.wait() == {0: 2, 2: 2}
        finally:
            ranks.kill()
    assert ranks.said(0).startswith("error: of 3 ranks only 2 came") and ranks.said(0).count("error") == 1
    assert ranks.said(2).startswith("error: rank 2: of 3 ranks only 2 came"), "no launcher ended it before"


def test_numbers_of_ranks() -> None:
    assert ranks_text({3}) == "rank 3"
    assert ranks_text([7, 0, 2, 3, 4]) == "ranks 0, 2-4, 7"
