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

SECONDS = 1.5  # start timeout where one rank is missing


def join_all(world_size: int, settings: dict[int, dict[str, str]], ranks: list[int], seconds: float) -> dict[int, str]:
    """Each of `ranks` joins in a thread; the results in the order of `ranks`: "joined N" or the text of the error."""
    port, results, joined = free_port(), {}, []

    def join(rank: int, index: int) -> None:
        try:
            rendezvous = join_rendezvous(rank, world_size, "127.0.0.1", port, seconds, settings.get(rank))
            joined.append(rendezvous)  # rank 0's holds the store for the others
            results[index] = f"joined {rendezvous.world_size}"
        except LaunchError as error:
            results[index] = str(error)

    threads = [threading.Thread(target=join, args=(rank, index)) for index, rank in enumerate(ranks)]
    for thread in threads:
        thread.start()
        time.sleep(0.1)  # so that it is known which of two equal ranks joins second
    for thread in threads:
        thread.join(60)
    return results


def test_all_ranks_join() -> None:
    same = {rank: {"configuration": "abc"} for rank in range(3)}
    assert join_all(3, same, [2, 0, 1], 60) == {index: "joined 3" for index in range(3)}


def test_a_single_rank_needs_no_port() -> None:
    assert join_rendezvous(0, 1, "no such host", 1, 1.0).world_size == 1


def test_missing_ranks() -> None:
    """Rank 0 reports them to those that joined."""
    results = join_all(3, {}, [0, 1], SECONDS)
    for message in results.values():
        assert "only 2 of 3 ranks joined at 127.0.0.1:" in message
        assert "within 1.5 s: rank 2 is missing. ranks 0-1 joined from" in message
        assert "--train.start_timeout" in message


def test_rank_0_is_missing() -> None:
    (message,) = join_all(2, {}, [1], 1.0).values()
    assert message.startswith("rank 1 (") and "found no rank 0 at 127.0.0.1:" in message
    assert "Connection refused" in message and "MASTER_ADDR is not the address of its machine" in message


def test_an_invalid_address() -> None:
    with pytest.raises(LaunchError, match=r"found no rank 0 at no-such-host.invalid:29 within 0.5 s \(.+\)"):
        join_rendezvous(1, 2, "no-such-host.invalid", 29, 0.5)


def test_a_rank_that_joins_twice() -> None:
    """Two nodes with the same node number."""
    results = join_all(3, {}, [0, 1, 1], SECONDS)
    assert "but another rank 1 had joined before: two nodes were started with the same node number" in results[2]
    assert "rank 2 is missing" in results[0]


def test_different_settings() -> None:
    """The error is raised at once, not after the timeout."""
    for settings, text in [
        ({0: {"configuration": "abc"}, 1: {"configuration": "abd"}}, "has another configuration than rank 0"),
        ({0: {"torch_version": "2.12"}, 1: {}}, "has another torch version than rank 0"),
    ]:
        results = join_all(3, settings, [0, 1], 600)
        assert len(results) == 2 and all(found.startswith("rank 1 (") and text in found for found in results.values())


def test_different_world_sizes() -> None:
    port = free_port()
    results: list[str] = []

    def join(rank: int, size: int) -> None:
        with pytest.raises(LaunchError) as refused:
            join_rendezvous(rank, size, "127.0.0.1", port, 600)
        results.append(str(refused.value))

    threads = [threading.Thread(target=join, args=pair) for pair in ((0, 2), (1, 4))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert len(results) == 2 and all("has another world size than rank 0 " in text for text in results)
    assert all(": 4, not 2." in text for text in results)


def test_a_port_in_use() -> None:
    """Rank 0 of another run listens there, and this one does not join it."""
    port = free_port()

    def wait_for_rank_1() -> None:
        with pytest.raises(LaunchError, match="rank 1 is missing"):
            join_rendezvous(0, 2, "127.0.0.1", port, 1.5)

    first = threading.Thread(target=wait_for_rank_1)
    first.start()
    time.sleep(0.5)
    with pytest.raises(
        LaunchError, match=r"cannot join the rendezvous at 127.0.0.1:\d+: .*EADDRINUSE(.|\n)*--master_port"
    ):
        join_rendezvous(0, 2, "127.0.0.1", port, 1.5)
    first.join(60)


def join(rank: int) -> None:
    with exit_on_user_error(rank == 0, f"rank {rank}"):
        join_rendezvous_from_env(SECONDS)


@pytest.mark.distributed
def test_one_message_for_all_ranks(tmp_path: Path) -> None:
    """In real processes: rank 0 prints which rank is missing, the other rank prints it later, and both exit with status 2."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(errors, "OTHER_RANK_DELAY_SECONDS", 1.0)
        ranks = start_ranks(3, tmp_path, join, ranks=[0, 2])
        try:
            assert ranks.wait() == {0: 2, 2: 2}
        finally:
            ranks.kill()
    assert ranks.output(0).startswith("error: only 2 of 3 ranks joined") and ranks.output(0).count("error") == 1
    assert ranks.output(2).startswith("error: rank 2: only 2 of 3 ranks joined"), "no launcher ended it"


def test_ranks_text() -> None:
    assert ranks_text({3}) == "rank 3"
    assert ranks_text([7, 0, 2, 3, 4]) == "ranks 0, 2-4, 7"
