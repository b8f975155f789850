"""Parquet files: what their metadata says, and the texts of a range of row groups as bytes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from megatronish.errors import DataError

# Rows decoded at a time: few enough that long documents stay within a worker's memory.
BATCH_ROWS = 256


@dataclass(frozen=True)
class RowGroups:
    """Bytes (unpacked, of the wanted columns) and number of rows of each row group of a file."""

    sizes: tuple[int, ...]
    rows: tuple[int, ...]


def _open(path: str) -> Any:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError:
        raise DataError(f"{path}: reading parquet needs the package pyarrow: pip install 'megatronish[data]'") from None
    try:
        return parquet.ParquetFile(path, buffer_size=1 << 20, pre_buffer=False, page_checksum_verification=True)
    except pyarrow.ArrowException as error:
        raise DataError(f"{path}: truncated or corrupt parquet file: {error}") from None


def row_groups(path: str, keys: Sequence[str]) -> RowGroups:
    """Sizes of a file's row groups. Raises DataError for a damaged file, or a column that is missing or not text."""
    with _open(path) as file:
        _check_columns(path, file.schema_arrow, keys)
        sizes, rows = [], []
        for number in range(file.metadata.num_row_groups):
            group = file.metadata.row_group(number)
            columns = [group.column(i) for i in range(group.num_columns)]
            sizes.append(sum(c.total_uncompressed_size for c in columns if c.path_in_schema.split(".")[0] in keys))
            rows.append(group.num_rows)
    return RowGroups(tuple(sizes), tuple(rows))


def _check_columns(path: str, schema: Any, keys: Sequence[str]) -> None:
    from pyarrow import types

    for key in keys:
        if key not in schema.names:
            raise DataError(f"{path}: no column {key!r}; columns are {sorted(schema.names)}. Choose with --json-keys")
        if schema.names.count(key) > 1:
            raise DataError(f"{path}: column {key!r} comes {schema.names.count(key)} times; rename the other")
        kind = schema.field(key).type
        if types.is_dictionary(kind):
            kind = kind.value_type
        text = (types.is_string, types.is_large_string, types.is_binary, types.is_large_binary, types.is_string_view)
        if not any(check(kind) for check in text):
            raise DataError(f"{path}: column {key!r} holds {kind}, not text; choose another with --json-keys")


def read_rows(path: str, first: int, end: int, keys: Sequence[str]) -> Iterator[tuple[bytes | None, ...]]:
    """The wanted values, undecoded, of each row of row groups first..end-1. Raises DataError for a damaged file."""
    import pyarrow

    with _open(path) as file:
        try:
            for batch in file.iter_batches(BATCH_ROWS, row_groups=list(range(first, end)), columns=list(keys)):
                yield from zip(*(_as_bytes(batch.column(key)) for key in keys), strict=True)
        except (pyarrow.ArrowException, OSError) as error:
            raise DataError(f"{path}: truncated or corrupt parquet file: {error}") from None


def _as_bytes(column: Any) -> list[bytes | None]:
    import pyarrow

    if pyarrow.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    return column.cast(pyarrow.large_binary()).to_pylist()
