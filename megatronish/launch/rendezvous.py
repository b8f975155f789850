"""The rendezvous of the ranks of a run: each joins exactly once, and with the same configuration.

Rank 0 (or torchrun's agent) holds a key-value store at MASTER_ADDR:MASTER_PORT. Every rank writes its process and its
settings to it; rank 0 compares the settings and writes the outcome. Process groups use the same store.
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
REPLY_SECONDS = 5.0  # how long other ranks wait for rank 0's outcome after its own timeout
OUTCOME = "outcome"


@dataclass(frozen=True)
class RankProcess:
    """The process of a rank. pid_namespace: host and pid namespace; ranks with the same one can send each other signals."""

    rank: int
    host: str
    pid: int
    pid_namespace: str

    @classmethod
    def current(cls, rank: int) -> RankProcess:
        """This process."""
        host = socket.gethostname()
        namespace = ""
        with contextlib.suppress(OSError):
            namespace = os.readlink("/proc/self/ns/pid")
        return cls(rank, host, os.getpid(), f"{host} {namespace}")

    def __str__(self) -> str:
        return f"rank {self.rank} ({self.host}, pid {self.pid})"


@dataclass(frozen=True)
class Rendezvous:
    """The ranks that joined. store: shared by them; address: that of the host of the store, as seen from this rank."""

    store: dist.Store
    address: str
    rank: int
    processes: tuple[RankProcess, ...]

    @property
    def world_size(self) -> int:
        return len(self.processes)


def join_rendezvous(
    rank: int, world_size: int, address: str, port: int, seconds: float, settings: Mapping[str, str] | None = None
) -> Rendezvous:
    """Join the rendezvous and wait up to `seconds` for every rank.

    settings: name -> value; must be the same on all ranks. Raises LaunchError, with the same text on every rank that can be
    reached, if a rank is missing, joins twice, or has other settings.
    """
    here = RankProcess.current(rank)
    if world_size == 1:
        return Rendezvous(dist.HashStore(), address, 0, (here,))
    store = _open_store(here, world_size, address, port, seconds)
    deadline = time.monotonic() + seconds  # starts when rank 0 has joined, which may be last
    times = store.add(f"count {rank}", 1)
    if times > 1:
        raise LaunchError(
            f"{here} joined at {address}:{port}, but another rank {rank} had joined before: two nodes were started with the "
            "same node number, or another run uses this port. Give every node its own number (torchrun --node-rank)."
        )
    settings = {"world_size": str(world_size), **(settings or {})}
    store.set(f"rank {rank}", json.dumps({"process": asdict(here), "settings": settings}))
    if rank == 0:
        outcome = _gather(store, world_size, f"{address}:{port}", seconds, deadline)
        store.set(OUTCOME, json.dumps(outcome))
        if "error" in outcome:
            _wait_for_readers(store, outcome["readers"])
    else:
        outcome = _wait_for_outcome(store, here, f"{address}:{port}", deadline + REPLY_SECONDS)
        if "error" in outcome:
            with contextlib.suppress(dist.DistError):  # rank 0 did not wait
                store.add("outcome read", 1)
    if "error" in outcome:
        raise LaunchError(outcome["error"])
    return Rendezvous(store, address, rank, tuple(RankProcess(**process) for process in outcome["processes"]))


def join_rendezvous_from_env(seconds: float, settings: Mapping[str, str] | None = None) -> Rendezvous:
    """`join_rendezvous` with RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT, which `initialize_process` sets."""
    env = os.environ
    rank, world_size, port = (int(env[name]) for name in ("RANK", "WORLD_SIZE", "MASTER_PORT"))
    return join_rendezvous(rank, world_size, env["MASTER_ADDR"], port, seconds, settings)


def _open_store(here: RankProcess, world_size: int, address: str, port: int, seconds: float) -> dist.Store:
    """The store at address:port; rank 0 holds it, unless torchrun's agent does."""
    agent = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    is_server = here.rank == 0 and not agent
    if not is_server:
        _wait_for_server(here, address, port, seconds)
    try:
        store = dist.TCPStore(
            address, port, world_size, is_server, timeout=datetime.timedelta(seconds=seconds), wait_for_workers=False
        )
    except dist.DistError as error:
        raise LaunchError(
            f"{here} of {world_size} cannot join the rendezvous at {address}:{port}: {str(error).splitlines()[0]}\nIs another "
            "run using that port? Choose one: deepspeed --master_port 29501 (torchrun --master-port, or MASTER_PORT)."
        ) from None
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")  # an agent keeps the store when it restarts the ranks
    return dist.PrefixStore(f"megatronish {attempt}", store)


def _wait_for_server(here: RankProcess, address: str, port: int, seconds: float) -> None:
    """Return when address:port accepts connections. TCPStore would wait as well, but fails with a page of stack traces."""
    deadline = time.monotonic() + seconds
    while True:
        try:
            socket.create_connection((address, port), timeout=max(1.0, deadline - time.monotonic())).close()
            return
        except OSError as error:
            reason = error.strerror or str(error)
        if time.monotonic() > deadline:
            raise LaunchError(
                f"{here} found no rank 0 at {address}:{port} within {seconds:g} s ({reason}). Likely causes: rank 0 was not "
                f"started or has ended, MASTER_ADDR is not the address of its machine, or a firewall blocks the port."
            )
        time.sleep(0.2)


def _gather(store: dist.Store, world_size: int, where: str, seconds: float, deadline: float) -> dict:
    """Rank 0: wait for the others and compare their settings. Returns {"processes"}, or {"error", "readers"}."""
    joined: dict[int, dict] = {}
    missing = set(range(world_size))
    pause, report_at = POLL_SECONDS, time.monotonic() + 15.0
    while True:
        for rank in sorted(missing):
            if store.check([f"rank {rank}"]):
                joined[rank] = json.loads(store.get(f"rank {rank}"))
                missing.discard(rank)
        problem = _difference(joined)
        if problem or not missing:
            break
        now = time.monotonic()
        if now > deadline:
            hosts = sorted({entry["process"]["host"] for entry in joined.values()})
            problem = (
                f"only {len(joined)} of {world_size} ranks joined at {where} within {seconds:g} s: {ranks_text(missing)} "
                f"{'is' if len(missing) == 1 else 'are'} missing. {ranks_text(joined)} joined from {', '.join(hosts[:8])}. Were all "
                "nodes started, with the same number of ranks? Is that address reachable from them? --train.start_timeout "
                "SECONDS waits longer."
            )
            break
        if now > report_at:
            print(f"waiting for {ranks_text(missing)} at {where}", flush=True)
            report_at = now + 60.0
        time.sleep(pause)
        pause = min(2 * pause, 1.0)
    if problem:
        return {"error": problem, "readers": len(joined) - 1}
    return {"processes": [joined[rank]["process"] for rank in range(world_size)]}


def _difference(joined: Mapping[int, dict]) -> str:
    """A message with the first setting that differs from rank 0's, or ''."""
    if 0 not in joined:
        return ""
    first = joined[0]
    for rank in sorted(joined):
        for name in sorted({*joined[rank]["settings"], *first["settings"]}):
            values = [entry["settings"].get(name, "not set") for entry in (joined[rank], first)]
            if values[0] != values[1]:
                process, origin = RankProcess(**joined[rank]["process"]), RankProcess(**first["process"])
                return (
                    f"{process} has another {name.replace('_', ' ')} than {origin}: {values[0]}, not {values[1]}. Start all "
                    "nodes with the same command, files and installation."
                )
    return ""


def _wait_for_outcome(store: dist.Store, here: RankProcess, where: str, deadline: float) -> dict:
    """The outcome that rank 0 writes; polled, so that Ctrl-C is not delayed."""
    while time.monotonic() < deadline:
        try:
            if store.check([OUTCOME]):
                return json.loads(store.get(OUTCOME))
        except dist.DistError:
            return {"error": f"{here} was waiting at {where}, but rank 0 exited. See its output."}
        time.sleep(POLL_SECONDS if here.rank < 64 else 0.5)  # limits the load of thousands of ranks on the store
    return {"error": f"{here} waited at {where}, but rank 0 did not respond: it hangs, or it was not started."}


def _wait_for_readers(store: dist.Store, count: int) -> None:
    """Rank 0: keep the store until the others have read the outcome, for at most REPLY_SECONDS."""
    deadline = time.monotonic() + REPLY_SECONDS
    while store.add("outcome read", 0) < count and time.monotonic() < deadline:
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
