"""Inputs: files by suffix, local or on the web, and tables that the package `datasets` reads."""

from __future__ import annotations

import contextlib
import glob
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

from megatronish.data.readers.compression import COMPRESSED_SUFFIXES
from megatronish.errors import DataError

FORMATS = {".jsonl": "jsonl", ".ndjson": "jsonl", ".json": "jsonl", ".parquet": "parquet"}
TABLE_SUFFIXES = (".csv", ".tsv", ".arrow", ".tar")  # read by `datasets`, .csv and .tsv also compressed
UNREADABLE_SUFFIXES = (".bz2", ".xz", ".zip", ".tgz", ".bin", ".idx", ".npy")
# What can be streamed; of URLs the JSON lines and Parquet.
SHARD_SUFFIXES = (
    *(f"{suffix}{packed}" for suffix in (".jsonl", ".ndjson", ".json") for packed in ("", ".gz", ".zst")),
    ".parquet",
)
STREAMED_SUFFIXES = (*SHARD_SUFFIXES, *TABLE_SUFFIXES, ".csv.gz", ".tsv.gz", ".csv.zst", ".tsv.zst")

HUB = "hf://"
WEB = ("http://", "https://")

Row = Mapping[str, Any]
Rows = Callable[[Sequence[str], int], Iterator[Row]]  # (keys, start): the rows from number `start` on, with these keys


@dataclass(frozen=True)
class TextSource:
    """One input: a file, local or on the web, or a table of `rows`.

    format: jsonl, text, parquet or rows. compression: "", gzip or zstd. size (bytes as stored, 0 where not known) and
    mtime_ns show a resumed run whether the input is still the same.
    """

    location: str
    format: str
    compression: str = ""
    size: int = 0
    mtime_ns: int = 0
    rows: Rows | None = field(default=None, repr=False)

    @property
    def remote(self) -> bool:
        """Whether it is read over http(s)."""
        return self.location.startswith(WEB)

    @property
    def name(self) -> str:
        """The location without a query, which may hold a signature."""
        return self.location.split("?")[0] if self.remote else self.location

    @property
    def signature(self) -> list[Any]:
        """What must be equal for two runs to have read the same."""
        return [self.name, self.size, self.mtime_ns]

    def place(self, number: int) -> str:
        """Where record `number` is (line or row from 1; for text the byte where it begins, -1 for the entire file)."""
        if self.format == "text":
            return self.name if number < 0 else f"{self.name}, byte {number}"
        return f"{self.name}, {'line' if self.format == 'jsonl' else 'row'} {number}"

    @contextlib.contextmanager
    def open(self, retry: Any = None) -> Iterator[Any]:
        """The stored bytes (None for rows, which are not opened here). retry: a `Retry` for remote files. Raises DataError."""
        if self.format == "rows":
            yield None
        elif self.remote:
            from megatronish.data.readers.remote import RemoteFile, Retry

            with RemoteFile(self.location, retry or Retry(), ranged=self.format == "parquet") as remote:
                yield remote
        else:
            with _open_local(self.location) as local:
                yield local


def _open_local(path: str) -> BinaryIO:
    try:
        return open(path, "rb")
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from None


def is_remote(spec: str) -> bool:
    """Whether an input is not a path on this machine."""
    return spec.startswith((HUB, *WEB))


def is_saved_dataset(path: str | Path) -> bool:
    """Whether a folder was written by `datasets`' save_to_disk."""
    return Path(path, "dataset_info.json").is_file() and Path(path, "state.json").is_file()


def is_stream(location: str) -> bool:
    """Whether a location is streamed text rather than the prefix of an indexed dataset."""
    return is_remote(location) or location.lower().endswith(STREAMED_SUFFIXES) or is_saved_dataset(location)


def find_inputs(patterns: Sequence[str]) -> list[TextSource]:
    """Files of the given paths and globs (`**` is recursive), globs sorted, each file once. Raises DataError."""
    found: dict[Path, Path] = {}
    for pattern in patterns:
        path = Path(pattern)
        if path.exists():
            matches = [path]
        else:
            names = sorted(glob.glob(pattern, recursive=True))
            matches = [Path(name) for name in names if not os.path.isdir(name) or is_saved_dataset(name)]
            if not matches:
                kind = "no file matches" if glob.has_magic(pattern) else "no such file:"
                raise DataError(f"--input: {kind} {pattern}")
        for match in matches:
            if match.is_dir() and not is_saved_dataset(match):
                raise DataError(f"--input {_refused_folder(match)}")
            found.setdefault(match.resolve(), match)
    return [file_source(match) for match in found.values()]


def _refused_folder(path: Path) -> str:
    if (path / "dataset_dict.json").is_file():
        return f"{path} holds several splits; give one of {sorted(map(str, path.glob('*/')))}"
    return f"{path} is a folder; give a pattern such as '{path}/**/*.txt' (quoted)"


def file_source(path: Path | str) -> TextSource:
    """The source that a path describes. Raises DataError for what is not read."""
    path = Path(path)
    suffix = path.suffix.lower()
    compression = COMPRESSED_SUFFIXES.get(suffix, "")
    inner = path.with_suffix("").suffix.lower() if compression else suffix
    if suffix in UNREADABLE_SUFFIXES or (inner == ".tar" and compression):
        raise DataError(
            f"--input {path}: {suffix} files are not read; convert to parquet, text or JSON lines (plain, .gz or .zst)"
        )
    if not os.access(path, os.R_OK):
        raise DataError(f"--input {path}: no permission to read it")
    if compression and inner in (".parquet", ".arrow"):
        raise DataError(f"--input {path}: {inner} is compressed inside; unpack the {suffix} first")
    state = path.stat()
    if inner in TABLE_SUFFIXES or path.is_dir():
        return TextSource(str(path), "rows", "", state.st_size, state.st_mtime_ns, partial(_table_rows, str(path)))
    return TextSource(str(path), FORMATS.get(inner, "text"), compression, state.st_size, state.st_mtime_ns)


def _table_rows(path: str, keys: Sequence[str], start: int) -> Iterator[Row]:
    from megatronish.data.readers import tables  # imports `datasets`, which takes seconds

    return tables.read_rows(path, tables.open_table(path), keys, start)


def url_sources(location: str) -> list[TextSource]:
    """The shards of an http(s) location, whose `{a..b}` count up. Raises DataError for another kind of file."""
    lower = location.split("?")[0].lower()
    if not lower.endswith(SHARD_SUFFIXES):
        raise DataError(f"{location}: a shard ends in one of {', '.join(SHARD_SUFFIXES)}")
    compression = COMPRESSED_SUFFIXES.get(Path(lower).suffix, "")
    kind = "parquet" if lower.endswith(".parquet") else "jsonl"
    return [TextSource(url, kind, compression) for url in expand_counts(location)]


def expand_counts(location: str) -> list[str]:
    """`x{08..10}` as x08, x09, x10; several braces multiply. Raises DataError for a range that decreases."""
    found = re.search(r"\{(\d+)\.\.(\d+)\}", location)
    if found is None:
        return [location]
    first, last = int(found[1]), int(found[2])
    if last < first:
        raise DataError(f"{location}: {found[0]} decreases")
    before, after = location[: found.start()], location[found.end() :]
    numbers = [f"{number:0{len(found[1])}d}" for number in range(first, last + 1)]
    return [expanded for number in numbers for expanded in expand_counts(f"{before}{number}{after}")]


def check_keys(sources: Sequence[TextSource], keys: Sequence[str]) -> None:
    """Refuses several keys for text, which has one. Raises DataError."""
    for source in sources:
        if len(keys) > 1 and source.format == "text":
            raise DataError(f"--json-keys {' '.join(keys)}: {source.name} is not JSON lines, so has a single text")
