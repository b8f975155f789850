"""Lines between rank 0 and the others: who may speak, what is delivered, and how the end of a link is told."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Callable, Iterator

import pytest
import torch.distributed as dist

from megatronish.launch.process import LaunchError
from megatronish.launch.rendezvous import RankProcess, Rendezvous
from megatronish.launch.sockets import ADDRESS_KEY, GONE, Message, RankSockets, own_address

Pair = tuple[RankSockets, RankSockets, Callable[[RankSockets], list[tuple[int, Message]]]]


def receive(sockets: RankSockets) -> list[tuple[int, Message]]:
    """What comes next; sockets of one machine need a moment."""
    for _ in range(500):
        if found := sockets.receive(0.01):
            return found
    raise AssertionError("nothing came")


@pytest.fixture
def meetings() -> list[Rendezvous]:
    store = dist.HashStore()
    processes = tuple(RankProcess(rank, "here", 1, "space") for rank in range(2))
    return [Rendezvous(store, "127.0.0.1", rank, processes) for rank in range(2)]


@pytest.fixture
def sockets(meetings: list[Rendezvous]) -> Iterator[tuple[RankSockets, RankSockets]]:
    first, second = RankSockets(meetings[0]), RankSockets(meetings[1])
    assert receive(first)[0][0] == 1, "the second has named itself"
    yield first, second
    first.close()
    second.close()


def test_messages_go_both_ways_whole(sockets: tuple[RankSockets, RankSockets]) -> None:
    first, second = sockets
    long = {"failed": "x" * 20_000}
    second.send(0, {"beat": [1]})
    second.send(0, long)
    heard: list[tuple[int, Message]] = []
    while len(heard) < 2:
        heard += receive(first)
    assert heard == [(1, {"beat": [1]}), (1, long)]
    first.send_all({"stop": 75})
    assert receive(second) == [(0, {"stop": 75})]


def test_the_end_of_a_link_is_told(sockets: tuple[RankSockets, RankSockets]) -> None:
    first, second = sockets
    second.send(0, {"bye": True})
    second.close()
    heard: list[tuple[int, Message]] = []
    while len(heard) < 2:
        heard += receive(first)
    assert heard == [(1, {"bye": True}), (1, GONE)]
    first.send(1, {"stop": 75})  # into nothing, without an error


@pytest.mark.parametrize("line", [b'{"token": "guess", "rank": 1}\n', b"GET / HTTP/1.0\n", b"[1]\n", b"x" * 70_000])
def test_a_stranger_is_not_heard(meetings: list[Rendezvous], line: bytes) -> None:
    """It is disconnected, and no rank is taken for it."""
    first = RankSockets(meetings[0])
    address, port, _ = json.loads(meetings[0].store.get(ADDRESS_KEY))
    with socket.create_connection((address, port), timeout=10) as stranger:
        stranger.sendall(line)
        stranger.settimeout(0.01)
        for _ in range(500):
            assert first.receive(0.01) == []
            try:
                assert stranger.recv(1) == b""
                break
            except TimeoutError:
                continue
            except ConnectionResetError:
                break
        else:
            raise AssertionError("the stranger is still connected")
    first.close()


def test_a_rank_that_takes_nothing_blocks_nobody(sockets: tuple[RankSockets, RankSockets]) -> None:
    """A stopped process: its socket fills up; heartbeats to it are then left out, and sending returns."""
    first, _ = sockets
    beat = {"beat": "x" * 30_000}
    for _ in range(10_000):  # 300 MB, more than any kernel keeps for a socket
        first.send_all(beat)
        if first._sockets[1].outgoing:
            break
    for _ in range(100):
        first.send_all(beat)
    assert 0 < len(first._sockets[1].outgoing) < 40_000, "what one message left over"
    begin = time.monotonic()
    first.flush(0.2)
    assert time.monotonic() - begin < 30, "given up"


def test_rank_0_cannot_be_reached(meetings: list[Rendezvous]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as closed:
        port = closed.getsockname()[1]
    meetings[0].store.set(ADDRESS_KEY, json.dumps(["127.0.0.1", port, "token"]))
    with pytest.raises(
        LaunchError, match=rf"rank 1 .* cannot reach the watchdog of rank 0 .* at 127.0.0.1:{port} .*firewall"
    ):
        RankSockets(meetings[1])


def test_own_address() -> None:
    assert own_address("127.0.0.1") == "127.0.0.1"
    assert own_address("no-such-host.invalid") == "127.0.0.1"
