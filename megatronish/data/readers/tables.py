"""Rows by the package `datasets`: data sets of the Hugging Face hub, CSV, TSV, Arrow and WebDataset files, `save_to_disk` folders.

Import this module only where such an input is read: `datasets` takes seconds to import.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatronish.data.readers.hub_names import HubName, parse_hub
from megatronish.data.readers.inputs import HUB, Row, is_saved_dataset
from megatronish.data.readers.records import CHOOSE_KEY
from megatronish.errors import DataError

try:
    import datasets
except ImportError:
    raise DataError(
        "hf://, CSV, Arrow and WebDataset need the package datasets: pip install 'megatronish[data]'"
    ) from None

BATCH_ROWS = 256
TAR_BLOCK = 512
BUILDERS = {".csv": "csv", ".tsv": "csv", ".arrow": "arrow", ".tar": "webdataset", ".parquet": "parquet"}


@dataclass(frozen=True)
class HubDataset:
    """A data set of the hub at one commit, streamed. `files`: its shards, in order, as `hf://datasets/OWNER/NAME@COMMIT/PATH`."""

    dataset: datasets.IterableDataset
    files: tuple[str, ...]

    @property
    def revision(self) -> str:
        """The commit."""
        return self.files[0].removeprefix("hf://datasets/").partition("@")[2].partition("/")[0]

    def shard_rows(self, shard: int, keys: Sequence[str], start: int) -> Iterator[Row]:
        """The rows of a shard from number `start` on, with the given columns."""
        shards = self.dataset.num_shards
        return read_rows(self.files[shard], self.dataset.shard(shards, shard), keys, start)


def open_table(location: str) -> datasets.IterableDataset:
    """The rows of an `hf://` data set, of a file or of a `save_to_disk` folder. CSV columns are text. Raises DataError."""
    if location.startswith(HUB):
        return open_hub(parse_hub(location), location).dataset
    with _explained(location):
        if is_saved_dataset(location):
            return datasets.load_from_disk(location).to_iterable_dataset()
        suffix = next(
            (suffix for suffix in Path(location).suffixes[::-1] if suffix.lower() in BUILDERS), ".json"
        ).lower()
        options: dict[str, Any] = {}
        if suffix == ".tar":
            _check_end(location)
        if suffix in (".csv", ".tsv"):
            options = _csv_options(location, "\t" if suffix == ".tsv" else ",")
        return datasets.load_dataset(
            BUILDERS.get(suffix, "json"), data_files=[location], split="train", streaming=True, **options
        )


def _check_end(path: str) -> None:
    """Refuses a truncated archive, which Python's tarfile takes for a complete one where a member's header is cut."""
    with open(path, "rb") as file:
        file.seek(-min(2 * TAR_BLOCK, Path(path).stat().st_size), 2)
        if file.read() != bytes(2 * TAR_BLOCK):
            raise DataError(f"{path}: truncated or corrupt tar file: the zero blocks at its end are missing")


def _csv_options(path: str, separator: str) -> dict[str, Any]:
    """Every column as text: neither `007` nor `NA` changes."""
    import pandas

    columns = pandas.read_csv(path, sep=separator, nrows=0).columns
    features = datasets.Features({str(name): datasets.Value("string") for name in columns})
    return {"sep": separator, "features": features, "keep_default_na": False}


def open_hub(wanted: HubName, location: str) -> HubDataset:
    """A data set of the hub, its configuration, split and files resolved by `datasets`. Raises DataError."""
    if Path(wanted.repository).is_dir():
        raise DataError(
            f"{location}: `datasets` would read the local folder {wanted.repository} instead of the hub; run in another folder"
        )
    with _explained(location):
        files = wanted.data_files()
        builder = datasets.load_dataset_builder(
            wanted.repository,
            name=None if files else wanted.config or None,
            data_files=files,
            revision=wanted.revision,
        )
        dataset = builder.as_streaming_dataset(split=wanted.split)
        names = tuple(map(str, builder.config.data_files[wanted.split]))
    if len(names) != dataset.num_shards:  # archives of several files: one shard
        raise DataError(
            f"{location}: {len(names)} files make {dataset.num_shards} shards; download it and give its files"
        )
    return HubDataset(dataset, names)


def read_hub_file(wanted: HubName, path: str, location: str) -> tuple[str, list[str]]:
    """The commit of a data set, and the lines of one of its files. Raises DataError."""
    import huggingface_hub

    with _explained(location):
        revision = huggingface_hub.HfApi().dataset_info(wanted.repository, revision=wanted.revision).sha or "main"
        text = huggingface_hub.HfFileSystem().read_text(f"datasets/{wanted.repository}@{revision}/{path}")
    return revision, text.split()


def read_rows(name: str, dataset: datasets.IterableDataset, keys: Sequence[str], start: int) -> Iterator[Row]:
    """Rows from number `start` on, with the given columns; earlier ones are skipped as tables. Raises DataError.

    Bytes become text; those that are not UTF-8 become lone surrogates, which the reader of records reports.
    """
    with _explained(name):
        columns = dataset.column_names or _first_columns(dataset)
        missing = [key for key in keys if columns and key not in columns]
        if missing:
            raise DataError(f"{name}: no column {missing[0]!r}; columns are {sorted(columns)}. {CHOOSE_KEY}")
        before = 0
        for table in dataset.select_columns(list(keys)).with_format("arrow").iter(batch_size=BATCH_ROWS):
            skipped = max(0, start - before)
            before += len(table)
            if skipped < len(table):
                yield from map(_decoded, table.slice(skipped).to_pylist())


def _first_columns(dataset: datasets.IterableDataset) -> list[str]:
    first: Mapping[str, Any] = next(iter(dataset), {})
    return list(first)


def _decoded(row: dict[str, Any]) -> dict[str, Any]:
    return {
        key: value.decode("utf-8", "surrogateescape") if isinstance(value, bytes) else value
        for key, value in row.items()
    }


@contextlib.contextmanager
def _explained(name: str) -> Iterator[None]:
    """Turns what `datasets` and the libraries under it raise into a DataError with the input's name."""
    try:
        yield
    except (DataError, GeneratorExit):
        raise
    except Exception as error:  # each format has errors of its own, without a common base
        cause = error.__cause__ or error
        raise DataError(f"{name}: cannot be read: {type(cause).__name__}: {cause}") from error
