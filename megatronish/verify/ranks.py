"""Processes of this machine that run a function as the ranks of one process group."""

from __future__ import annotations

import faulthandler
import gc
import multiprocessing
import os
import pickle
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from megatronish.errors import UserError
from megatronish.launch.process import free_port, has_gpu

TIMEOUT_SECONDS = 300.0


def run_ranks(
    world_size: int, function: Callable[..., Any], *arguments: Any, group: bool = True, log: bool = False,
    fork: bool | None = None,
) -> list[Any]:  # fmt: skip
    """Call ``function(rank, *arguments)`` in `world_size` processes that share a process group; returns results by rank.

    Results must be picklable. group: False for a function that makes the process group itself; log: write the output of the
    ranks to files that are deleted afterwards, and not to the terminal. Raises UserError with the traceback of the first rank
    that failed, or with the stacks of those that still run after TIMEOUT_SECONDS; the others are killed.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        ranks = start_ranks(world_size, folder, _run_and_save, folder, group, function, arguments, log=log, fork=fork)
        try:
            wait_for_ranks(ranks, folder, TIMEOUT_SECONDS)
        finally:
            stop_ranks(ranks)
        check_ranks(ranks, folder)
        return [pickle.loads((folder / f"{rank}.result").read_bytes()) for rank in range(world_size)]


def start_ranks(
    world_size: int, folder: Path, function: Callable[..., Any], *arguments: Any, log: bool, fork: bool | None = None
) -> list[Any]:
    """Start ``function(rank, *arguments)`` in `world_size` processes; RANK, WORLD_SIZE, MASTER_PORT ... are set in each.

    A rank that fails writes RANK.error, one that hangs RANK.stacks and, with `log`, each its output to RANK.log in `folder`.
    A fork does not import torch and DeepSpeed again, for which they are imported here.
    """
    fork = not has_gpu() if fork is None else fork
    if fork:
        import megatronish.training.loop  # noqa: F401

    context: Any = multiprocessing.get_context("fork" if fork else "spawn")
    port = free_port()
    ranks = [
        context.Process(target=_rank_main, args=(rank, world_size, port, folder, log, function, arguments))
        for rank in range(world_size)
    ]
    for process in ranks:
        process.start()
    return ranks


def wait_for_ranks(ranks: list[Any], folder: Path, timeout: float) -> None:
    """Return when all ranks have ended, or one has failed. Raises UserError with their stacks after `timeout` seconds."""
    deadline = time.monotonic() + timeout
    while any(process.is_alive() for process in ranks):
        if any(process.exitcode for process in ranks):
            return
        if time.monotonic() > deadline:
            running = [rank for rank, process in enumerate(ranks) if process.is_alive()]
            for rank in running:
                os.kill(ranks[rank].pid, signal.SIGUSR1)
            time.sleep(1.0)
            stacks = "\n".join(f"rank {rank}:\n{(folder / f'{rank}.stacks').read_text()}" for rank in running)
            raise UserError(
                f"ranks {running} still run after {timeout:.0f} s; the others have ended or wait too.\n{stacks}"
            )
        time.sleep(0.005)


def stop_ranks(ranks: list[Any]) -> None:
    """Kill those that still run."""
    for process in ranks:
        process.kill()
        process.join()


def check_ranks(ranks: list[Any], folder: Path) -> None:
    """Raise UserError with the traceback of the first rank that failed, or the signals that ended ranks."""
    # A rank whose peer has failed fails too, a moment later: the cause is in the error that was written first.
    errors = sorted(folder.glob("*.error"), key=lambda path: path.stat().st_mtime_ns)
    if errors:
        raise UserError(f"rank {errors[0].stem} failed:\n{errors[0].read_text()}")
    for rank, process in enumerate(ranks):
        if process.exitcode:
            log, stacks = folder / f"{rank}.log", (folder / f"{rank}.stacks").read_text()
            output = "\n".join(log.read_text(errors="replace").splitlines()[-20:]) if log.exists() else ""
            raise UserError(
                f"rank {rank} ended with {process.exitcode} (-N: by signal N; 9 may mean that memory ran out).\n{output}\n{stacks}"
            )


def _rank_main(
    rank: int,
    world_size: int,
    port: int,
    folder: Path,
    log: bool,
    function: Callable[..., Any],
    arguments: tuple[Any, ...],
) -> None:
    gc.freeze()  # a fork must not run the destructors of its parent's objects: their threads do not exist here
    os.environ.update(
        RANK=str(rank), WORLD_SIZE=str(world_size), LOCAL_RANK=str(rank), LOCAL_WORLD_SIZE=str(world_size),
        MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port),
    )  # fmt: skip
    if log:
        output = os.open(folder / f"{rank}.log", os.O_CREAT | os.O_WRONLY)
        os.dup2(output, 1)
        os.dup2(output, 2)
    stacks = (folder / f"{rank}.stacks").open("w")
    faulthandler.enable(stacks)
    faulthandler.register(signal.SIGUSR1, stacks)
    status = 0
    try:
        torch.set_num_threads(1)
        signal.signal(signal.SIGPIPE, signal.SIG_IGN)  # the default of Python, which a parent may have changed
        function(rank, *arguments)
    except BaseException:
        (folder / f"{rank}.error").write_text(traceback.format_exc())
        status = 1
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def _run_and_save(
    rank: int, folder: Path, group: bool, function: Callable[..., Any], arguments: tuple[Any, ...]
) -> None:
    from megatronish.training.engine import start_process_group, stop_process_group

    if group:
        start_process_group(timeout_minutes=TIMEOUT_SECONDS / 60)
    result = function(rank, *arguments)
    if torch.distributed.is_initialized():
        torch.distributed.barrier()  # a rank that ends while others still connect to it would reset their connections
    stop_process_group()
    (folder / f"{rank}.result").write_bytes(pickle.dumps(result))
