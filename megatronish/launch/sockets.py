"""Non-blocking sockets between rank 0 and every other rank, which carry messages as lines of JSON.

A socket is closed as soon as the process at its other end is gone, whatever killed it; from a stopped or frozen process
nothing arrives.
"""

from __future__ import annotations

import contextlib
import hmac
import json
import os
import secrets
import select
import selectors
import socket
import time
import weakref
from dataclasses import dataclass, field
from typing import Any

from megatronish.launch.process import LaunchError
from megatronish.launch.rendezvous import Rendezvous

Message = dict[str, Any]
ADDRESS_KEY = "watchdog address"
LONGEST_LINE = 1 << 16
CONNECT_SECONDS = 30.0
GONE: Message = {"gone": True}  # what `receive` returns for a connection that was closed


@dataclass
class _Peer:
    """One connection. rank: None until the peer has sent its rank."""

    connection: socket.socket
    rank: int | None
    incoming: bytearray = field(default_factory=bytearray)
    outgoing: bytearray = field(default_factory=bytearray)

    def push(self) -> None:
        """Send as much as the socket accepts now."""
        if self.outgoing:
            with contextlib.suppress(OSError):  # full, or closed, which the next read finds
                del self.outgoing[: self.connection.send(self.outgoing)]

    def pull(self) -> tuple[list[bytes], bool]:
        """The complete lines that arrived, and whether the peer is gone."""
        gone = False
        try:
            data = self.connection.recv(LONGEST_LINE)
            self.incoming += data
            gone = not data
        except BlockingIOError:
            pass
        except OSError:
            gone = True
        *lines, rest = bytes(self.incoming).split(b"\n")
        self.incoming = bytearray(rest)
        return lines, gone or len(rest) >= LONGEST_LINE


class RankSockets:
    """Rank 0's connections to all other ranks, or another rank's connection to rank 0. Used by one thread after construction.

    Raises LaunchError when rank 0 cannot be reached.
    """

    def __init__(self, rendezvous: Rendezvous) -> None:
        self._selector = selectors.DefaultSelector()
        self._hangups = select.epoll()
        self._peers: dict[int, _Peer] = {}
        self._unconnected = set(range(1, rendezvous.world_size)) if rendezvous.rank == 0 else set()
        self._listener: socket.socket | None = None
        if rendezvous.world_size == 1:
            return
        if rendezvous.rank == 0:
            self._listen(rendezvous)
        else:
            self._connect(rendezvous)
        self_reference = weakref.ref(self)

        def close_in_child() -> None:
            """Otherwise a forked data loader process would keep the connections of a killed rank open."""
            if (sockets := self_reference()) is not None:
                sockets._close_sockets()

        os.register_at_fork(after_in_child=close_in_child)

    def _listen(self, rendezvous: Rendezvous) -> None:
        is_local = len({process.pid_namespace for process in rendezvous.processes}) == 1
        address = "127.0.0.1" if is_local else own_address(rendezvous.address)
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        is_loopback = address.startswith("127.") or address == "::1"
        self._listener = socket.create_server(
            ("" if is_loopback and not is_local else address, 0), family=family, backlog=rendezvous.world_size
        )
        self._listener.setblocking(False)
        self._selector.register(self._listener, selectors.EVENT_READ, None)
        self._token = secrets.token_hex(16)
        # A loopback address is of no use to other machines, which then use the address of the store.
        entry = [address if is_local or not is_loopback else "", self._listener.getsockname()[1], self._token]
        rendezvous.store.set(ADDRESS_KEY, json.dumps(entry))

    def _connect(self, rendezvous: Rendezvous) -> None:
        address, port, token = json.loads(rendezvous.store.get(ADDRESS_KEY))
        address = address or rendezvous.address
        try:
            connection = socket.create_connection((address, port), timeout=CONNECT_SECONDS)
        except OSError as error:
            raise LaunchError(
                f"{rendezvous.processes[rendezvous.rank]} cannot reach the watchdog of {rendezvous.processes[0]} at {address}:{port} "
                f"({error.strerror or error}). Check for a firewall: ranks need TCP connections between their machines. "
                "--train.hang_timeout 0 starts without a watchdog."
            ) from None
        self._add(connection, 0)
        self.send_all({"token": token, "rank": rendezvous.rank})

    def _add(self, connection: socket.socket, rank: int | None) -> None:
        connection.setblocking(False)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        peer = _Peer(connection, rank)
        self._selector.register(connection, selectors.EVENT_READ, peer)
        self._hangups.register(connection, select.EPOLLRDHUP)
        if rank is not None:
            self._peers[rank] = peer

    def send_all(self, message: Message) -> None:
        """Send a message to every connected rank. A heartbeat is dropped while an earlier message is still queued."""
        line = json.dumps(message, separators=(",", ":")).encode() + b"\n"
        for peer in self._peers.values():
            if not (peer.outgoing and "beat" in message):
                peer.outgoing += line
                peer.push()

    def flush(self, seconds: float) -> None:
        """Wait up to `seconds` until the kernel has accepted all messages."""
        deadline = time.monotonic() + seconds
        while any(peer.outgoing for peer in self._peers.values()) and time.monotonic() < deadline:
            for peer in self._peers.values():
                peer.push()
            time.sleep(0.01)

    def receive(self, seconds: float) -> list[tuple[int, Message]]:
        """Messages with the rank that sent them; GONE for a closed connection. Waits `seconds`, or until one is closed.

        Heartbeats do not wake this thread, so that those of a thousand ranks are read at once.
        """
        self._hangups.poll(seconds)
        found: list[tuple[int, Message]] = []
        for key, _ in self._selector.select(0):
            if key.data is None:
                self._accept()
            else:
                found += self._read(key.data)
        for peer in self._peers.values():
            peer.push()
        return found

    def accept_all(self, seconds: float) -> list[tuple[int, Message]]:
        """Rank 0: wait up to `seconds` until every rank has connected, so that all can be sent messages; those that arrived."""
        deadline, found = time.monotonic() + seconds, []
        while self._unconnected and time.monotonic() < deadline:
            found += self.receive(0.01)
        return found

    def _accept(self) -> None:
        assert self._listener is not None
        with contextlib.suppress(OSError):  # BlockingIOError when there are no more
            while True:
                self._add(self._listener.accept()[0], None)

    def _read(self, peer: _Peer) -> list[tuple[int, Message]]:
        lines, gone = peer.pull()
        messages: list[tuple[int, Message]] = []
        for line in lines:
            try:
                message = json.loads(line)
                if peer.rank is None:
                    if not hmac.compare_digest(str(message["token"]), self._token):
                        raise ValueError("wrong token")
                    peer.rank = int(message["rank"])
                    self._peers[peer.rank] = peer
                    self._unconnected.discard(peer.rank)
                messages.append((peer.rank, message))
            except (ValueError, KeyError, TypeError):
                gone = True
                break
        if gone:
            self._selector.unregister(peer.connection)
            self._hangups.unregister(peer.connection)
            peer.connection.close()
            if peer.rank is not None:
                self._peers.pop(peer.rank, None)
                messages.append((peer.rank, GONE))
        return messages

    def close(self) -> None:
        """Close all connections."""
        self._selector.close()
        self._hangups.close()
        self._close_sockets()

    def _close_sockets(self) -> None:
        for peer in self._peers.values():
            peer.connection.close()
        self._peers = {}
        if self._listener is not None:
            self._listener.close()


def own_address(towards: str) -> str:
    """The address of this machine on the route to a host. No packet is sent."""
    try:
        family, _, _, _, target = socket.getaddrinfo(towards, 1, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.connect(target)
            return str(probe.getsockname()[0])
    except OSError:
        return "127.0.0.1"
