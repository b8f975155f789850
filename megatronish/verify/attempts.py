"""One attempt of a training run: started on this machine, recorded step by step, and killed at a chosen moment."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megatronish.config.run import RunConfig
from megatronish.launch.process import Rank
from megatronish.verify.kills import Kill, Trap
from megatronish.verify.ranks import check_ranks, start_ranks, stop_ranks, wait_for_ranks

TIMEOUT_SECONDS = 600.0  # of one attempt


@dataclass(frozen=True)
class Attempt:
    """What an attempt did. traces: the completed steps of each rank; killed: what the trap noted, {} when it did not act."""

    traces: list[list[dict[str, Any]]]
    killed: dict[str, Any]
    seconds: float

    @property
    def first_step(self) -> int | None:
        """The first step that rank 0 completed, from 0; None when it completed none."""
        return self.traces[0][0]["step"] if self.traces[0] else None


def run_attempt(
    config: RunConfig, ranks: int, folder: Path, kill: Kill | None = None, usual: tuple[float, float] = (0.0, 0.0)
) -> Attempt:
    """Train until the end or the kill; `folder`, new, takes traces and logs. usual: seconds of a step and of a save.

    Raises UserError when a rank ends in another way.
    """
    folder.mkdir(parents=True)
    begin, note = time.monotonic(), folder / "killed.json"
    processes = start_ranks(ranks, folder, _train, ranks, config, folder, kill, usual, log=True)
    try:
        wait_for_ranks(processes, folder, TIMEOUT_SECONDS)
        if kill is not None and note.exists():
            time.sleep(kill.late)
        elif any(process.exitcode for process in processes):
            time.sleep(1.0)  # for the traceback of another rank, which may be the cause
    finally:
        stop_ranks(processes)
    killed = json.loads(note.read_text()) if note.exists() else {}
    if not killed:
        check_ranks(processes, folder)
    return Attempt([_read_trace(folder, rank) for rank in range(ranks)], killed, time.monotonic() - begin)


def digest_of(values: Iterable[Any]) -> str:
    """A 128-bit hash of a sequence of tensors (bits, dtype and shape) and JSON values."""
    state = hashlib.blake2b(digest_size=16)
    for value in values:
        if isinstance(value, torch.Tensor):
            plain = value.detach().cpu().contiguous()
            state.update(f"{plain.dtype} {tuple(plain.shape)}".encode())
            state.update(plain.view(-1).view(torch.uint8).numpy().tobytes() if plain.numel() else b"")
        else:
            state.update(json.dumps(value, sort_keys=True).encode())
    return state.hexdigest()


def _read_trace(folder: Path, rank: int) -> list[dict[str, Any]]:
    path = folder / f"{rank}.trace"
    if not path.exists():
        return []
    complete = path.read_text().rpartition("\n")[0]  # a kill may have cut the last line
    return [json.loads(line) for line in complete.splitlines()]


def _train(
    rank: int, ranks: int, config: RunConfig, folder: Path, kill: Kill | None, usual: tuple[float, float]
) -> None:
    """One rank, which trains as launchers/pretrain.py does."""
    from megatronish.training import loop

    trap = None
    if kill is not None and kill.rank == rank:
        trap = Trap(kill, *usual, config.megatronish.train.save_interval, folder / "killed.json")
    recorder = _Recorder(folder / f"{rank}.trace", trap)
    start_engine = loop.start_engine
    loop.start_engine = lambda *arguments: recorder.watch(start_engine(*arguments))
    loop.pretrain(config, Rank(rank, ranks, rank, ranks, "verify_resume"))


class _Recorder:
    """Writes a line for each step of an engine: hashes of its inputs and the bits of its results."""

    def __init__(self, path: Path, trap: Trap | None) -> None:
        self._file = path.open("w", encoding="utf-8")
        self._trap = trap
        self._first = self._step = 0

    def watch(self, engine: Any) -> Any:
        """Record the steps of `engine` from now on; returns it."""
        from megatronish.checkpoint.train_state import TrainState

        train_step, load = engine.train_step, engine.load

        def load_and_count(folder: Path, *arguments: Any) -> None:
            self._first = self._step = TrainState.load(folder).step
            load(folder, *arguments)

        def step_and_record(batches: list[dict[str, Any]], *arguments: Any) -> Any:
            if self._trap is not None:
                self._trap.begins_step(self._step - self._first, self._step)
            begin = time.monotonic()
            before = {
                "batches": digest_of(v for batch in batches for _, v in sorted(batch.items())),
                "rng": _rng_digest(),
            }
            result = train_step(batches, *arguments)
            norm = None if result.grad_norm is None else float(result.grad_norm).hex()
            after = {"loss_sum": float(result.loss_sum).hex(), "norm": norm, "rng_after": _rng_digest()}
            seconds = time.monotonic() - begin
            self._file.write(json.dumps({"step": self._step, **before, **after, "seconds": seconds}) + "\n")
            self._file.flush()
            self._step += 1
            return result

        engine.load, engine.train_step = load_and_count, step_and_record
        return engine


def _rng_digest() -> str:
    """A hash of the states of torch's generators, from which dropout draws."""
    states = [torch.get_rng_state()]
    if torch.cuda.is_initialized():
        states.append(torch.cuda.get_rng_state())
    return digest_of(states)
