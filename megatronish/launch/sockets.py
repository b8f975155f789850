"""Lines of JSON between rank 0 and every other rank, over sockets of their own that never block.

A socket tells at once when the process at its other end is gone, whatever killed it; a stopped or frozen one is silent.
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
GONE: Message = {"gone": True}  # what `receive` gives for a link that has ended


@dataclass
class _RankSocket:
    """One connection; `rank` is None until the other end has named itself."""

    connection: socket.socket
    rank: int | None
    incoming: bytearray = field(default_factory=bytearray)
    outgoing: bytearray = field(default_factory=bytearray)

    def push(self) -> None:
        """Send what the socket takes now."""
        if self.outgoing:
            with contextlib.suppress(OSError):  # full or gone: the next read tells which
                del self.outgoing[: self.connection.send(self.outgoing)]

    def pull(self) -> tuple[list[bytes], bool]:
        """Whole lines that have come, and whether the other end is gone."""
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
    """Rank 0's sockets to all others, or another rank's link to rank 0. Used by one thread after it is made.

    Raises LaunchError when rank 0 cannot be reached.
    """

    def __init__(self, rendezvous: Rendezvous) -> None:
        self._rank = rendezvous.rank
        self._selector = selectors.DefaultSelector()
        self._hangups = select.epoll()
        self._sockets: dict[int, _RankSocket] = {}
        self._uncalled = set(range(1, rendezvous.world_size)) if rendezvous.rank == 0 else set()
        self._listener: socket.socket | None = None
        if rendezvous.world_size == 1:
            return
        if rendezvous.rank == 0:
            self._listen(rendezvous)
        else:
            self._call(rendezvous)
        self_reference = weakref.ref(self)

        def close_in_child() -> None:
            """A forked loader process would keep the connections of a killed rank open."""
            sockets = self_reference()
            if sockets is not None:
                sockets._close_sockets()

        os.register_at_fork(after_in_child=close_in_child)

    def _listen(self, rendezvous: Rendezvous) -> None:
        alone = all(place.pid_namespace == rendezvous.processes[0].pid_namespace for place in rendezvous.processes)
        address = "127.0.0.1" if alone else own_address(rendezvous.address)
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        loops = address.startswith("127.") or address == "::1"
        self._listener = socket.create_server(
            ("" if loops and not alone else address, 0), family=family, backlog=rendezvous.world_size
        )
        self._listener.setblocking(False)
        self._selector.register(self._listener, selectors.EVENT_READ, None)
        self._token = secrets.token_hex(16)
        # An address that loops means something only here: others then take the one by which they found the store.
        told = [address if alone or not loops else "", self._listener.getsockname()[1], self._token]
        rendezvous.store.set(ADDRESS_KEY, json.dumps(told))

    def _call(self, rendezvous: Rendezvous) -> None:
        address, port, token = json.loads(rendezvous.store.get(ADDRESS_KEY))
        address = address or rendezvous.address
        try:
            connection = socket.create_connection((address, port), timeout=CONNECT_SECONDS)
        except OSError as error:
            raise LaunchError(
                f"{rendezvous.processes[rendezvous.rank]} cannot reach the watchdog of {rendezvous.processes[0]} at {address}:{port} "
                f"({error.strerror or error}): a firewall? Ranks need free TCP ports between their machines. "
                "--train.hang_timeout 0 starts without a watchdog."
            ) from None
        self._add(connection, 0)
        self.send(0, {"token": token, "rank": rendezvous.rank})

    def _add(self, connection: socket.socket, rank: int | None) -> None:
        connection.setblocking(False)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        link = _RankSocket(connection, rank)
        self._selector.register(connection, selectors.EVENT_READ, link)
        self._hangups.register(connection, select.EPOLLRDHUP)
        if rank is not None:
            self._sockets[rank] = link

    def send(self, rank: int, message: Message) -> None:
        """Hand a message to a rank; lost when the link has ended. A heartbeat is left out while an older message waits."""
        self._push([rank] if rank in self._sockets else [], message)

    def send_all(self, message: Message) -> None:
        """`send` to every linked rank."""
        self._push(list(self._sockets), message)

    def _push(self, ranks: list[int], message: Message) -> None:
        line = json.dumps(message, separators=(",", ":")).encode() + b"\n"
        for link in [self._sockets[rank] for rank in ranks]:
            if not (link.outgoing and "beat" in message):
                link.outgoing += line
                link.push()

    def flush(self, seconds: float) -> None:
        """Wait up to `seconds` until all messages are handed to the kernel."""
        deadline = time.monotonic() + seconds
        while any(link.outgoing for link in self._sockets.values()) and time.monotonic() < deadline:
            for link in self._sockets.values():
                link.push()
            time.sleep(0.01)

    def receive(self, seconds: float) -> list[tuple[int, Message]]:
        """What came from which rank; GONE for a link that ended. Waits `seconds`, or until a link ends.

        Heartbeats do not wake this thread: a thousand are read in one go.
        """
        self._hangups.poll(seconds)
        found: list[tuple[int, Message]] = []
        for key, _ in self._selector.select(0):
            if key.data is None:
                self._accept()
            else:
                found += self._read(key.data)
        for link in self._sockets.values():
            link.push()
        return found

    def welcome(self, seconds: float) -> list[tuple[int, Message]]:
        """Rank 0: wait up to `seconds` until every rank has called; what came meanwhile. A rank it does not know it cannot tell."""
        deadline, found = time.monotonic() + seconds, []
        while self._uncalled and time.monotonic() < deadline:
            found += self.receive(0.01)
        return found

    def _accept(self) -> None:
        assert self._listener is not None
        with contextlib.suppress(OSError):  # BlockingIOError when there are no more
            while True:
                self._add(self._listener.accept()[0], None)

    def _read(self, link: _RankSocket) -> list[tuple[int, Message]]:
        lines, gone = link.pull()
        messages: list[tuple[int, Message]] = []
        for line in lines:
            try:
                message = json.loads(line)
                if link.rank is None:
                    if not hmac.compare_digest(str(message["token"]), self._token):
                        raise ValueError("a stranger")
                    link.rank = int(message["rank"])
                    self._sockets[link.rank] = link
                    self._uncalled.discard(link.rank)
                messages.append((link.rank, message))
            except (ValueError, KeyError, TypeError):
                gone = True
                break
        if gone:
            self._selector.unregister(link.connection)
            self._hangups.unregister(link.connection)
            link.connection.close()
            if link.rank is not None:
                self._sockets.pop(link.rank, None)
                messages.append((link.rank, GONE))
        return messages

    def close(self) -> None:
        """End every link."""
        self._selector.close()
        self._hangups.close()
        self._close_sockets()

    def _close_sockets(self) -> None:
        for link in self._sockets.values():
            link.connection.close()
        self._sockets = {}
        if self._listener is not None:
            self._listener.close()


def own_address(towards: str) -> str:
    """The address of this machine that a host's packets come from: no packet is sent to find it."""
    try:
        family, _, _, _, target = socket.getaddrinfo(towards, 1, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.connect(target)
            return str(probe.getsockname()[0])
    except OSError:
        return "127.0.0.1"
