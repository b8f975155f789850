"""The checkpoints of a run: listing, choosing, verifying, committing and retaining them.

    save_dir/checkpoints/step-00000500/   engine/       master weights, moments, loss scale: one file per rank
                                          model.safetensors, model_config.json, tokenizer.*   what inference reads
                                          run.json      the resolved configuration
                                          state.json    counters
                                          manifest.json every file with its size and hash, written last
    save_dir/checkpoints/latest, best     text files with the name of a checkpoint

All ranks write into `.writing-step-...`; when every rank has finished, the folder receives its manifest and is renamed, so
that a checkpoint appears atomically. Folders are renamed before they are deleted, so that no partial checkpoint keeps a
valid name: `.removing-step-...` is to be deleted, `.replaced-step-...` is kept until the same step has been saved again. A
damaged checkpoint becomes `damaged-step-...`, for the user to inspect. saver.py decides when a checkpoint is saved, and
training/setup/resume_point.py from which one to resume.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path

from megatronish.checkpoint.manifest import (
    MANIFEST_FILE,
    CheckpointManifest,
    DamagedCheckpointError,
    FileRecord,
    content_faults,
    first_few,
    read_manifest,
    size_faults,
    write_manifest,
)
from megatronish.checkpoint.paths import BEST, CHECKPOINTS, LATEST, STATE_FILE
from megatronish.errors import ConfigError
from megatronish.files import sync, write_atomic

ENGINE_TAG = "engine"
_WRITING, _REMOVING, _REPLACED, DAMAGED = ".writing-", ".removing-", ".replaced-", "damaged-"
SPARE_BYTES = 16 << 20  # free disk space required in addition to a checkpoint: headers, folders, logs


def step_name(step: int) -> str:
    """Folder name of the checkpoint after `step` steps."""
    return f"step-{step:08d}"


def step_of(checkpoint: Path) -> int:
    """The step in a checkpoint's name; -1 for a folder that was renamed."""
    number = checkpoint.name.removeprefix("step-")
    return int(number) if number.isdigit() else -1


def no_good_checkpoint(faults: Mapping[Path, list[str]]) -> ConfigError:
    """The error to raise when checkpoints exist and all of them have faults."""
    lines = "\n".join(f"  {path}: {first_few(found)}" for path, found in faults.items())
    return ConfigError(
        f"none of {len(faults)} checkpoint(s) that this run could resume from is good:\n{lines}\nRestore one from a copy, "
        "name another one with --train.resume PATH, or start over with another --train.save_dir."
    )


class CheckpointStore:
    """The checkpoints of one run, as seen by one process. Only the first rank modifies them.

    run_dir: the run's folder; keep_last: how many of the newest good checkpoints to keep; keep_every: checkpoints at
    multiples of this number of steps are never removed (0: none). A manifest is read once, and again only if it changed.
    """

    def __init__(self, run_dir: Path, keep_last: int = 1, keep_every: int = 0) -> None:
        self.folder = run_dir / CHECKPOINTS
        self._keep_last, self._keep_every = keep_last, keep_every
        self._manifests: dict[Path, tuple[tuple[int, ...], CheckpointManifest]] = {}

    # Listing and choosing.

    @classmethod
    def find(cls, path: Path, prefer: str = LATEST) -> Path:
        """The checkpoint that a user means by the path of a checkpoint, a run, or a run's checkpoints folder.

        prefer: which pointer of a run to follow, "latest" or "best" (falls back to latest). Raises ConfigError if there is
        no checkpoint.
        """
        if (path / STATE_FILE).exists():
            return path
        for folder in (path / CHECKPOINTS, path):
            pointed = _read_pointer(folder, prefer) or _read_pointer(folder, LATEST)
            if found := pointed or max((file.parent for file in folder.glob(f"step-*/{STATE_FILE}")), default=None):
                return found
        problem = "holds no complete checkpoint" if path.exists() else "no such folder"
        raise ConfigError(f"{path}: {problem}. Give a run's folder (--train.save_dir) or one of its checkpoints.")

    def complete(self) -> list[Path]:
        """Every checkpoint that was committed, oldest first. Their files are not checked."""
        found = {path.parent for file in (STATE_FILE, MANIFEST_FILE) for path in self.folder.glob(f"step-*/{file}")}
        return sorted(found)

    def at(self, step: int) -> Path:
        """Where the checkpoint of a step is, or would be."""
        return self.folder / step_name(step)

    def newest(self) -> Path | None:
        """The first of `candidates` whose manifest and file sizes are right, else None."""
        return next((path for path in self.candidates() if not self.faults(path)), None)

    def newest_before(self, step: int) -> Path | None:
        """The checkpoint with the most steps, fewer than `step`, whose manifest and file sizes are right, else None."""
        older = (path for path in reversed(self.complete()) if step_of(path) < step)
        return next((path for path in older if not self.faults(path)), None)

    def candidates(self) -> list[Path]:
        """The checkpoints in the order in which to try resuming from them.

        First the one that `latest` names, then older ones, newest first, then newer ones, which exist if the run was
        resumed from an earlier checkpoint. Without a valid `latest`, all of them, newest first.
        """
        newest_first = self.complete()[::-1]
        named = _read_pointer(self.folder, LATEST)
        if named not in newest_first:
            return newest_first
        older = [path for path in newest_first if path.name < named.name]
        return [named, *older, *(path for path in newest_first if path.name > named.name)]

    def wanted(self, resume: str) -> list[Path]:
        """The checkpoints that `--train.resume` allows, in order of preference; [] to start from step 0.

        resume: "auto", "never", or a path. Raises ConfigError for a path without a checkpoint, and for "never" if the run
        already has checkpoints.
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
            store = CheckpointStore(run_dir)
            if path in (run_dir, store.folder) and store.complete():
                return store.candidates()
        return [self.find(path)]

    # Verifying.

    def manifest(self, checkpoint: Path) -> CheckpointManifest:
        """The manifest of a checkpoint. Raises DamagedCheckpointError as `read_manifest` does."""
        signature = _signature(checkpoint)
        if signature is None or signature != self._manifests.get(checkpoint, (None,))[0]:
            manifest = read_manifest(checkpoint)
            if signature is not None:
                self._manifests[checkpoint] = signature, manifest
            return manifest
        return self._manifests[checkpoint][1]

    def faults(self, checkpoint: Path, names: Iterable[str] = ()) -> list[str]:
        """What is wrong with a checkpoint: its manifest, the sizes of all files, and the contents of the files `names`."""
        try:
            manifest = self.manifest(checkpoint)
        except DamagedCheckpointError as error:
            return [str(error)]
        return size_faults(checkpoint, manifest) or content_faults(checkpoint, manifest, names)

    def is_damaged(self, checkpoint: Path, faults: Iterable[str]) -> bool:
        """Whether a checkpoint with these faults is certainly damaged, rather than unreadable at the moment."""
        try:
            self.manifest(checkpoint)
        except DamagedCheckpointError as error:
            return error.certain
        return checkpoint.exists() and not any("cannot be read" in fault for fault in faults)

    def verify(self, folder: Path, names: Iterable[str]) -> None:
        """Check the sizes of all files of `folder`, and the contents of the files `names`, before these are read.

        An exported folder, which is not a checkpoint, has no manifest and is not checked. Raises DamagedCheckpointError.
        """
        if not any((folder / name).exists() for name in (MANIFEST_FILE, STATE_FILE)):
            return
        manifest = self.manifest(folder)
        faults = size_faults(folder, manifest)
        faults = faults or content_faults(folder, manifest, [name for name in names if name in manifest.files])
        if faults:
            raise DamagedCheckpointError(
                f"{folder} is damaged: {first_few(faults)}. Use another checkpoint, or restore this one."
            )

    # Committing.

    def begin(self, step: int, size: int) -> Path:
        """An empty folder for the files of a checkpoint of `size` bytes. Raises OSError, also if the disk is too full."""
        self.clear()
        staging = self.folder / (_WRITING + step_name(step))
        staging.mkdir(parents=True)
        free = shutil.disk_usage(self.folder).free
        if free < size + SPARE_BYTES:
            self.abandon(staging)
            raise OSError(f"it needs {size / 1e9:.3f} GB and {free / 1e9:.3f} GB are free on the disk of {self.folder}")
        return staging

    def commit(self, staging: Path, step: int, files: Mapping[str, FileRecord], is_best: bool = False) -> Path:
        """Turn the written folder into the checkpoint of `step`, and the latest one.

        files: records of the files that were already hashed. Raises OSError; until the folder is renamed the previous
        checkpoint is the newest one, and afterwards this one is.
        """
        manifest = write_manifest(staging, step, files)
        if faults := size_faults(staging, manifest):
            raise OSError(f"files changed while they were written: {first_few(faults)}")
        for folder in sorted({(staging / name).parent for name in manifest.files} | {staging}):
            sync(folder)
        final, replaced = self.at(step), self.folder / (_REPLACED + step_name(step))
        if final.exists():  # the same step saved again: the old one is removed only when the new one is complete
            final.rename(replaced)
        staging.rename(final)
        sync(self.folder)
        if signature := _signature(final):
            self._manifests[final] = signature, manifest
        self._point(LATEST, final.name)
        if is_best:
            self._point(BEST, final.name)
        return final

    def abandon(self, staging: Path) -> None:
        """Remove the files of a checkpoint that cannot be finished, as far as the disk allows."""
        shutil.rmtree(staging, ignore_errors=True)

    # Retaining.

    def tidy(self, newest: Path) -> None:
        """Remove the checkpoints that are superseded by the new one. Raises OSError.

        All but the last `keep_last` up to `newest` are removed. Later steps, left by a run that was resumed from an earlier
        checkpoint, stay. A damaged checkpoint stays too, and does not count as one of those to keep.
        """
        best = _read_pointer(self.folder, BEST)
        good = [path for path in self.complete() if path.name <= newest.name and not self.faults(path)]
        for old in good[: -self._keep_last]:
            if old != best and not (self._keep_every and step_of(old) % self._keep_every == 0):
                old.rename(self.folder / (_REMOVING + old.name))
        self.clear()

    def clear(self) -> None:
        """Remove what a killed run left, and restore a checkpoint whose replacement was never completed."""
        for old in self.folder.glob(_REPLACED + "*"):
            place = self.folder / old.name.removeprefix(_REPLACED)
            if place.exists():
                old.rename(self.folder / (_REMOVING + place.name))
            else:
                old.rename(place)
        for leftover in [*self.folder.glob(_WRITING + "*"), *self.folder.glob(_REMOVING + "*")]:
            shutil.rmtree(leftover)

    def set_aside(self, damaged: Path) -> None:
        """Rename a damaged checkpoint of this run to `damaged-...`, if the file system permits it."""
        if damaged.parent == self.folder:
            aside = self.folder / (DAMAGED + damaged.name)
            with contextlib.suppress(OSError):
                if aside.exists():
                    shutil.rmtree(aside)
                damaged.rename(aside)
                sync(self.folder)

    def _point(self, name: str, target: str) -> None:
        write_atomic(self.folder / name, target + "\n")


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


def _read_pointer(folder: Path, name: str) -> Path | None:
    """The checkpoint that a pointer file names, if both exist."""
    try:
        target = folder / (folder / name).read_text(encoding="utf-8").strip()
    except OSError:
        return None
    return target if target.parent == folder and (target / STATE_FILE).exists() else None


def _signature(checkpoint: Path) -> tuple[int, ...] | None:
    """Identity, size and modification time of a manifest file; None if it is missing."""
    try:
        found = (checkpoint / MANIFEST_FILE).stat()
    except OSError:
        return None
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns
