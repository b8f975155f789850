"""Checkpoints saved by one process, without a training run."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from megatronish.checkpoint.saver import CheckpointSnapshot, SaveOutcome, Saver
from megatronish.checkpoint.store import CheckpointStore
from megatronish.launch.consensus import Consensus
from megatronish.launch.rendezvous import join_rendezvous


def lone_saver(
    store: CheckpointStore, reports: list[str] | None = None, background: bool = False, stop_on_error: bool = False
) -> Saver:
    """A saver of a single rank; the lines that it reports are appended to `reports`."""
    lines = reports if reports is not None else []
    return Saver(store, Consensus(join_rendezvous(0, 1, "", 0, 1.0), "test"), background, stop_on_error, lines.append)


def save_alone(
    store: CheckpointStore, step: int, write: Callable[[Path], None], is_best: bool = False, size: int = 0
) -> SaveOutcome:
    """Save one checkpoint, in the foreground; its outcome."""
    saver = lone_saver(store)
    saver.save(step, lambda _: snapshot(write, size), is_best, reason="a test")
    outcome = saver.wait()
    assert outcome is not None
    return outcome


def snapshot(write: Callable[[Path], None], size: int = 0) -> CheckpointSnapshot:
    """A snapshot whose files are those that `write` writes."""

    def write_and_list(folder: Path) -> list[Path]:
        write(folder)
        return [path for path in folder.rglob("*") if path.is_file()]

    return CheckpointSnapshot(size, write_and_list)
