"""Rows of a Hugging Face data set, streamed: `hf://NAME[:SPLIT]` or `hf://NAME:CONFIG:SPLIT`; NAME may be a local folder."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from megatronish.data.errors import DataError
from megatronish.data.inputs import Source

PREFIX = "hf://"
SPLIT_NAMES = re.compile(r"(train|validation|valid|val|test|dev|all)\b.*")


def hub_source(spec: str) -> Source:
    """The source of `hf://...`; a single suffix that is not a split's name is taken as a configuration, split train."""
    name, *rest = spec.removeprefix(PREFIX).split(":")
    if not name or len(rest) > 2 or not all(rest):
        raise DataError(f"--input {spec}: write hf://NAME, hf://NAME:SPLIT or hf://NAME:CONFIG:SPLIT")
    config, split = None, "train"
    if len(rest) == 2:
        config, split = rest
    elif rest and SPLIT_NAMES.fullmatch(rest[0]):
        split = rest[0]
    elif rest:
        config = rest[0]
    return Source(spec, "rows", rows=lambda: _rows(spec, name, config, split))


def _rows(spec: str, name: str, config: str | None, split: str) -> Iterator[Mapping[str, Any]]:
    try:
        import datasets
    except ImportError:
        raise DataError(f"--input {spec} needs the package datasets: pip install 'megatronish[data]'") from None
    datasets.disable_progress_bars()
    try:
        stream = datasets.load_dataset(name, config, split=split, streaming=True)
    except Exception as error:  # the library raises its own and its transports' errors, of many kinds
        raise DataError(f"--input {spec}: cannot be opened: {type(error).__name__}: {_first_line(error)}") from None
    rows = iter(stream)
    while True:
        try:
            row = next(rows)
        except StopIteration:
            return
        except Exception as error:  # as above, while reading
            raise DataError(
                f"--input {spec}: cannot be read on: {type(error).__name__}: {_first_line(error)}"
            ) from None
        yield row


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [""])[0][:300]
