"""The unfinished output: committed units appended in order, a journal line after each, so that a killed run goes on.

Beside the output lies `.NAME.unfinished/`: `plan.json` (what is being made of what), for each key the tokens and document
lengths so far, and `journal.jsonl`. A line holds the hashes of what its unit appended; going on checks them all, so
neither a torn write nor a lost page survives, and cuts the files after the last good unit.
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

from megatronish.data.readers.documents import MAX_RECORDED_REJECTS
from megatronish.errors import DataError
from megatronish.files import write_atomic
from megatronish.preprocessing.encoding import Shard, UnitResult, shard_paths
from megatronish.preprocessing.units import Unit

COPY_BYTES = 1 << 20
LOCK_SECONDS = 20.0
COUNTED = ("blank_lines", "rejected", "replaced", "duplicate_keys", "long_documents")


@dataclass
class Progressed:
    """What the committed units add up to: per key totals and shard hashes, counts of reading, the first rejects."""

    units: int = 0
    pieces: int = 0
    stored: int = 0
    totals: list[Shard] = field(default_factory=list)
    hashes: list[list[str]] = field(default_factory=list)
    records: dict[int, int] = field(default_factory=dict)
    counts: dict[str, int] = field(default_factory=lambda: dict.fromkeys(COUNTED, 0))
    rejects: list[dict[str, str]] = field(default_factory=list)


class Staging:
    """The folder of an unfinished output, locked while it is open. Make it with `create` or `resume`."""

    def __init__(self, folder: Path, keys: int, names: Sequence[Any]) -> None:
        self.folder = folder
        self.state = Progressed(totals=[Shard() for _ in range(keys)], hashes=[[] for _ in range(keys)])
        self._names = list(names)
        self._lock = _locked(folder)
        self._files: list[tuple[BinaryIO, BinaryIO]] = []
        self.whole = [xxhash.xxh3_128() for _ in range(keys)]
        self._journal: BinaryIO | None = None

    @staticmethod
    def folder_of(output_prefix: str) -> Path:
        """Where the unfinished output of a prefix lies."""
        prefix = Path(output_prefix)
        return prefix.parent / f".{prefix.name}.unfinished"

    def begin(self, plan: dict[str, Any]) -> None:
        """Starts from nothing: what was there goes."""
        for path in self.folder.iterdir():
            if path.name != "lock":
                path.unlink()
        write_atomic(self.folder / "plan.json", json.dumps(plan, indent=1))
        self._open()

    def resume(self, plan: dict[str, Any]) -> None:
        """Goes on after the last unit that is whole and whose inputs have not changed. Raises DataError for another plan."""
        there = read_plan(self.folder)
        if there is None:
            self.begin(plan)
            return
        compare_plans(there, plan)
        unchanged = _common(there["inputs"], plan["inputs"])
        if plan["options"]["train_tokenizer"] and there["inputs"] != plan["inputs"]:
            raise DataError(
                "--resume: the input has changed, and the tokenizer was trained on it; --overwrite starts anew"
            )
        for path in self.folder.iterdir():
            if path.name.startswith(("shard-", "spool-")):
                path.unlink()
        lines = list(_journal_lines(self.folder / "journal.jsonl"))
        if unchanged < max(len(there["inputs"]), len(plan["inputs"])):
            # Where the last of these units ends may depend on the input after it, which changed: it is done again.
            lines = [line for line in lines if line["last_source"] < unchanged][:-1]
            write_atomic(self.folder / "plan.json", json.dumps(plan, indent=1))
        kept = 0
        with contextlib.ExitStack() as stack:
            paths = [self._paths(key) for key in range(len(self.whole))]
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
        """Reads what a unit appended; extends the whole hash if it is as recorded."""
        wholes = [whole.copy() for whole in self.whole]
        for shard, (tokens, lengths), whole, size in zip(line["shards"], files, wholes, line["bytes"], strict=True):
            if _hash_of(tokens, size, whole) != shard["hash"]:
                return False
            if _hash_of(lengths, shard["documents"] * 4) != shard["lengths_hash"]:
                return False
        self.whole = wholes
        return True

    def _paths(self, key: int) -> tuple[Path, Path]:
        return self.folder / f"output-{key}.bin", self.folder / f"output-{key}.len"

    def _open(self) -> None:
        for key in range(len(self.whole)):
            tokens, lengths = self._paths(key)
            self._files.append((_appending(tokens), _appending(lengths)))
        self._journal = _appending(self.folder / "journal.jsonl")

    def commit(self, unit: Unit, result: UnitResult) -> None:
        """Appends a unit's shards, then its line, then deletes its files. Raises OSError when the disk is full."""
        assert self._journal is not None and unit.index == self.state.units
        sizes = []
        for key, (shard, (tokens, lengths)) in enumerate(zip(result.shards, self._files, strict=True)):
            source, source_lengths = shard_paths(self.folder, unit.index, key)
            sizes.append(source.stat().st_size)
            copied = _append(source, tokens, self.whole[key])
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

    def _line(self, unit: Unit, result: UnitResult, sizes: list[int]) -> dict[str, Any]:
        rejects = [{"place": self.place(source, number), "reason": reason} for source, number, reason in result.rejects]
        return {
            "unit": unit.index,
            "pieces": unit.pieces_before + len(unit.pieces),
            "last_source": unit.pieces[-1].source,
            "stored": unit.stored,
            "shards": [asdict(shard) for shard in result.shards],
            "bytes": sizes,
            "records": [[source, count] for source, count in result.records.items()],
            "counts": {name: getattr(result, name) for name in COUNTED},
            "rejects": rejects,
        }

    def place(self, source: int, number: int) -> str:
        """Where a record is, by its number within the unit that follows the committed ones."""
        origin = self._names[source]
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
        """Closes the outputs, on the disk; returns the files of tokens and lengths of each key."""
        for pair in self._files:
            for file in pair:
                file.flush()
                os.fsync(file.fileno())
        self._close_files()
        return [self._paths(key) for key in range(len(self.whole))]

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
        """Lets go of the folder; it stays only if asked to."""
        self._close_files()
        if not keep:
            shutil.rmtree(self.folder, ignore_errors=True)
        self._lock.close()


def read_plan(folder: Path) -> dict[str, Any] | None:
    """What an unfinished run was making, None if there is none (or it had not got as far)."""
    try:
        plan = json.loads((folder / "plan.json").read_bytes())
    except (FileNotFoundError, NotADirectoryError, ValueError):
        return None
    return plan if isinstance(plan, dict) else None


def compare_plans(there: dict[str, Any], now: dict[str, Any]) -> None:
    """Raises DataError if an unfinished run was making something else (other inputs apart)."""
    changed = [key for key in sorted({*there, *now} - {"inputs"}) if there.get(key) != now.get(key)]
    if changed:
        was = ", ".join(f"{key} was {there.get(key)!r}, now {now.get(key)!r}" for key in changed)
        raise DataError(f"--resume: the unfinished run was another one: {was}; --overwrite starts anew")


def _common(one: Sequence[Any], other: Sequence[Any]) -> int:
    """How many leading entries are equal."""
    return next((i for i, (a, b) in enumerate(zip(one, other)) if a != b), min(len(one), len(other)))


def _journal_lines(path: Path) -> Iterator[dict[str, Any]]:
    """Whole lines in order; a torn one ends it."""
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


def _append(source: Path, target: BinaryIO, whole: Any = None) -> str:
    digest = xxhash.xxh3_128()
    with open(source, "rb") as file:
        while block := file.read(COPY_BYTES):
            digest.update(block)
            if whole is not None:
                whole.update(block)
            target.write(block)
    target.flush()
    return digest.hexdigest()


def _hash_of(file: BinaryIO, size: int, whole: Any = None) -> str:
    digest = xxhash.xxh3_128()
    while size > 0 and (block := file.read(min(size, COPY_BYTES))):
        size -= len(block)
        digest.update(block)
        if whole is not None:
            whole.update(block)
    return digest.hexdigest()


def _locked(folder: Path) -> BinaryIO:
    """Holds the folder's lock, inherited by the workers: those of a killed run are waited for. Raises DataError."""
    file = open(folder / "lock", "wb")  # noqa: SIM115  # held until `close`
    deadline = time.monotonic() + LOCK_SECONDS
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return file
        except BlockingIOError:
            if time.monotonic() > deadline:
                file.close()
                raise DataError(f"{folder}: another run is writing this output; wait for it, or end it") from None
            time.sleep(0.1)
