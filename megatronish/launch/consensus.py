"""Coordination of all ranks through a key-value store, without collectives: every rank gives a value, the first rank decides.

It uses the store of the rendezvous, so a background thread can coordinate while the main thread is in a collective.
"""

from __future__ import annotations

import contextlib
import json
import threading
import time
from collections.abc import Callable
from typing import Any

import torch.distributed as dist

from megatronish.launch.rendezvous import REPLY_SECONDS, Rendezvous

FIRST_PAUSE, LONGEST_PAUSE = 0.002, 0.25
LONGEST_PAUSE_OF_MANY = 1.0  # limits the load of thousands of ranks on the store
MANY = 64


class ConsensusError(RuntimeError):
    """The other ranks, or the store, cannot be reached any more."""


class Consensus:
    """A series of decisions. Every rank of the rendezvous takes part in each of them, in the same order.

    name: of the series. Several series can run at the same time, in several threads.
    """

    def __init__(self, rendezvous: Rendezvous, name: str) -> None:
        self.rank, self.world_size = rendezvous.rank, rendezvous.world_size
        self._store = dist.PrefixStore(name, rendezvous.store)
        self._number = 0
        self._stop = threading.Event()

    def agree(self, value: Any, decide: Callable[[list[Any]], Any]) -> Any:
        """The result of `decide`, which the first rank calls with the values of all ranks, by rank. Values are JSON.

        Raises ConsensusError if a rank is gone, and if `decide` raised; the first rank raises the original error.
        """
        self._number += 1
        if self.world_size == 1:
            return decide([value])
        try:
            return self._lead(value, decide) if self.rank == 0 else self._follow(value)
        except dist.DistError as error:
            raise ConsensusError(f"the other ranks cannot be reached: {str(error).splitlines()[0]}") from None

    def stop(self) -> None:
        """Make a thread that waits in `agree` raise ConsensusError."""
        self._stop.set()

    def leave(self) -> None:
        """Report that this rank has read every result. The first rank, which may hold the store, waits shortly for the others."""
        with contextlib.suppress(dist.DistError):
            if self.rank:
                self._store.set(f"left {self.rank}", "")
                return
            others = [f"left {rank}" for rank in range(1, self.world_size)]
            deadline = time.monotonic() + REPLY_SECONDS
            while others and not self._store.check(others) and time.monotonic() < deadline:
                time.sleep(FIRST_PAUSE)

    def _lead(self, value: Any, decide: Callable[[list[Any]], Any]) -> Any:
        others = [self._key(rank) for rank in range(1, self.world_size)]
        self._wait_for(others)
        values = [value, *(json.loads(self._store.get(key)) for key in others)]
        for key in (*others, self._key("result")):  # every rank has read the previous result by now
            self._store.delete_key(key.replace(f"{self._number} ", f"{self._number - 1} ", 1))
        try:
            result = decide(values)
        except BaseException as error:
            self._store.set(self._key("result"), json.dumps({"error": f"{type(error).__name__}: {error}"}))
            raise
        self._store.set(self._key("result"), json.dumps({"result": result}))
        return result

    def _follow(self, value: Any) -> Any:
        self._store.set(self._key(self.rank), json.dumps(value))
        self._wait_for([self._key("result")])
        reply = json.loads(self._store.get(self._key("result")))
        if "error" in reply:
            raise ConsensusError(f"rank 0 failed: {reply['error']}")
        return reply["result"]

    def _key(self, name: int | str) -> str:
        return f"{self._number} {name}"

    def _wait_for(self, keys: list[str]) -> None:
        pause, longest = FIRST_PAUSE, LONGEST_PAUSE if self.world_size < MANY else LONGEST_PAUSE_OF_MANY
        while not self._store.check(keys):
            if self._stop.wait(pause):
                raise ConsensusError("this rank is exiting")
            pause = min(1.5 * pause, longest)
