"""Saving of checkpoints: the state is copied while training waits, then written and hashed by a thread while it continues.

The threads of the ranks coordinate through the store of the rendezvous (launch/consensus.py) twice per checkpoint. First the
first rank checks the disk space and returns the folder to write to. When all ranks have written, it commits the checkpoint,
or removes it if a rank failed. So no failure of a rank can leave a partial checkpoint, and every rank knows the outcome of a
checkpoint before it begins the next one.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil
from safetensors import SafetensorError

from megatronish.checkpoint.manifest import FileRecord, hash_file
from megatronish.checkpoint.store import CheckpointStore
from megatronish.errors import UserError
from megatronish.files import sync
from megatronish.launch.consensus import Consensus

COPY_SHARE = 0.5  # of the free memory, for the copies of all ranks of a machine
LEAVE_SECONDS = 20.0  # given to a checkpoint that is being written when training fails
DISK_ERRORS = (OSError, SafetensorError)  # what full disks, missing permissions and failing devices raise


class SaveFailedError(UserError):
    """A checkpoint could not be written, and the run stops because of it."""


@dataclass(frozen=True)
class CheckpointSnapshot:
    """What a rank has to write. bytes: approximate size; write: writes to the given folder and returns the paths."""

    bytes: int
    write: Callable[[Path], list[Path]]


@dataclass(frozen=True)
class SaveOutcome:
    """The outcome of a checkpoint, the same on every rank. problem: '' if it was committed."""

    step: int
    problem: str = ""
    path: str = ""
    bytes: int = 0
    stalled: float = 0.0  # seconds for which training waited, the maximum over the ranks
    seconds: float = 0.0  # from the start of the save to the commit
    reason: str = ""  # why it was not written in the background, of the first rank with a reason

    def line(self) -> str:
        """One line for the log."""
        way = f"stalled {self.stalled:.2f} s, written in {self.seconds:.2f} s"
        return f"saved {self.path} ({self.bytes / 1e6:,.1f} MB; {way}{self.reason and f'; not in the background: {self.reason}'})"


@dataclass
class _PendingSave:
    """A checkpoint that is being saved on this rank."""

    step: int
    is_best: bool
    begun: float
    snapshot: CheckpointSnapshot
    reason: str
    stalled: float | None = None  # None until the end if training waits for the entire save
    outcome: SaveOutcome | None = None
    error: BaseException | None = None


class Saver:
    """Saves one rank's part of the run's checkpoints; every rank has one, and calls the same methods at the same steps.

    consensus: of these ranks, not used by anything else; background: whether to write while training continues;
    stop_on_error: raise SaveFailedError if a checkpoint cannot be written, instead of continuing and trying again at the next
    one; report: called with one line per outcome, on the first rank, in the writing thread.
    """

    def __init__(
        self,
        store: CheckpointStore,
        consensus: Consensus,
        background: bool,
        stop_on_error: bool = False,
        report: Callable[[str], None] = print,
        local_ranks: int = 1,
    ) -> None:
        self.store = store
        self._consensus, self._background, self._stop_on_error = consensus, background, stop_on_error
        self._report, self._local_ranks = report, local_ranks
        self._job: _PendingSave | None = None
        self._thread: threading.Thread | None = None
        self.usual_seconds = 0.0  # of the last committed checkpoint, from its start; the same on every rank

    def reason_to_wait(self, copy_bytes: int) -> str:
        """Why this rank cannot copy `copy_bytes` and write them in the background; '' if it can."""
        if not self._background:
            return "train.async_save is false"
        free = psutil.virtual_memory().available
        wanted = copy_bytes * self._local_ranks
        if wanted <= COPY_SHARE * free:
            return ""
        return f"copies take {wanted / 1e9:.2f} GB of the {free / 1e9:.2f} GB of free memory"

    def save(
        self, step: int, snapshot: Callable[[bool], CheckpointSnapshot], is_best: bool = False, *, reason: str = ""
    ) -> float:
        """Begin a checkpoint after the previous one is finished; returns the seconds for which training waited.

        snapshot: returns what to write; its argument is whether training continues meanwhile. reason: why it must not on this
        rank, or ''.
        """
        begun = time.monotonic()
        self.wait()
        job = _PendingSave(step, is_best, begun, snapshot(not reason), reason)
        self._job = job
        if reason:
            self._run(job)
            self._raise(job)
        else:
            job.stalled = time.monotonic() - begun
            self._thread = threading.Thread(target=self._run, args=(job,), name="checkpoint", daemon=True)
            self._thread.start()
        return time.monotonic() - begun

    def is_writing(self) -> bool:
        """Whether this rank's thread is running."""
        return self._thread is not None and self._thread.is_alive()

    def wait(self) -> SaveOutcome | None:
        """Wait for the checkpoint that is being saved; its outcome, or that of the previous one.

        Raises SaveFailedError if a failure is to stop the run, and ConsensusError if the other ranks are gone.
        """
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._job is None:
            return None
        self._raise(self._job)
        outcome = self._job.outcome
        if outcome and not outcome.problem:
            self.usual_seconds = outcome.seconds
        return outcome

    def finish(self) -> None:
        """At the end of a run: wait for the last checkpoint. Raises SaveFailedError if it could not be written."""
        outcome = self.wait()
        self._consensus.leave()
        if outcome and outcome.problem:
            raise SaveFailedError(
                f"the last checkpoint of the run, of step {outcome.step}, could not be written: {outcome.problem}. {self._fallback()} "
                "Fix that and start the same command again: it repeats the steps since then."
            )

    def abandon(self, seconds: float = LEAVE_SECONDS) -> None:
        """At the end of a failed run: wait up to `seconds` for the checkpoint that is being written, then give it up."""
        if self._thread is not None:
            self._thread.join(seconds)
            self._consensus.stop()
            self._thread.join(1.0)

    def _raise(self, job: _PendingSave) -> None:
        if job.error is not None:
            raise job.error
        assert job.outcome is not None
        if job.outcome.problem and self._stop_on_error:
            raise SaveFailedError(
                f"the checkpoint of step {job.step} could not be written: {job.outcome.problem}. {self._fallback()} "
                "Fix that, or continue without it: --train.on_save_error continue."
            )

    def _fallback(self) -> str:
        newest = self.store.newest()
        return f"The newest one is {newest}." if newest else "There is none."

    def _run(self, job: _PendingSave) -> None:
        try:
            job.outcome = self._save(job)
        except BaseException as error:  # raised when the run waits for this checkpoint
            job.error = error

    def _save(self, job: _PendingSave) -> SaveOutcome:
        """Coordinate and write, on every rank."""
        begun = self._consensus.agree(job.snapshot.bytes, lambda sizes: self._begin(job, sum(sizes)))
        if begun["problem"]:
            return SaveOutcome(job.step, begun["problem"])
        written = self._write(job, Path(begun["folder"]))
        done = self._consensus.agree(written, lambda all_written: self._end(job, Path(begun["folder"]), all_written))
        return SaveOutcome(**done)

    def _begin(self, job: _PendingSave, size: int) -> dict[str, str]:
        """On the first rank: the folder to write to."""
        try:
            return {"folder": str(self.store.begin(job.step, size)), "problem": ""}
        except DISK_ERRORS as error:
            return {"folder": "", "problem": self._failed(job, error_reason(error))}

    def _write(self, job: _PendingSave, folder: Path) -> dict[str, Any]:
        """Write this rank's files, and read them back for their hashes."""
        try:
            files = {}
            for path in job.snapshot.write(folder):
                sync(path)
                files[path.relative_to(folder).as_posix()] = asdict(hash_file(path))
            result = {"files": files, "problem": ""}
        except DISK_ERRORS as error:
            result = {"files": {}, "problem": error_reason(error)}
        stalled = job.stalled if job.stalled is not None else -1.0
        return {**result, "stalled": stalled, "reason": job.reason}

    def _end(self, job: _PendingSave, staging: Path, written: list[dict[str, Any]]) -> dict[str, Any]:
        """On the first rank: commit the checkpoint, or remove what was written of it."""
        problem = next(
            (f"rank {rank}: {result['problem']}" for rank, result in enumerate(written) if result["problem"]), ""
        )
        files = {name: FileRecord(**record) for result in written for name, record in result["files"].items()}
        path = None
        try:
            path = None if problem else self.store.commit(staging, job.step, files, job.is_best)
        except DISK_ERRORS as error:
            problem = error_reason(error)
        if path is None:
            self.store.abandon(staging)
            return asdict(SaveOutcome(job.step, self._failed(job, problem)))
        seconds = time.monotonic() - job.begun
        stalled = max(seconds if result["stalled"] < 0 else result["stalled"] for result in written)
        reason = next((result["reason"] for result in written if result["reason"]), "")
        size = sum(record.bytes for record in files.values())
        outcome = SaveOutcome(job.step, "", str(path), size, stalled, seconds, reason)
        self._report(outcome.line())
        try:
            self.store.tidy(path)
        except OSError as error:
            self._report(f"WARNING: old checkpoints could not be removed: {error_reason(error)}")
        return asdict(outcome)

    def _failed(self, job: _PendingSave, problem: str) -> str:
        """On the first rank: report that there is no checkpoint."""
        self._report(
            f"WARNING: no checkpoint of step {job.step}: {problem}. {self._fallback()} "
            + ("" if self._stop_on_error else "Training continues, and the next checkpoint is tried when it is due.")
        )
        return problem


def error_reason(error: BaseException) -> str:
    """One line with the reason and the path of a disk error."""
    if isinstance(error, OSError) and error.strerror:
        return f"{error.strerror}{f' ({error.filename})' if error.filename else ''}"
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
