"""The rendezvous of the ranks of a run: checks that each joins exactly once and with the same configuration.

Rank 0 (or torchrun's agent) holds a key-value store at MASTER_ADDR:MASTER_PORT. Every rank writes there where it runs and
what it was told; rank 0 compares, and writes what came of it. Process groups are made over the same store.
"""

from __future__ import annotations

import contextlib
import datetime
import json
import os
import socket
import time
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass

import torch.distributed as dist

from megatronish.launch.process import LaunchError

POLL_SECONDS = 0.05
PATIENCE_SECONDS = 5.0  # of another rank, beyond rank 0's own limit, for rank 0 to say what is wrong
OUTCOME = "outcome"


@dataclass(frozen=True)
class RankProcess:
    """Where a rank runs. pid_namespace: names the pid namespace, so that ranks know which of them can signal each other."""

    rank: int
    host: str
    pid: int
    pid_namespace: str

    @classmethod
    def here(cls, rank: int) -> RankProcess:
        """Of this process."""
        host = socket.gethostname()
        namespace = ""
        with contextlib.suppress(OSError):
            namespace = os.readlink("/proc/self/ns/pid")
        return cls(rank, host, os.getpid(), f"{host} {namespace}")

    def __str__(self) -> str:
        return f"rank {self.rank} ({self.host}, pid {self.pid})"


@dataclass(frozen=True)
class Rendezvous:
    """The ranks that have met. store: shared by them; address: of the host that holds it, as this rank names it."""

    store: dist.Store
    address: str
    rank: int
    processes: tuple[RankProcess, ...]

    @property
    def world_size(self) -> int:
        return len(self.processes)


def join_rendezvous(
    rank: int, world_size: int, address: str, port: int, seconds: float, told: Mapping[str, str] | None = None
) -> Rendezvous:
    """Wait up to `seconds` for every rank.

    told: what all ranks must have been told alike, name -> value. Raises LaunchError, with the same text on every rank that
    can be told, when a rank does not come, comes twice, or was told something else.
    """
    here = RankProcess.here(rank)
    if world_size == 1:
        return Rendezvous(dist.HashStore(), address, 0, (here,))
    store = _open_store(here, world_size, address, port, seconds)
    deadline = time.monotonic() + seconds  # counted from when rank 0 is there: it may be the last
    times = store.add(f"count {rank}", 1)
    if times > 1:
        raise LaunchError(
            f"{here} came to {address}:{port}, and a rank {rank} had come before: two nodes were started with the same node "
            "number, or another run uses this port. Give every node its own number (torchrun --node-rank)."
        )
    said = {"world_size": str(world_size), **(told or {})}
    store.set(f"rank {rank}", json.dumps({"place": asdict(here), "told": said}))
    if rank == 0:
        outcome = _gather(store, world_size, f"{address}:{port}", seconds, deadline)
        store.set(OUTCOME, json.dumps(outcome))
        if "error" in outcome:
            _wait_for_listeners(store, outcome["listeners"])
    else:
        outcome = _await_outcome(store, here, f"{address}:{port}", deadline + PATIENCE_SECONDS)
        if "error" in outcome:
            with contextlib.suppress(dist.DistError):  # rank 0 has not waited
                store.add("told", 1)
    if "error" in outcome:
        raise LaunchError(outcome["error"])
    return Rendezvous(store, address, rank, tuple(RankProcess(**place) for place in outcome["processes"]))


def join_rendezvous_from_env(seconds: float, told: Mapping[str, str] | None = None) -> Rendezvous:
    """`join_rendezvous` as RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT say (startup.initialize_process sets them)."""
    env = os.environ
    rank, world_size, port = (int(env[name]) for name in ("RANK", "WORLD_SIZE", "MASTER_PORT"))
    return join_rendezvous(rank, world_size, env["MASTER_ADDR"], port, seconds, told)


def _open_store(here: RankProcess, world_size: int, address: str, port: int, seconds: float) -> dist.Store:
    """The store at address:port; rank 0 holds it, unless torchrun's agent does."""
    agent = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    holds = here.rank == 0 and not agent
    if not holds:
        _await_listener(here, address, port, seconds)
    try:
        store = dist.TCPStore(
            address, port, world_size, holds, timeout=datetime.timedelta(seconds=seconds), wait_for_workers=False
        )
    except dist.DistError as error:
        raise LaunchError(
            f"{here} of {world_size} cannot join the rendezvous at {address}:{port}: {str(error).splitlines()[0]}\nIs another "
            "run using that port? Choose one: deepspeed --master_port 29501 (torchrun --master-port, or MASTER_PORT)."
        ) from None
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")  # an agent's store outlives its ranks
    return dist.PrefixStore(f"megatronish {attempt}", store)


def _await_listener(here: RankProcess, address: str, port: int, seconds: float) -> None:
    """Return when something listens at address:port. torch waits there too, with a page of stack traces."""
    deadline = time.monotonic() + seconds
    while True:
        try:
            socket.create_connection((address, port), timeout=max(1.0, deadline - time.monotonic())).close()
            return
        except OSError as error:
            reason = error.strerror or str(error)
        if time.monotonic() > deadline:
            raise LaunchError(
                f"{here} finds no rank 0 at {address}:{port} within {seconds:g} s ({reason}). Likely causes: rank 0 was not "
                f"started or has ended, MASTER_ADDR is not the address of its machine, or a firewall is between."
            )
        time.sleep(0.2)


def _gather(store: dist.Store, world_size: int, where: str, seconds: float, deadline: float) -> dict:
    """Rank 0: wait for the others and compare what they were told. What came of it: {"processes"} or {"error", "listeners"}."""
    came: dict[int, dict] = {}
    missing = set(range(world_size))
    pause, told_at = POLL_SECONDS, time.monotonic() + 15.0
    while True:
        for rank in sorted(missing):
            if store.check([f"rank {rank}"]):
                came[rank] = json.loads(store.get(f"rank {rank}"))
                missing.discard(rank)
        problem = _difference(came)
        if problem or not missing:
            break
        now = time.monotonic()
        if now > deadline:
            hosts = sorted({entry["place"]["host"] for entry in came.values()})
            problem = (
                f"of {world_size} ranks only {len(came)} came to {where} within {seconds:g} s: {ranks_text(missing)} "
                f"{'is' if len(missing) == 1 else 'are'} missing. {ranks_text(came)} came from {', '.join(hosts[:8])}. Were all "
                "nodes started, with the same number of ranks? Is that address reachable from them? --train.start_timeout "
                "SECONDS waits longer."
            )
            break
        if now > told_at:
            print(f"waiting for {ranks_text(missing)} at {where}", flush=True)
            told_at = now + 60.0
        time.sleep(pause)
        pause = min(2 * pause, 1.0)
    if problem:
        return {"error": problem, "listeners": len(came) - 1}
    return {"processes": [came[rank]["place"] for rank in range(world_size)]}


def _difference(came: Mapping[int, dict]) -> str:
    """What a rank was told otherwise than rank 0, as a message; '' when all agree."""
    if 0 not in came:
        return ""
    first = came[0]
    for rank in sorted(came):
        for name in sorted({*came[rank]["told"], *first["told"]}):
            mine, his = first["told"].get(name, "nothing"), came[rank]["told"].get(name, "nothing")
            if mine != his:
                place, origin = RankProcess(**came[rank]["place"]), RankProcess(**first["place"])
                return (
                    f"{place} was told another {name.replace('_', ' ')} than {origin}: {his}, not {mine}. Start all nodes "
                    "with the same command, files and installation."
                )
    return ""


def _await_outcome(store: dist.Store, here: RankProcess, where: str, deadline: float) -> dict:
    """What rank 0 makes of the rendezvous; in waits of a second, so that Ctrl-C is heard."""
    while time.monotonic() < deadline:
        try:
            if store.check([OUTCOME]):
                return json.loads(store.get(OUTCOME))
        except dist.DistError:
            return {"error": f"{here} was waiting at {where}, and rank 0 went away. Its output says why."}
        time.sleep(POLL_SECONDS if here.rank < 64 else 0.5)  # thousands of ranks must not wear the store out
    return {"error": f"{here} waited at {where}, and rank 0 did not answer: it hangs, or it was never started."}


def _wait_for_listeners(store: dist.Store, count: int) -> None:
    """Rank 0 leaves with the store: the others must have read the outcome first, or a few seconds have gone."""
    deadline = time.monotonic() + PATIENCE_SECONDS
    while store.add("told", 0) < count and time.monotonic() < deadline:
        time.sleep(POLL_SECONDS)


def ranks_text(ranks: Iterable[int]) -> str:
    """'rank 3' or 'ranks 0, 2-7'."""
    numbers = sorted(ranks)
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    text = ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in runs)
    return f"rank{'' if len(numbers) == 1 else 's'} {text}"
