"""Run a function on N gloo ranks: forked after torch and deepspeed are imported, so a start costs a second, not ten."""

from __future__ import annotations

import contextlib
import faulthandler
import gc
import io
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

from megatronish.launch.process import free_port

TIMEOUT_SECONDS = 240.0


def run_ranks(world_size: int, function: Callable[..., Any], *args: Any, group: bool = True) -> list[Any]:
    """Call `function(rank, *args)` in `world_size` processes that share a process group; their results, by rank.

    Results must be picklable. Raises AssertionError with the traceback of the first rank that failed; the others are
    ended. The group is made by the engine's own `start_process_group` and left by `stop_process_group`, unless `group`
    is False: then `function` makes it.
    """
    import megatronish.training.engine  # noqa: F401  imported once here, inherited by every fork

    port = free_port()
    with tempfile.TemporaryDirectory() as folder:
        children = {
            _fork(rank, world_size, port, Path(folder), function, args, group): rank for rank in range(world_size)
        }
        try:
            _wait(children, Path(folder))
        finally:
            for pid in children:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
        return [pickle.loads((Path(folder) / f"{rank}.result").read_bytes()) for rank in range(world_size)]


def _fork(
    rank: int, world: int, port: int, folder: Path, function: Callable[..., Any], args: tuple[Any, ...], group: bool
) -> int:
    sys.stdout.flush()
    sys.stderr.flush()
    pid = os.fork()
    if pid:
        return pid
    status = 1
    gc.freeze()  # what earlier tests left is not this process's to destroy: its threads were not forked
    try:
        os.environ.update(
            RANK=str(rank), WORLD_SIZE=str(world), LOCAL_RANK=str(rank), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port)
        )
        stacks = (folder / f"{rank}.stacks").open("w")
        faulthandler.enable(stacks)
        faulthandler.dump_traceback_later(TIMEOUT_SECONDS - 10, file=stacks)
        import torch

        from megatronish.training.engine import start_process_group, stop_process_group

        torch.set_num_threads(1)
        signal.signal(
            signal.SIGPIPE, signal.SIG_IGN
        )  # as Python starts: `--help`, which another test called, changes it
        if group:
            start_process_group(timeout_minutes=3)
        graphs = _compiled_graphs()
        result = function(rank, *args)
        assert _compiled_graphs() == graphs, (
            "a forked rank used torch.compile, whose workers hang now and then in a fork"
        )
        if torch.distributed.is_initialized():
            torch.distributed.barrier()  # a rank that ends while others still connect to it would reset them
        stop_process_group()
        (folder / f"{rank}.result").write_bytes(pickle.dumps(result))
        status = 0
    except BaseException:
        report = io.StringIO()
        traceback.print_exc(file=report)
        (folder / f"{rank}.error").write_text(report.getvalue())
    finally:
        os._exit(status)


def _compiled_graphs() -> int:
    """How many graphs torch.compile has made in this process."""
    dynamo = sys.modules.get("torch._dynamo.utils")
    return int(dynamo.counters["stats"]["unique_graphs"]) if dynamo else 0


def _wait(children: dict[int, int], folder: Path) -> None:
    """Wait for every child; the first failure or the timeout ends the wait."""
    deadline = time.monotonic() + TIMEOUT_SECONDS
    running = set(children)
    while running:
        for pid in list(running):
            done, status = os.waitpid(pid, os.WNOHANG)
            if not done:
                continue
            running.discard(pid)
            if status:
                rank = children[pid]
                error = folder / f"{rank}.error"
                if not error.exists():
                    error = folder / f"{rank}.stacks"
                raise AssertionError(
                    f"rank {rank} ended with {os.waitstatus_to_exitcode(status)}:\n{error.read_text()}"
                )
        if time.monotonic() > deadline:
            ranks = sorted(children[pid] for pid in running)
            stacks = "\n".join(f"rank {rank}:\n{(folder / f'{rank}.stacks').read_text()}" for rank in ranks)
            raise AssertionError(f"ranks {ranks} still run after {TIMEOUT_SECONDS} s\n{stacks}")
        time.sleep(0.02)
