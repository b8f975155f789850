"""One start of a training run on this machine's processes, recorded step by step, perhaps killed on its way."""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import time
import traceback
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megatronish.config.run import RunConfig
from megatronish.errors import UserError
from megatronish.launch.process import Rank, free_port, has_gpu
from megatronish.verify.kills import Kill, Trap

TIMEOUT_SECONDS = 600.0  # of one attempt


@dataclass(frozen=True)
class Attempt:
    """What a start did. traces: by rank, the steps it completed; killed: what the trap noted, {} when nothing was killed."""

    traces: list[list[dict[str, Any]]]
    killed: dict[str, Any]
    seconds: float

    @property
    def first_step(self) -> int | None:
        """The first step that the first rank completed, from 0; None when it came to none."""
        return self.traces[0][0]["step"] if self.traces[0] else None


def run_attempt(
    config: RunConfig, ranks: int, folder: Path, kill: Kill | None = None, usual: tuple[float, float] = (0.0, 0.0)
) -> Attempt:
    """Train until the end or the kill; `folder`, new, takes traces and logs. usual: seconds of a step and of a save.

    Forked where there is no GPU, which saves importing torch again. Raises UserError when a rank ends otherwise than it should.
    """
    folder.mkdir(parents=True)
    begin = time.monotonic()
    context: Any = multiprocessing.get_context("spawn" if has_gpu() else "fork")
    if not has_gpu():
        import megatronish.training.loop  # noqa: F401  once here, and not in every child
    port = free_port()
    processes = [
        context.Process(target=_be_rank, args=(rank, ranks, port, config, folder, kill, usual)) for rank in range(ranks)
    ]
    for process in processes:
        process.start()
    try:
        _wait(processes, folder, kill)
    finally:
        for process in processes:
            process.kill()
            process.join()
    note = folder / "killed.json"
    killed = json.loads(note.read_text()) if note.exists() else {}
    if not killed:
        _check_ends(processes, folder)
    return Attempt([_read_trace(folder, rank) for rank in range(ranks)], killed, time.monotonic() - begin)


def digest_of(values: Iterable[Any]) -> str:
    """128 bits that tell any two sequences of tensors and JSON values apart."""
    state = hashlib.blake2b(digest_size=16)
    for value in values:
        if isinstance(value, torch.Tensor):
            plain = value.detach().cpu().contiguous()
            state.update(f"{plain.dtype} {tuple(plain.shape)}".encode())
            state.update(plain.view(-1).view(torch.uint8).numpy().tobytes() if plain.numel() else b"")
        else:
            state.update(json.dumps(value, sort_keys=True).encode())
    return state.hexdigest()


def _wait(processes: list[Any], folder: Path, kill: Kill | None) -> None:
    """Until all have ended or, as a launcher would see to, the first has died."""
    deadline = time.monotonic() + TIMEOUT_SECONDS
    while any(process.is_alive() for process in processes):
        if any(process.exitcode for process in processes):
            if kill is not None:
                time.sleep(kill.late)
            elif not any(folder.glob("*.error")):
                time.sleep(1.0)  # for the cause behind the first end
            return
        if time.monotonic() > deadline:
            raise UserError(f"an attempt took more than {TIMEOUT_SECONDS:.0f} s; its logs are in {folder}")
        time.sleep(0.005)


def _check_ends(processes: list[Any], folder: Path) -> None:
    errors = sorted(folder.glob("*.error"))
    if errors:
        raise UserError(f"rank {errors[0].stem} failed:\n{errors[0].read_text()}")
    if any(process.exitcode for process in processes):
        codes = [process.exitcode for process in processes]
        raise UserError(f"ranks ended with {codes}; their logs are in {folder}")


def _read_trace(folder: Path, rank: int) -> list[dict[str, Any]]:
    path = folder / f"{rank}.trace"
    if not path.exists():
        return []
    whole = path.read_text().rpartition("\n")[0]  # a kill may have cut the last line
    return [json.loads(line) for line in whole.splitlines()]


def _be_rank(
    rank: int, ranks: int, port: int, config: RunConfig, folder: Path, kill: Kill | None, usual: tuple[float, float]
) -> None:
    """One rank, as launchers/pretrain.py is one; its output goes into a file."""
    os.environ.update(
        RANK=str(rank), WORLD_SIZE=str(ranks), LOCAL_RANK=str(rank), LOCAL_WORLD_SIZE=str(ranks),
        MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port),
    )  # fmt: skip
    log = os.open(folder / f"{rank}.log", os.O_CREAT | os.O_WRONLY)
    os.dup2(log, 1)
    os.dup2(log, 2)
    status = 0
    try:
        from megatronish.training import loop

        torch.set_num_threads(1)
        trap = (
            Trap(kill, *usual, config.megatronish.train.save_interval, folder / "killed.json")
            if kill is not None and kill.rank == rank
            else None
        )
        recorder = _Recorder(folder / f"{rank}.trace", trap)
        start_engine = loop.start_engine
        loop.start_engine = lambda *arguments: recorder.watch(start_engine(*arguments))
        loop.pretrain(config, Rank(rank, ranks, rank, ranks, "verify_resume"))
    except BaseException:
        (folder / f"{rank}.error").write_text(traceback.format_exc())
        status = 1
    os._exit(status)


class _Recorder:
    """Writes a line for every step that an engine does: hashes of what came in, and the bits of what came out."""

    def __init__(self, path: Path, trap: Trap | None) -> None:
        self._file = path.open("w", encoding="utf-8")
        self._trap = trap
        self._first = self._step = 0

    def watch(self, engine: Any) -> Any:
        """The same engine, whose steps are recorded from now on."""
        from megatronish.checkpoint.train_state import TrainState

        train_step, load = engine.train_step, engine.load

        def load_and_count(folder: Path, tag: str) -> None:
            self._first = self._step = TrainState.load(folder).step
            load(folder, tag)

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
    """Of torch's generators, from which dropout draws."""
    states = [torch.get_rng_state()]
    if torch.cuda.is_initialized():
        states.append(torch.cuda.get_rng_state())
    return digest_of(states)
