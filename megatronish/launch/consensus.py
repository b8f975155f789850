"""What all ranks come to know without a collective: each says something, the first rank decides, all hear it.

Over the store of the rendezvous, so a background thread may do it while the main thread is in a collective.
"""

from __future__ import annotations

import contextlib
import json
import threading
import time
from collections.abc import Callable
from typing import Any

import torch.distributed as dist

from megatronish.launch.rendezvous import PATIENCE_SECONDS, Rendezvous

FIRST_PAUSE, LONGEST_PAUSE = 0.002, 0.25
LONGEST_PAUSE_OF_MANY = 1.0  # thousands of ranks must not wear the store out
MANY = 64


class ConsensusError(RuntimeError):
    """The other ranks, or the store, are gone."""


class Consensus:
    """A series of decisions by the ranks of a rendezvous, each of which every rank takes part in, in the same order.

    name: of the series; several may go on at once, in several threads.
    """

    def __init__(self, rendezvous: Rendezvous, name: str) -> None:
        self.rank, self.world_size = rendezvous.rank, rendezvous.world_size
        self._store = dist.PrefixStore(name, rendezvous.store)
        self._number = 0
        self._stop = threading.Event()

    def agree(self, mine: Any, decide: Callable[[list[Any]], Any]) -> Any:
        """What `decide`, on the first rank, makes of the values of all ranks, listed by rank; values are JSON.

        Raises ConsensusError when a rank is gone or `decide` raised, whose error the first rank raises itself.
        """
        self._number += 1
        if self.world_size == 1:
            return decide([mine])
        try:
            return self._lead(mine, decide) if self.rank == 0 else self._follow(mine)
        except dist.DistError as error:
            raise ConsensusError(f"the other ranks cannot be reached: {str(error).splitlines()[0]}") from None

    def stop(self) -> None:
        """Have a thread that waits in `agree` raise ConsensusError."""
        self._stop.set()

    def leave(self) -> None:
        """Say that this rank has heard everything; the first rank, with which the store may end, waits a little for the others."""
        with contextlib.suppress(dist.DistError):
            if self.rank:
                self._store.set(f"left {self.rank}", "")
                return
            everyone, deadline = (
                [f"left {rank}" for rank in range(1, self.world_size)],
                time.monotonic() + PATIENCE_SECONDS,
            )
            while everyone and not self._store.check(everyone) and time.monotonic() < deadline:
                time.sleep(FIRST_PAUSE)

    def _lead(self, mine: Any, decide: Callable[[list[Any]], Any]) -> Any:
        others = [self._key(rank) for rank in range(1, self.world_size)]
        self._await(others)
        values = [mine, *(json.loads(self._store.get(key)) for key in others)]
        for old in (*others, self._key("answer")):  # of the decision before: every rank has heard it by now
            self._store.delete_key(old.replace(f"{self._number} ", f"{self._number - 1} ", 1))
        try:
            answer = decide(values)
        except BaseException as error:
            self._store.set(self._key("answer"), json.dumps({"failed": f"{type(error).__name__}: {error}"}))
            raise
        self._store.set(self._key("answer"), json.dumps({"answer": answer}))
        return answer

    def _follow(self, mine: Any) -> Any:
        self._store.set(self._key(self.rank), json.dumps(mine))
        self._await([self._key("answer")])
        heard = json.loads(self._store.get(self._key("answer")))
        if "failed" in heard:
            raise ConsensusError(f"rank 0 failed: {heard['failed']}")
        return heard["answer"]

    def _key(self, what: int | str) -> str:
        return f"{self._number} {what}"

    def _await(self, keys: list[str]) -> None:
        pause, longest = FIRST_PAUSE, LONGEST_PAUSE if self.world_size < MANY else LONGEST_PAUSE_OF_MANY
        while not self._store.check(keys):
            if self._stop.wait(pause):
                raise ConsensusError("this rank ends")
            pause = min(1.5 * pause, longest)
