"""Parquet files, local or remote: row groups by their metadata, and the texts of rows as bytes."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from megatronish.data.readers.records import CHOOSE_KEY
from megatronish.errors import DataError

# Rows decoded at a time: few enough that long documents stay within a worker's memory.
BATCH_ROWS = 256
Values = tuple[bytes | None, ...]  # of a row, undecoded


@dataclass(frozen=True)
class RowGroups:
    """Bytes (uncompressed, of the wanted columns) and number of rows of each row group of a file."""

    sizes: tuple[int, ...]
    rows: tuple[int, ...]


def row_groups(path: str, keys: Sequence[str]) -> RowGroups:
    """Sizes of a file's row groups. Raises DataError for a damaged file, or a column that is missing or not text."""
    with _open(path, path, keys) as file:
        sizes, rows = [], []
        for number in range(file.metadata.num_row_groups):
            group = file.metadata.row_group(number)
            columns = [group.column(i) for i in range(group.num_columns)]
            sizes.append(sum(c.total_uncompressed_size for c in columns if c.path_in_schema.split(".")[0] in keys))
            rows.append(group.num_rows)
    return RowGroups(tuple(sizes), tuple(rows))


def read_row_groups(path: str, first: int, end: int, keys: Sequence[str]) -> Iterator[Values]:
    """The values of each row of row groups first..end-1. Raises DataError for a damaged file."""
    with _open(path, path, keys) as file:
        yield from _values(file, path, range(first, end), keys)


def read_rows(stored: Any, name: str, keys: Sequence[str], start: int) -> Iterator[Values]:
    """The values of each row of an open file from row `start` on; earlier row groups are not read. Raises DataError."""
    with _open(stored, name, keys) as file:
        before = 0
        for number in range(file.metadata.num_row_groups):
            rows = file.metadata.row_group(number).num_rows
            if before + rows > start:
                yield from itertools.islice(_values(file, name, [number], keys), max(0, start - before), None)
            before += rows


def _open(stored: Any, name: str, keys: Sequence[str]) -> Any:
    """A `ParquetFile` of a path or an open file, its columns checked."""
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError:
        raise DataError(f"{name}: reading parquet needs the package pyarrow: pip install 'megatronish[data]'") from None
    buffered = 1 << 20 if isinstance(stored, str) else 0  # a remote file is asked for column chunks as they are
    try:
        file = parquet.ParquetFile(stored, buffer_size=buffered, pre_buffer=False, page_checksum_verification=True)
    except pyarrow.ArrowException as error:
        raise DataError(f"{name}: truncated or corrupt parquet file: {error}") from None
    _check_columns(name, file.schema_arrow, keys)
    return file


def _check_columns(name: str, schema: Any, keys: Sequence[str]) -> None:
    from pyarrow import types

    for key in keys:
        if key not in schema.names:
            raise DataError(f"{name}: no column {key!r}; columns are {sorted(schema.names)}. {CHOOSE_KEY}")
        if schema.names.count(key) > 1:
            raise DataError(f"{name}: column {key!r} comes {schema.names.count(key)} times; rename the other")
        kind = schema.field(key).type
        if types.is_dictionary(kind):
            kind = kind.value_type
        text = (types.is_string, types.is_large_string, types.is_binary, types.is_large_binary, types.is_string_view)
        if not any(check(kind) for check in text):
            raise DataError(f"{name}: column {key!r} holds {kind}, not text. {CHOOSE_KEY}")


def _values(file: Any, name: str, groups: Sequence[int], keys: Sequence[str]) -> Iterator[Values]:
    import pyarrow

    try:
        for batch in file.iter_batches(BATCH_ROWS, row_groups=list(groups), columns=list(keys)):
            yield from zip(*(_as_bytes(batch.column(key)) for key in keys), strict=True)
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"{name}: truncated or corrupt parquet file: {error}") from None


def _as_bytes(column: Any) -> list[bytes | None]:
    import pyarrow

    if pyarrow.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    return column.cast(pyarrow.large_binary()).to_pylist()
