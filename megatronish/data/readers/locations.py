"""Locations of text as users give them: `hf://` data sets, http(s) shards with counts, local files and globs."""

from __future__ import annotations

import glob
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from megatronish.data.readers.hub_names import HubName, parse_hub
from megatronish.data.readers.inputs import (
    HUB,
    SHARD_SUFFIXES,
    STREAMED_SUFFIXES,
    WEB,
    TextSource,
    file_source,
    is_saved_dataset,
    url_sources,
)
from megatronish.errors import DataError


@dataclass(frozen=True)
class TextLocation:
    """What a location resolves to. `keys`: the fields of its documents; `revision`: the commit of a hub data set."""

    name: str
    sources: tuple[TextSource, ...]
    keys: tuple[str, ...] = ("text",)
    licence: str | None = None
    revision: str | None = None


def resolve(location: str) -> TextLocation:
    """The sources of a location, in a fixed order. Raises DataError where there is none, or the hub does not answer."""
    if location.startswith(HUB):
        return _resolve_hub(location, parse_hub(location))
    if location.startswith(WEB):
        return TextLocation(location, tuple(url_sources(location)))
    exact = Path(location).is_file() or is_saved_dataset(location)
    paths = [location] if exact else sorted(glob.glob(location, recursive=True))
    paths = [path for path in paths if is_saved_dataset(path) or path.lower().endswith(STREAMED_SUFFIXES)]
    if not paths:
        raise DataError(f"{location}: no such shard (a path or glob of {', '.join(STREAMED_SUFFIXES)})")
    return TextLocation(location, tuple(map(file_source, paths)))


def _resolve_hub(location: str, wanted: HubName) -> TextLocation:
    from megatronish.data.readers import tables  # imports `datasets`, which takes seconds

    if wanted.url_list is not None:
        revision, lines = tables.read_hub_file(wanted, wanted.url_list.replace("{config}", wanted.config), location)
        urls = [line for line in lines if line.lower().endswith(SHARD_SUFFIXES)]
        sources = [source for url in urls for source in url_sources(url)]
    else:
        found = tables.open_hub(wanted, location)
        revision = found.revision
        sources = [
            TextSource(file, "rows", rows=partial(found.shard_rows, shard)) for shard, file in enumerate(found.files)
        ]
    if not sources:
        raise DataError(f"{location}: no shard at {revision[:12]}; shards end in {', '.join(SHARD_SUFFIXES)}")
    return TextLocation(location, tuple(sources), wanted.keys, wanted.licence, revision)
