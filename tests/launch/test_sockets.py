"""Messages between rank 0 and the other ranks: authentication, delivery, and closed connections."""

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
    """The next messages; even a local socket takes a moment to deliver them."""
    for _ in range(500):
        if found := sockets.receive(0.01):
            return found
    raise AssertionError("nothing arrived")


@pytest.fixture
def rendezvous() -> list[Rendezvous]:
    store = dist.HashStore()
    processes = tuple(RankProcess(rank, "here", 1, "space") for rank in range(2))
    return [Rendezvous(store, "127.0.0.1", rank, processes) for rank in range(2)]


@pytest.fixture
def sockets(rendezvous: list[Rendezvous]) -> Iterator[tuple[RankSockets, RankSockets]]:
    first, second = RankSockets(rendezvous[0]), RankSockets(rendezvous[1])
    assert receive(first)[0][0] == 1, "the second has sent its rank"
    yield first, second
    first.close()
    second.close()


def test_messages_in_both_directions(sockets: tuple[RankSockets, RankSockets]) -> None:
    first, second = sockets
    long = {"failed": "x" * 20_000}
    second.send_all({"beat": [1]})
    second.send_all(long)
    received: list[tuple[int, Message]] = []
    while len(received) < 2:
        received += receive(first)
    assert received == [(1, {"beat": [1]}), (1, long)]
    first.send_all({"stop": 75})
    assert receive(second) == [(0, {"stop": 75})]


def test_a_closed_connection(sockets: tuple[RankSockets, RankSockets]) -> None:
    first, second = sockets
    second.send_all({"bye": True})
    second.close()
    received: list[tuple[int, Message]] = []
    while len(received) < 2:
        received += receive(first)
    assert received == [(1, {"bye": True}), (1, GONE)]
    first.send_all({"stop": 75})  # dropped without an error


@pytest.mark.parametrize("line", [b'{"token": "guess", "rank": 1}\n', b"GET / HTTP/1.0\n", b"[1]\n", b"x" * 70_000])
def test_a_peer_without_the_token(rendezvous: list[Rendezvous], line: bytes) -> None:
    """It is disconnected, and no message of it is delivered."""
    first = RankSockets(rendezvous[0])
    address, port, _ = json.loads(rendezvous[0].store.get(ADDRESS_KEY))
    with socket.create_connection((address, port), timeout=10) as peer:
        peer.sendall(line)
        peer.settimeout(0.01)
        for _ in range(500):
            assert first.receive(0.01) == []
            try:
                assert peer.recv(1) == b""
                break
            except TimeoutError:
                continue
            except ConnectionResetError:
                break
        else:
            raise AssertionError("the peer is still connected")
    first.close()


def test_a_rank_that_does_not_read_blocks_no_other(sockets: tuple[RankSockets, RankSockets]) -> None:
    """The socket of a stopped process fills up; heartbeats to it are then dropped, and sending returns."""
    first, _ = sockets
    beat = {"beat": "x" * 30_000}
    for _ in range(10_000):  # 300 MB, more than any kernel keeps for a socket
        first.send_all(beat)
        if first._peers[1].outgoing:
            break
    for _ in range(100):
        first.send_all(beat)
    assert 0 < len(first._peers[1].outgoing) < 40_000, "the rest of one message"
    begin = time.monotonic()
    first.flush(0.2)
    assert time.monotonic() - begin < 30, "flush gives up"


def test_rank_0_cannot_be_reached(rendezvous: list[Rendezvous]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as closed:
        port = closed.getsockname()[1]
    rendezvous[0].store.set(ADDRESS_KEY, json.dumps(["127.0.0.1", port, "token"]))
    with pytest.raises(
        LaunchError, match=rf"rank 1 .* cannot reach the watchdog of rank 0 .* at 127.0.0.1:{port} .*firewall"
    ):
        RankSockets(rendezvous[1])


def test_own_address() -> None:
    assert own_address("127.0.0.1") == "127.0.0.1"
    assert own_address("no-such-host.invalid") == "127.0.0.1"
