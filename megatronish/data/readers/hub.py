"""Inputs of preprocessing that lie elsewhere: `hf://` data sets and http(s) shards, found and read as in streaming."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from megatronish.data.readers.inputs import Row, Source, mapping_of
from megatronish.data.readers.remote import Retry
from megatronish.data.readers.shards import Fields, ShardReader
from megatronish.data.readers.sources import Location, resolve
from megatronish.errors import DataError

DEFAULT_KEYS = ("text",)


def remote_source(
    spec: str, keys: Sequence[str], say: Callable[[str], None], retry: Retry | None = None, endpoint: str | None = None
) -> Source:
    """The shards of `spec` as one source, in order; its name holds the commit of a hub data set.

    keys: of --json-keys. Left at "text", a data set whose fields are known by name gives these, joined by a blank line.
    Raises DataError for what cannot be found or reached.
    """
    retry = retry or Retry()
    try:
        location = resolve(spec, retry, endpoint)
    except DataError as error:
        raise DataError(f"--input {error}") from None
    name = f"{spec} at {location.revision[:12]}" if location.revision else spec
    say(f"{name}: {len(location.shards):,} shards{f'; licence: {location.licence}' if location.licence else ''}")
    joined = tuple(keys) == DEFAULT_KEYS and location.keys != DEFAULT_KEYS
    fields = Fields(location.keys if joined else tuple(keys))
    return Source(name, "rows", rows=lambda: _rows(location, fields, joined, retry))


def _rows(location: Location, fields: Fields, joined: bool, retry: Retry) -> Iterator[Row]:
    for shard in location.shards:
        for row in ShardReader(shard, fields, retry).rows():
            record = mapping_of(row) if joined else {}
            whole = joined and all(isinstance(record.get(key), str) for key in fields.keys)
            yield {"text": "\n\n".join(filter(None, (record[key] for key in fields.keys)))} if whole else row
