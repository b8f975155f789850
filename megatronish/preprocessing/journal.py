"""The unfinished output: committed units appended in order, a journal line after each, so that a killed run can resume.

The folder `.NAME.unfinished/` next to the output holds `plan.json` (options and inputs), for each key the tokens and document
lengths so far, and `journal.jsonl`. A line holds the hashes of what its unit appended; resuming checks them all, so neither
a torn write nor a lost page survives, and truncates the files after the last valid unit.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import xxhash

from megatronish.data.readers.inputs import TextSource
from megatronish.data.readers.records import MAX_RECORDED_REJECTS
from megatronish.errors import DataError
from megatronish.files import write_atomic
from megatronish.preprocessing.encoding import EncodedShard, UnitResult, shard_paths
from megatronish.preprocessing.units import WorkUnit

COPY_BYTES = 1 << 20
LOCK_SECONDS = 20.0
COUNTED = ("blank_lines", "rejected", "replaced", "duplicate_keys", "long_documents")


@dataclass
class CommittedUnits:
    """Totals of the committed units: per key tokens and shard hashes, counts of reading, the first rejects."""

    units: int = 0
    pieces: int = 0
    stored: int = 0
    totals: list[EncodedShard] = field(default_factory=list)
    hashes: list[list[str]] = field(default_factory=list)
    records: dict[int, int] = field(default_factory=dict)
    counts: dict[str, int] = field(default_factory=lambda: dict.fromkeys(COUNTED, 0))
    rejects: list[dict[str, str]] = field(default_factory=list)


class UnfinishedOutput:
    """The folder of an unfinished output, locked while it is open. `begin` or `resume` comes first."""

    def __init__(self, folder: Path, keys: int, sources: Sequence[TextSource]) -> None:
        self.folder = folder
        self.state = CommittedUnits(totals=[EncodedShard() for _ in range(keys)], hashes=[[] for _ in range(keys)])
        self._sources = list(sources)
        self._lock = _locked(folder)
        self._files: list[tuple[BinaryIO, BinaryIO]] = []
        self.digests = [xxhash.xxh3_128() for _ in range(keys)]
        self._journal: BinaryIO | None = None

    @staticmethod
    def folder_of(output_prefix: str) -> Path:
        """The folder of the unfinished output of a prefix."""
        prefix = Path(output_prefix)
        return prefix.parent / f".{prefix.name}.unfinished"

    def begin(self, plan: dict[str, Any]) -> None:
        """Starts from nothing, deleting an earlier unfinished output."""
        for path in self.folder.iterdir():
            if path.name != "lock":
                path.unlink()
        write_atomic(self.folder / "plan.json", json.dumps(plan, indent=1))
        self._open()

    def resume(self, plan: dict[str, Any]) -> None:
        """Resumes after the last valid unit whose inputs have not changed. Raises DataError for another plan."""
        earlier = read_plan(self.folder)
        if earlier is None:
            self.begin(plan)
            return
        compare_plans(earlier, plan)
        unchanged = _common(earlier["inputs"], plan["inputs"])
        if plan["options"]["train_tokenizer"] and earlier["inputs"] != plan["inputs"]:
            raise DataError(
                "--resume: the input has changed, and the tokenizer was trained on it; --overwrite starts again"
            )
        for path in self.folder.iterdir():
            if path.name.startswith(("shard-", "spool-")):
                path.unlink()
        lines = list(_journal_lines(self.folder / "journal.jsonl"))
        if unchanged < max(len(earlier["inputs"]), len(plan["inputs"])):
            # The end of the last of these units may depend on the next input, which changed: that unit is encoded again.
            lines = [line for line in lines if line["last_source"] < unchanged][:-1]
            write_atomic(self.folder / "plan.json", json.dumps(plan, indent=1))
        kept = 0
        with contextlib.ExitStack() as stack:
            paths = [self._paths(key) for key in range(len(self.digests))]
            files: list[list[BinaryIO]] = [[stack.enter_context(open(path, "a+b")) for path in pair] for pair in paths]
            for pair in files:
                for file in pair:
                    file.seek(0)
            for line in lines:
                if not self._verify(line, files):
                    break
                self._add(line)
                kept += 1
        for key, total in enumerate(self.state.totals):
            width = plan["itemsize"]
            os.truncate(self._paths(key)[0], total.tokens * width)
            os.truncate(self._paths(key)[1], total.documents * 4)
        write_atomic(self.folder / "journal.jsonl", "".join(json.dumps(line) + "\n" for line in lines[:kept]))
        self._open()

    def _verify(self, line: dict[str, Any], files: list[list[BinaryIO]]) -> bool:
        """Reads what a unit appended; extends the digests of the outputs if it is as recorded."""
        digests = [digest.copy() for digest in self.digests]
        for shard, (tokens, lengths), digest, size in zip(line["shards"], files, digests, line["bytes"], strict=True):
            if _hash_of(tokens, size, digest) != shard["hash"]:
                return False
            if _hash_of(lengths, shard["documents"] * 4) != shard["lengths_hash"]:
                return False
        self.digests = digests
        return True

    def _paths(self, key: int) -> tuple[Path, Path]:
        return self.folder / f"output-{key}.bin", self.folder / f"output-{key}.len"

    def _open(self) -> None:
        for key in range(len(self.digests)):
            tokens, lengths = self._paths(key)
            self._files.append((_appending(tokens), _appending(lengths)))
        self._journal = _appending(self.folder / "journal.jsonl")

    def commit(self, unit: WorkUnit, result: UnitResult) -> None:
        """Appends a unit's shards, then its line, then deletes its files. Raises OSError when the disk is full."""
        assert self._journal is not None and unit.index == self.state.units
        sizes = []
        for key, (shard, (tokens, lengths)) in enumerate(zip(result.shards, self._files, strict=True)):
            source, source_lengths = shard_paths(self.folder, unit.index, key)
            sizes.append(source.stat().st_size)
            copied = _append(source, tokens, self.digests[key])
            if (copied, _append(source_lengths, lengths)) != (shard.hash, shard.lengths_hash):
                raise OSError(5, "a shard does not read back as it was written", str(source))
        line = self._line(unit, result, sizes)
        self._journal.write(json.dumps(line).encode() + b"\n")
        self._journal.flush()
        self._add(line)
        for key in range(len(result.shards)):
            for path in shard_paths(self.folder, unit.index, key):
                path.unlink()
        for piece in unit.pieces:
            if piece.spooled:
                Path(piece.path).unlink()

    def _line(self, unit: WorkUnit, result: UnitResult, sizes: list[int]) -> dict[str, Any]:
        rejects = [{"place": self.place(source, number), "reason": reason} for source, number, reason in result.rejects]
        return {
            "unit": unit.index,
            "pieces": unit.pieces_before + len(unit.pieces),
            "last_source": unit.pieces[-1].source,
            "stored": unit.stored,
            "shards": [asdict(shard) for shard in result.shards],
            "bytes": sizes,
            "records": [[source, count] for source, count in result.records.items()],
            "counts": {name: getattr(result.counts, name) for name in COUNTED[:-1]}
            | {"long_documents": result.long_documents},
            "rejects": rejects,
        }

    def place(self, source: int, number: int) -> str:
        """Where a record is, by its number within the unit that follows the committed ones."""
        origin = self._sources[source]
        return origin.place(number if origin.format == "text" else number + self.state.records.get(source, 0))

    def _add(self, line: dict[str, Any]) -> None:
        state = self.state
        state.units, state.pieces = line["unit"] + 1, line["pieces"]
        state.stored += line["stored"]
        for total, hashes, shard in zip(state.totals, state.hashes, line["shards"], strict=True):
            for name in ("documents", "tokens", "text_bytes", "empty", "unknown"):
                setattr(total, name, getattr(total, name) + shard[name])
            hashes.append(shard["hash"])
        for source, count in line["records"]:
            state.records[source] = state.records.get(source, 0) + count
        for name in COUNTED:
            state.counts[name] += line["counts"][name]
        room = MAX_RECORDED_REJECTS - len(state.rejects)
        state.rejects += line["rejects"][:room]

    def finish(self) -> list[tuple[Path, Path]]:
        """Syncs and closes the outputs; returns the files of tokens and lengths of each key."""
        for pair in self._files:
            for file in pair:
                file.flush()
                os.fsync(file.fileno())
        self._close_files()
        return [self._paths(key) for key in range(len(self.digests))]

    def _close_files(self) -> None:
        for pair in self._files:
            for file in pair:
                with contextlib.suppress(OSError):  # a full disk: what was buffered is not in the journal either
                    file.close()
        self._files = []
        if self._journal is not None:
            with contextlib.suppress(OSError):
                self._journal.close()
            self._journal = None

    def close(self, keep: bool) -> None:
        """Unlocks the folder and, unless `keep`, deletes it."""
        self._close_files()
        if not keep:
            shutil.rmtree(self.folder, ignore_errors=True)
        self._lock.close()


def read_plan(folder: Path) -> dict[str, Any] | None:
    """The plan of an unfinished run, None if there is none."""
    try:
        plan = json.loads((folder / "plan.json").read_bytes())
    except (FileNotFoundError, NotADirectoryError, ValueError):
        return None
    return plan if isinstance(plan, dict) else None


def compare_plans(earlier: dict[str, Any], now: dict[str, Any]) -> None:
    """Raises DataError if an unfinished run had another plan (other inputs are allowed)."""
    changed = [key for key in sorted({*earlier, *now} - {"inputs"}) if earlier.get(key) != now.get(key)]
    if changed:
        was = ", ".join(f"{key} was {earlier.get(key)!r}, now {now.get(key)!r}" for key in changed)
        raise DataError(f"--resume: the unfinished run had other options: {was}; --overwrite starts again")


def _common(one: Sequence[Any], other: Sequence[Any]) -> int:
    """The number of equal leading entries."""
    return next((i for i, (a, b) in enumerate(zip(one, other)) if a != b), min(len(one), len(other)))


def _journal_lines(path: Path) -> Iterator[dict[str, Any]]:
    """Complete lines in order, up to a torn one."""
    if not path.exists():
        return
    with open(path, "rb") as file:
        for number, raw in enumerate(file):
            try:
                line = json.loads(raw)
            except ValueError:
                return
            if not raw.endswith(b"\n") or line["unit"] != number:
                return
            yield line


def _appending(path: Path) -> BinaryIO:
    return open(path, "ab")


def _append(source: Path, target: BinaryIO, output_digest: Any = None) -> str:
    digest = xxhash.xxh3_128()
    with open(source, "rb") as file:
        while block := file.read(COPY_BYTES):
            digest.update(block)
            if output_digest is not None:
                output_digest.update(block)
            target.write(block)
    target.flush()
    return digest.hexdigest()


def _hash_of(file: BinaryIO, size: int, output_digest: Any = None) -> str:
    digest = xxhash.xxh3_128()
    while size > 0 and (block := file.read(min(size, COPY_BYTES))):
        size -= len(block)
        digest.update(block)
        if output_digest is not None:
            output_digest.update(block)
    return digest.hexdigest()


def _locked(folder: Path) -> BinaryIO:
    """Takes the folder's lock, which workers inherit: those of a killed run are waited for. Raises DataError."""
    file = open(folder / "lock", "wb")  # noqa: SIM115  # held until `close`
    deadline = time.monotonic() + LOCK_SECONDS
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return file
        except BlockingIOError:
            if time.monotonic() > deadline:
                file.close()
                raise DataError(f"{folder}: another run is writing this output; wait for it, or stop it") from None
            time.sleep(0.1)
