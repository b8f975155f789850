"""When and by whom a checkpoint is written: copied while training stops, written and hashed by a thread while it goes on.

The ranks' threads agree over the meeting's store (launch/consensus.py), twice a checkpoint: where to write, once the first
rank has looked whether the disk has room; and whether all have written, whereupon the first rank commits or removes it. So no
rank's failure can leave half a checkpoint, and every rank knows what came of the last one before it begins the next.
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

COPY_SHARE = 0.5  # of the memory that is free now, for the copies of all ranks of a machine
LEAVE_SECONDS = 20.0  # after an error of training, for a checkpoint that is being written
DISK_ERRORS = (OSError, SafetensorError)  # what full disks, missing permissions and failing devices raise


class SaveFailedError(UserError):
    """A checkpoint could not be written, and the run ends on it."""


@dataclass(frozen=True)
class CheckpointSnapshot:
    """What a rank has to write. bytes: about so many; write: does it, in the folder it is given, and returns the paths."""

    bytes: int
    write: Callable[[Path], list[Path]]


@dataclass(frozen=True)
class SaveOutcome:
    """What came of a checkpoint, the same on every rank. problem: '' when it is there."""

    step: int
    problem: str = ""
    path: str = ""
    bytes: int = 0
    stalled: float = 0.0  # seconds for which training stopped, on the rank where it was longest
    seconds: float = 0.0  # from the beginning to the commit
    reason: str = ""  # why it was not written in the background, on the first rank of which that is so

    def line(self) -> str:
        """For the terminal."""
        way = f"stalled {self.stalled:.2f} s, written in {self.seconds:.2f} s"
        return f"saved {self.path} ({self.bytes / 1e6:,.1f} MB; {way}{self.reason and f'; not in the background: {self.reason}'})"


@dataclass
class _Job:
    """A checkpoint under way on this rank."""

    step: int
    is_best: bool
    begun: float
    snapshot: CheckpointSnapshot
    reason: str
    stalled: float | None = None  # not known yet where training waits for all of it
    outcome: SaveOutcome | None = None
    error: BaseException | None = None


class Saver:
    """Saves one rank's part of the run's checkpoints; every rank has one, and calls the same methods at the same steps.

    consensus: of these ranks, used by nothing else; background: whether to write beside training; stop_on_error: raise
    SaveFailedError when a checkpoint cannot be written, instead of training on and trying again with the next one; tell: hears
    what became of each, on the first rank, in the writing thread.
    """

    def __init__(
        self,
        store: CheckpointStore,
        consensus: Consensus,
        background: bool,
        stop_on_error: bool = False,
        tell: Callable[[str], None] = print,
        local_ranks: int = 1,
    ) -> None:
        self.store = store
        self._consensus, self._background, self._stop_on_error = consensus, background, stop_on_error
        self._tell, self._local_ranks = tell, local_ranks
        self._job: _Job | None = None
        self._thread: threading.Thread | None = None
        self._usual_seconds = 0.0

    def reason_to_wait(self, copy_bytes: int) -> str:
        """Why this rank cannot write a copy of so many bytes beside training; '' when it can."""
        if not self._background:
            return "train.async_save is false"
        free = psutil.virtual_memory().available
        wanted = copy_bytes * self._local_ranks
        if wanted <= COPY_SHARE * free:
            return ""
        return f"copies take {wanted / 1e9:.2f} GB of the {free / 1e9:.2f} GB of memory that are free"

    def save(
        self, step: int, snapshot: Callable[[bool], CheckpointSnapshot], is_best: bool = False, *, reason: str = ""
    ) -> float:
        """Begin a checkpoint, when the one before is finished; returns the seconds that it kept training waiting.

        snapshot: gives what to write; its argument says whether training goes on meanwhile. reason: why it must not, on this
        rank; '' where it may.
        """
        begun = time.monotonic()
        self.wait()
        job = _Job(step, is_best, begun, snapshot(not reason), reason)
        self._job = job
        if reason:
            self._run(job)
            self._raise(job)
        else:
            job.stalled = time.monotonic() - begun
            self._thread = threading.Thread(target=self._run, args=(job,), name="checkpoint", daemon=True)
            self._thread.start()
        return time.monotonic() - begun

    @property
    def usual_seconds(self) -> float:
        """How long the last finished checkpoint took, from the beginning to the commit; the same on every rank. 0: none yet."""
        return self._usual_seconds

    def is_writing(self) -> bool:
        """Whether this rank's thread is at work."""
        return self._thread is not None and self._thread.is_alive()

    def wait(self) -> SaveOutcome | None:
        """Wait for the checkpoint that is under way; what came of it or, where none is, of the one before.

        Raises SaveFailedError where a failure is to stop the run, and ConsensusError when the other ranks are gone.
        """
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._job is None:
            return None
        self._raise(self._job)
        outcome = self._job.outcome
        self._usual_seconds = outcome.seconds if outcome and not outcome.problem else self._usual_seconds
        return outcome

    def finish(self) -> None:
        """The end of a run: wait, and see to it that its last checkpoint is there. Raises SaveFailedError when it is not."""
        outcome = self.wait()
        self._consensus.leave()
        if outcome and outcome.problem:
            raise SaveFailedError(
                f"the last checkpoint of the run, of step {outcome.step}, could not be written: {outcome.problem}. {self._fallback()} "
                "Mend that and start the same command again: it trains the steps since then once more."
            )

    def abandon(self, seconds: float = LEAVE_SECONDS) -> None:
        """The end of a run that failed: what is being written gets a little time, then it is left as it is."""
        if self._thread is not None:
            self._thread.join(seconds)
            self._consensus.stop()
            self._thread.join(1.0)

    def _raise(self, job: _Job) -> None:
        if job.error is not None:
            raise job.error
        assert job.outcome is not None
        if job.outcome.problem and self._stop_on_error:
            raise SaveFailedError(
                f"the checkpoint of step {job.step} could not be written: {job.outcome.problem}. {self._fallback()} "
                "Mend that, or train on without it: --train.on_save_error continue."
            )

    def _fallback(self) -> str:
        newest = self.store.newest()
        return f"The newest one is {newest}." if newest else "There is none."

    def _run(self, job: _Job) -> None:
        try:
            job.outcome = self._save(job)
        except BaseException as error:  # raised where the run waits for this checkpoint
            job.error = error

    def _save(self, job: _Job) -> SaveOutcome:
        """Everything but the copying, on every rank."""
        begun = self._consensus.agree(job.snapshot.bytes, lambda sizes: self._begin(job, sum(sizes)))
        if begun["problem"]:
            return SaveOutcome(job.step, begun["problem"])
        written = self._write(job, Path(begun["folder"]))
        done = self._consensus.agree(written, lambda all_written: self._end(job, Path(begun["folder"]), all_written))
        return SaveOutcome(**done)

    def _begin(self, job: _Job, size: int) -> dict[str, str]:
        """On the first rank: where to write."""
        try:
            return {"folder": str(self.store.begin(job.step, size)), "problem": ""}
        except DISK_ERRORS as error:
            return {"folder": "", "problem": self._failed(job, error_reason(error))}

    def _write(self, job: _Job, folder: Path) -> dict[str, Any]:
        """Write this rank's files, and read them again for their hashes."""
        try:
            files = {}
            for path in job.snapshot.write(folder):
                sync(path)
                files[path.relative_to(folder).as_posix()] = asdict(hash_file(path))
            told = {"files": files, "problem": ""}
        except DISK_ERRORS as error:
            told = {"files": {}, "problem": error_reason(error)}
        stalled = job.stalled if job.stalled is not None else -1.0
        return {**told, "stalled": stalled, "reason": job.reason}

    def _end(self, job: _Job, staging: Path, written: list[dict[str, Any]]) -> dict[str, Any]:
        """On the first rank: the checkpoint, or nothing of it."""
        problem = next((f"rank {rank}: {told['problem']}" for rank, told in enumerate(written) if told["problem"]), "")
        files = {name: FileRecord(**record) for told in written for name, record in told["files"].items()}
        path = None
        try:
            path = None if problem else self.store.commit(staging, job.step, files, job.is_best)
        except DISK_ERRORS as error:
            problem = error_reason(error)
        if path is None:
            self.store.abandon(staging)
            return asdict(SaveOutcome(job.step, self._failed(job, problem)))
        seconds = time.monotonic() - job.begun
        stalled = max(seconds if told["stalled"] < 0 else told["stalled"] for told in written)
        reason = next((told["reason"] for told in written if told["reason"]), "")
        size = sum(record.bytes for record in files.values())
        outcome = SaveOutcome(job.step, "", str(path), size, stalled, seconds, reason)
        self._tell(outcome.line())
        try:
            self.store.tidy(path)
        except OSError as error:
            self._tell(f"WARNING: superfluous checkpoints could not be removed: {error_reason(error)}")
        return asdict(outcome)

    def _failed(self, job: _Job, problem: str) -> str:
        """Say so, on the first rank."""
        self._tell(
            f"WARNING: no checkpoint of step {job.step}: {problem}. {self._fallback()} "
            + ("" if self._stop_on_error else "Training goes on, and the next one is tried when it is due.")
        )
        return problem


def error_reason(error: BaseException) -> str:
    """Reason and place of an error of the disk, in a line."""
    if isinstance(error, OSError) and error.strerror:
        return f"{error.strerror}{f' ({error.filename})' if error.filename else ''}"
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
