"""Checkpoints that appear whole or not at all.

    save_dir/checkpoints/step-00000500/   engine/       master weights, moments, loss scale: a file a rank
                                          model.safetensors, model_config.json, tokenizer.*   what inference reads
                                          run.json      the resolved configuration
                                          state.json    counters
    save_dir/checkpoints/latest, best     names of checkpoints

All ranks write into `.writing-step-...`; when every rank is done its files are synced and the folder is renamed.
A checkpoint goes by a rename to `.removing-step-...`, so that half of one never stands under its name either.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

from megatronish.config.errors import ConfigError
from megatronish.config.files import sync, sync_tree, write_whole
from megatronish.model.checkpoints import BEST, CHECKPOINTS, LATEST, STATE_FILE, find_checkpoint, read_pointer
from megatronish.model.checkpoints import RUN_FILE as RUN_FILE

ENGINE_TAG = "engine"
_WRITING, _REMOVING = ".writing-", ".removing-"


def step_name(step: int) -> str:
    """Folder name of the checkpoint after `step` steps."""
    return f"step-{step:08d}"


class CheckpointStore:
    """The checkpoints of one run.

    run_dir: the run's folder; keep_last: newest to keep; is_first: whether this rank renames, prunes and points;
    barrier: returns when every rank has called it.
    """

    def __init__(self, run_dir: Path, keep_last: int, is_first: bool, barrier: Callable[[], None]) -> None:
        self.folder = run_dir / CHECKPOINTS
        self._keep_last = keep_last
        self._is_first = is_first
        self._barrier = barrier

    def save(self, step: int, write: Callable[[Path], None], is_best: bool = False) -> Path:
        """Make the checkpoint of `step`: every rank calls it, `write` fills the folder it is given."""
        staging, final = self.folder / (_WRITING + step_name(step)), self.folder / step_name(step)
        if self._is_first:
            self._clear()  # what a killed run left
            staging.mkdir(parents=True)
        self._barrier()
        write(staging)
        self._barrier()
        if self._is_first:
            sync_tree(staging)
            if final.exists():  # the same step saved again: the old one goes only when the new one is complete
                self._retire(final)
            staging.rename(final)
            sync(self.folder)
            self._point(LATEST, final.name)
            if is_best:
                self._point(BEST, final.name)
            self._prune(final)
            self._clear()
        self._barrier()
        return final

    def newest(self) -> Path | None:
        """The checkpoint `latest` names, else the newest complete one, else None."""
        named = read_pointer(self.folder, LATEST)
        return named or max(self.complete(), default=None)

    def complete(self) -> list[Path]:
        """Every complete checkpoint, oldest first."""
        return sorted(path.parent for path in self.folder.glob(f"step-*/{STATE_FILE}"))

    def find(self, resume: str) -> Path | None:
        """The checkpoint `--train.resume` means: "auto", "never", or a path. Raises ConfigError for a bad path."""
        if resume == "never":
            if self.complete():
                raise ConfigError(
                    f"{self.folder} already holds checkpoints, and --train.resume never would write among them. "
                    "Choose another --train.save_dir, or continue with --train.resume auto."
                )
            return None
        return self.newest() if resume == "auto" else find_checkpoint(Path(resume))

    def _point(self, name: str, target: str) -> None:
        write_whole(self.folder / name, target + "\n")

    def _prune(self, newest: Path) -> None:
        """Retire all but the last few up to `newest`. Later steps, of a run taken up again further back, stay."""
        best = read_pointer(self.folder, BEST)
        up_to_now = [path for path in self.complete() if path.name <= newest.name]
        for old in up_to_now[: -self._keep_last]:
            if old != best:
                self._retire(old)

    def _retire(self, old: Path) -> None:
        old.rename(self.folder / (_REMOVING + old.name))

    def _clear(self) -> None:
        for leftover in [*self.folder.glob(_WRITING + "*"), *self.folder.glob(_REMOVING + "*")]:
            shutil.rmtree(leftover)


def check_writable(folder: Path) -> None:
    """Make `folder` and a file in it, so that a run without permission fails before it starts. Raises ConfigError."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / f".probe-{os.getpid()}"
        probe.write_text("")
        probe.unlink()
    except OSError as error:
        raise ConfigError(
            f"train.save_dir {folder} cannot be written: {error.strerror}. Choose another --train.save_dir."
        ) from None
