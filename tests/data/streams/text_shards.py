"""Shards of text that tests stream, in every format, and what is read from them."""

from __future__ import annotations

import gzip
import itertools
import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatronish.data.readers.remote import Retry
from megatronish.data.streams.streaming import PackedReader, StreamOptions

EOD = 256  # of the byte tokenizer
QUICK = Retry(attempts=25, first_wait=0.001, longest_wait=0.004, timeout=5.0)
FORMATS = ("jsonl", "jsonl.gz", "jsonl.zst", "parquet")
ROOT = Path(__file__).resolve().parents[3]


def write_shard(path: Path, texts: Sequence[str], key: str = "text") -> Path:
    """One shard in the format of its suffix."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".parquet":
        pyarrow = pytest.importorskip("pyarrow")
        from pyarrow import parquet

        table = pyarrow.table({"id": list(range(len(texts))), key: list(texts)})
        parquet.write_table(table, path, row_group_size=4)
        return path
    lines = "".join(json.dumps({key: text, "other": 1}) + "\n" for text in texts).encode()
    if path.suffix == ".gz":
        lines = gzip.compress(lines, mtime=0)
    elif path.suffix == ".zst":
        lines = pytest.importorskip("zstandard").ZstdCompressor().compress(lines)
    path.write_bytes(lines)
    return path


def make_texts(shard: int, count: int) -> list[str]:
    """Distinct documents of distinct lengths, some not ASCII."""
    return [f"shard {shard} document {i} " + "ä¬x"[i % 3] * (7 * i % 41) for i in range(count)]


def make_corpus(folder: Path, suffix: str, counts: Sequence[int] = (9, 17, 5)) -> Counter[str]:
    """Shards part-0, part-1, ... with the given numbers of documents; returns all texts."""
    everything: Counter[str] = Counter()
    for shard, count in enumerate(counts):
        texts = make_texts(shard, count)
        write_shard(folder / f"part-{shard}.{suffix}", texts)
        everything.update(texts)
    return everything


def options(**changes: Any) -> StreamOptions:
    return StreamOptions(
        **{"tokenizer": "bytes", "seq_length": 16, "seed": 3, "buffer_documents": 6, "retry": QUICK} | changes
    )


def samples(reader: PackedReader, count: int) -> list[tuple[list[int], list[int]]]:
    return [(tokens.tolist(), starts.tolist()) for tokens, starts in (reader.next_sample() for _ in range(count))]


def documents_of(reader: PackedReader, count: int) -> list[str]:
    """The first `count` documents, put together again from samples; checks overlap and document starts."""
    stream: list[int] = []
    begins: set[int] = set()
    while stream.count(EOD) <= count:
        tokens, starts = reader.next_sample()
        assert tokens.dtype == np.int64 and starts[0] == 0
        if stream:
            assert stream[-1] == tokens[0]
            stream.pop()
        begins |= {len(stream) + int(start) for start in starts[1:]}
        stream.extend(tokens.tolist())
    ends = [position for position, token in enumerate(stream) if token == EOD]
    assert {end + 1 for end in ends if end + 1 < len(stream)} == begins
    edges = [-1, *ends[:count]]
    return [bytes(stream[a + 1 : b]).decode() for a, b in itertools.pairwise(edges)]
