"""Checkpoints that appear whole or not at all, and which of them to go on from.

    save_dir/checkpoints/step-00000500/   engine/       master weights, moments, loss scale: a file a rank
                                          model.safetensors, model_config.json, tokenizer.*   what inference reads
                                          run.json      the resolved configuration
                                          state.json    counters
                                          manifest.json every file with its size and hash, written last
    save_dir/checkpoints/latest, best     names of checkpoints

All ranks write into `.writing-step-...`; when every rank is done the folder gets its manifest and is renamed. Whatever goes
is renamed first, so that half of a checkpoint never stands under its name: `.removing-step-...` is to be deleted,
`.replaced-step-...` until the same step, saved anew, is in its place. One found damaged becomes `damaged-step-...`, for the
user to look at. saving.py decides when all this happens; resume.py reads the files before one is gone on from.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Mapping
from pathlib import Path

from megatronish.checkpoint.manifest import (
    MANIFEST_FILE,
    DamagedCheckpointError,
    FileRecord,
    listed,
    read_manifest,
    size_faults,
    write_manifest,
)
from megatronish.checkpoint.paths import BEST, CHECKPOINTS, LATEST, STATE_FILE, find_checkpoint, read_pointer
from megatronish.checkpoint.paths import RUN_FILE as RUN_FILE
from megatronish.errors import ConfigError
from megatronish.files import sync, write_atomic

ENGINE_TAG = "engine"
_WRITING, _REMOVING, _REPLACED, DAMAGED = ".writing-", ".removing-", ".replaced-", "damaged-"
SPARE_BYTES = 16 << 20  # left on the disk beside a checkpoint: headers, folders, logs


def step_name(step: int) -> str:
    """Folder name of the checkpoint after `step` steps."""
    return f"step-{step:08d}"


def step_of(checkpoint: Path) -> int:
    """The step in a checkpoint's name; -1 for a folder that was renamed."""
    number = checkpoint.name.removeprefix("step-")
    return int(number) if number.isdigit() else -1


def faults_of(checkpoint: Path) -> list[str]:
    """What is wrong with a checkpoint that shows without reading its files: [] when its manifest and all sizes are right."""
    try:
        return size_faults(checkpoint, read_manifest(checkpoint))
    except DamagedCheckpointError as error:
        return [str(error)]


def none_good(refused: Mapping[str, list[str]]) -> ConfigError:
    """The error to raise where there are checkpoints, and these are the faults of all of them."""
    told = "\n".join(f"  {path}: {listed(faults)}" for path, faults in refused.items())
    return ConfigError(
        f"none of {len(refused)} checkpoint(s) that this run could go on from is good:\n{told}\nRestore one from a copy, name another "
        "one with --train.resume PATH, or begin afresh with another --train.save_dir."
    )


class CheckpointStore:
    """The checkpoints of one run, as one process sees them; only the first rank changes anything.

    run_dir: the run's folder; keep_last: newest good ones to keep; keep_every: those at multiples of so many steps are kept
    for good (0: none are).
    """

    def __init__(self, run_dir: Path, keep_last: int, keep_every: int = 0) -> None:
        self.folder = run_dir / CHECKPOINTS
        self._keep_last, self._keep_every = keep_last, keep_every

    def begin(self, step: int, size: int) -> Path:
        """An empty folder for the files of a checkpoint of `size` bytes. Raises OSError, and when the disk has no room."""
        self.clear()
        staging = self.folder / (_WRITING + step_name(step))
        staging.mkdir(parents=True)
        free = shutil.disk_usage(self.folder).free
        if free < size + SPARE_BYTES:
            self.abandon(staging)
            raise OSError(f"it needs {size / 1e9:.3f} GB and {free / 1e9:.3f} GB are free on the disk of {self.folder}")
        return staging

    def commit(self, staging: Path, step: int, files: Mapping[str, FileRecord], is_best: bool = False) -> Path:
        """Make the written folder the checkpoint of `step`, and the latest. files: what is known of its files by now.

        Raises OSError; until the folder has its name the checkpoint before is in force, and afterwards this one is.
        """
        manifest = write_manifest(staging, step, files)
        if faults := size_faults(staging, manifest):
            raise OSError(f"files changed while they were written: {listed(faults)}")
        for folder in sorted({(staging / name).parent for name in manifest.files} | {staging}):
            sync(folder)
        final, replaced = self.folder / step_name(step), self.folder / (_REPLACED + step_name(step))
        if final.exists():  # the same step saved again: the old one goes only when the new one is complete
            final.rename(replaced)
        staging.rename(final)
        sync(self.folder)
        self._point(LATEST, final.name)
        if is_best:
            self._point(BEST, final.name)
        return final

    def tidy(self, newest: Path) -> None:
        """Remove what the new checkpoint has made superfluous. Raises OSError."""
        self._prune(newest)
        self.clear()

    def abandon(self, staging: Path) -> None:
        """Remove what was written of a checkpoint that cannot be finished, as far as the disk allows."""
        shutil.rmtree(staging, ignore_errors=True)

    def clear(self) -> None:
        """Remove what a killed run left, and put back a checkpoint that was to be replaced by one that never came."""
        for old in self.folder.glob(_REPLACED + "*"):
            place = self.folder / old.name.removeprefix(_REPLACED)
            if place.exists():
                old.rename(self.folder / (_REMOVING + place.name))
            else:
                old.rename(place)
        for leftover in [*self.folder.glob(_WRITING + "*"), *self.folder.glob(_REMOVING + "*")]:
            shutil.rmtree(leftover)

    def complete(self) -> list[Path]:
        """Every checkpoint that once was complete, oldest first; whether it still is, is not looked at."""
        found = {path.parent for file in (STATE_FILE, MANIFEST_FILE) for path in self.folder.glob(f"step-*/{file}")}
        return sorted(found)

    def newest(self) -> Path | None:
        """The first of `candidates` whose manifest and sizes are right, else None."""
        return next((path for path in self.candidates() if not faults_of(path)), None)

    def candidates(self) -> list[Path]:
        """The checkpoints in the order in which to go on from them.

        The one that `latest` names, then older ones, newest first, then newer ones, of a run that was taken up again
        further back. Without such a pointer all of them, newest first.
        """
        newest_first = self.complete()[::-1]
        named = read_pointer(self.folder, LATEST)
        if named not in newest_first:
            return newest_first
        older = [path for path in newest_first if path.name < named.name]
        return [named, *older, *(path for path in newest_first if path.name > named.name)]

    def wanted(self, resume: str) -> list[Path]:
        """The checkpoints that `--train.resume` means, best first; [] to begin afresh. "auto", "never", or a path.

        Raises ConfigError for a path without a checkpoint, and for "never" among checkpoints.
        """
        if resume == "never":
            if self.complete():
                raise ConfigError(
                    f"{self.folder} already holds checkpoints, and --train.resume never would write among them. "
                    "Choose another --train.save_dir, or continue with --train.resume auto."
                )
            return []
        if resume == "auto":
            return self.candidates()
        path = Path(resume)
        for run_dir in (path, path.parent):
            store = CheckpointStore(run_dir, 1)
            if path in (run_dir, store.folder) and store.complete():
                return store.candidates()
        return [find_checkpoint(path)]

    def set_aside(self, damaged: Path) -> None:
        """Give a damaged checkpoint of this run a name under which nothing looks for checkpoints, where that can be done."""
        if damaged.parent == self.folder:
            aside = self.folder / (DAMAGED + damaged.name)
            with contextlib.suppress(OSError):
                if aside.exists():
                    shutil.rmtree(aside)
                damaged.rename(aside)
                sync(self.folder)

    def _point(self, name: str, target: str) -> None:
        write_atomic(self.folder / name, target + "\n")

    def _prune(self, newest: Path) -> None:
        """Retire all but the last few up to `newest`. Later steps, of a run taken up again further back, stay.

        One that is damaged is not counted among those that are kept, and stays where it is: a good one is never removed
        because a bad one stands beside it.
        """
        best = read_pointer(self.folder, BEST)
        good = [path for path in self.complete() if path.name <= newest.name and not faults_of(path)]
        for old in good[: -self._keep_last]:
            if old != best and not (self._keep_every and step_of(old) % self._keep_every == 0):
                old.rename(self.folder / (_REMOVING + old.name))


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
