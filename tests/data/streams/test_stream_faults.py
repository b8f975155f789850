"""Streaming through the faults of networks, servers and shards."""

from __future__ import annotations

import itertools
import time
from pathlib import Path

import pytest

from megatronish.data.readers.remote import Retry
from megatronish.data.streams.streaming import open_stream
from megatronish.errors import DataError
from tests.data.streams.shard_server import STALL_SECONDS, shard_server
from tests.data.streams.text_shards import (
    FORMATS,
    documents_of,
    make_corpus,
    make_texts,
    options,
    samples,
    write_shard,
)


@pytest.mark.parametrize("suffix", FORMATS)
def test_faults_of_the_network_change_nothing(tmp_path: Path, suffix: str) -> None:
    """500, 503, reset at once, reset midway and truncated bodies, on two requests of five."""
    make_corpus(tmp_path, suffix, (60, 80))
    with shard_server(tmp_path) as (url, behaviour):
        stream = open_stream(f"{url}/part-{{0..1}}.{suffix}", options())
        calm = samples(stream.open(0, 1), 300)
        quiet_requests = len(behaviour.requests)
        behaviour.faults = 0.4
        assert samples(stream.open(0, 1), 300) == calm
        assert len(behaviour.requests) > 1.3 * (2 * quiet_requests - quiet_requests), "no fault was met"
        reader = stream.open(0, 1)
        found = samples(reader, 150)
        assert found + samples(stream.open(0, 1, reader.state()), 150) == calm


def test_a_large_body_cut_many_times_is_read_once_through(tmp_path: Path) -> None:
    """Each retry asks for the bytes after the last one received, and nothing is read twice."""
    texts = [f"{i} " + "x" * 20_000 for i in range(60)]
    write_shard(tmp_path / "big.jsonl", texts)
    size = (tmp_path / "big.jsonl").stat().st_size
    with shard_server(tmp_path, faults=0.8, kinds=("truncate", "reset later")) as (url, behaviour):
        stream = open_stream(f"{url}/big.jsonl", options(seq_length=4000, buffer_documents=100))
        assert sorted(documents_of(stream.open(0, 1), 60)) == sorted(texts)
        offsets = [int(asked.split("=")[1].rstrip("-")) if asked else 0 for _, asked, _ in behaviour.requests]
        assert sum(0 < offset < size for offset in offsets) >= 2, "the body was never cut"
        # It goes back only where a new epoch begins: the window after the 60 documents is of the next one.
        assert sum(later < offset for offset, later in itertools.pairwise(offsets)) <= 1


def test_a_connection_that_falls_silent(tmp_path: Path) -> None:
    """A body that stops coming is dropped after the timeout and asked for again from where it stopped."""
    make_corpus(tmp_path, "jsonl", (40,))
    retry = Retry(attempts=25, first_wait=0.001, longest_wait=0.004, timeout=STALL_SECONDS / 5)
    with shard_server(tmp_path) as (url, behaviour):
        stream = open_stream(f"{url}/part-0.jsonl", options(retry=retry))
        calm = samples(stream.open(0, 1), 40)
        behaviour.faults, behaviour.kinds = 0.9, ("stall",)
        assert samples(stream.open(0, 1), 40) == calm
        assert any(asked for _, asked, _ in behaviour.requests), "nothing was asked for again"


def test_a_server_without_ranges(tmp_path: Path) -> None:
    """JSON lines are read past what is known already; Parquet cannot be."""
    make_corpus(tmp_path, "jsonl", (30,))
    write_shard(tmp_path / "p.parquet", make_texts(0, 30))
    with shard_server(tmp_path, ranges=False) as (url, behaviour):
        stream = open_stream(f"{url}/part-0.jsonl", options())
        reader = stream.open(0, 1)
        found = samples(reader, 20)
        state = reader.state()
        assert state["byte"] > 0
        behaviour.faults, behaviour.kinds = 0.5, ("truncate",)
        assert found + samples(stream.open(0, 1, state), 20) == samples(stream.open(0, 1), 40)
        behaviour.faults = 0.0
        with pytest.raises(DataError, match="does not honour byte ranges"):
            open_stream(f"{url}/p.parquet", options()).open(0, 1).next_sample()


def test_a_server_that_stays_down(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As many attempts as asked for, waits that double with jitter up to the longest, then one clear error."""
    make_corpus(tmp_path, "jsonl", (5,))
    waits: list[float] = []
    monkeypatch.setattr(time, "sleep", waits.append)
    retry = Retry(attempts=7, first_wait=1.0, longest_wait=10.0, timeout=5.0)
    with shard_server(tmp_path, faults=1.0, kinds=("500",)) as (url, behaviour):
        stream = open_stream(f"{url}/part-0.jsonl", options(retry=retry))
        with pytest.raises(DataError, match=r"HTTP 500 .* 7 times in a row"):
            stream.open(0, 1).next_sample()
        assert len(behaviour.requests) == 7
    assert len(waits) == 6
    for wait, limit in zip(waits, (1, 2, 4, 8, 10, 10), strict=True):
        assert limit / 2 <= wait <= limit
    assert len({wait / limit for wait, limit in zip(waits, (1, 2, 4, 8, 10, 10), strict=True)}) > 1, "no jitter"
    with pytest.raises(DataError, match="refused"):  # the server is gone
        stream.open(0, 1).next_sample()


@pytest.mark.parametrize(("status", "words"), [(404, "check the location"), (403, "not granted"), (401, "not granted")])
def test_errors_that_retrying_cannot_fix_are_raised_at_once(tmp_path: Path, status: int, words: str) -> None:
    make_corpus(tmp_path, "jsonl", (5,))
    with shard_server(tmp_path, refuse=status) as (url, behaviour):
        with pytest.raises(DataError, match=f"HTTP {status}.*{words}"):
            open_stream(f"{url}/part-0.jsonl", options()).open(0, 1).next_sample()
        assert len(behaviour.requests) == 1


def test_another_file_under_the_same_url_is_refused(tmp_path: Path) -> None:
    make_corpus(tmp_path, "jsonl", (30,))
    path = tmp_path / "part-0.jsonl"
    original = path.read_bytes()
    with shard_server(tmp_path) as (url, _):
        stream = open_stream(f"{url}/part-0.jsonl", options())
        reader = stream.open(0, 1)
        reader.next_sample()
        state = reader.state()
        path.write_bytes(original.replace(b"document 1", b"document 2"))
        with pytest.raises(DataError, match="another file is stored there now"):
            stream.open(0, 1, state).next_sample()
        path.write_bytes(original)
        stream.open(0, 1, state).next_sample()


def test_a_replaced_local_shard_is_refused(tmp_path: Path) -> None:
    make_corpus(tmp_path, "jsonl", (30,))
    stream = open_stream(str(tmp_path / "part-0.jsonl"), options())
    reader = stream.open(0, 1)
    reader.next_sample()
    with open(tmp_path / "part-0.jsonl", "a") as file:
        file.write('{"text": "one more"}\n')
    with pytest.raises(DataError, match="not those of the saved state"):
        open_stream(str(tmp_path / "part-0.jsonl"), options()).open(0, 1, reader.state())
    with pytest.raises(DataError, match="part 0 of 1, this is part 1 of 2"):
        stream.open(1, 2, reader.state())


@pytest.mark.parametrize(
    ("line", "words"),
    [
        (b"{", "line 3: not JSON"),
        (b'{"body": "x"}', r"line 3: no key 'text'; keys are \['body'\]"),
        (b'{"text": null}', "line 3: the value of 'text' is null, not a string"),
        (b'["x"]', "line 3: a JSON object is needed, found list"),
        (b'{"text": "\\ud800"}', "line 3: the value of 'text' has a lone surrogate"),
        (b'{"text": "\xff"}', r"line 3: not UTF-8 at byte 10 \(0xff\)"),
    ],
)
def test_a_faulty_document(tmp_path: Path, line: bytes, words: str) -> None:
    """The error names file and line, or the document is skipped where asked; blank lines and empty texts never matter."""
    path = tmp_path / "bad.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"text": "first"}\n\n' + line + b'\n{"text": ""}\n{"text": "last"}\n')
    with pytest.raises(DataError, match=words):
        samples(open_stream(str(path), options()).open(0, 1), 9)
    stream = open_stream(str(path), options(on_error="skip"))
    assert sorted(documents_of(stream.open(0, 1), 2)) == ["first", "last"]


def test_damaged_shards(tmp_path: Path) -> None:
    """Truncated and invalid files are reported by name and never taken for the end of a shard."""
    for suffix in ("jsonl.gz", "jsonl.zst"):
        complete = write_shard(tmp_path / f"complete.{suffix}", make_texts(0, 300)).read_bytes()
        (tmp_path / f"cut.{suffix}").write_bytes(complete[: len(complete) - 9])
        with pytest.raises(DataError, match=rf"cut\.{suffix}: truncated"):
            samples(open_stream(str(tmp_path / f"cut.{suffix}"), options(buffer_documents=1000)).open(0, 1), 1)
        (tmp_path / f"bad.{suffix}").write_bytes(b"no such thing" * 9)
        with pytest.raises(DataError, match=rf"bad\.{suffix}: .*corrupt"):
            samples(open_stream(str(tmp_path / f"bad.{suffix}"), options()).open(0, 1), 1)
    (tmp_path / "bad.parquet").write_bytes(b"no such thing" * 9)
    with pytest.raises(DataError, match=r"bad\.parquet: truncated or corrupt parquet"):
        samples(open_stream(str(tmp_path / "bad.parquet"), options()).open(0, 1), 1)
    write_shard(tmp_path / "other.parquet", make_texts(0, 3), key="body")
    with pytest.raises(DataError, match=r"no column 'text'; columns are \['body', 'id'\]"):
        samples(open_stream(str(tmp_path / "other.parquet"), options()).open(0, 1), 1)
    assert len(samples(open_stream(str(tmp_path / "other.parquet"), options(text_key="body")).open(0, 1), 1)) == 1
    (tmp_path / "array.json").write_text('[{"text": "x"}]')
    with pytest.raises(DataError, match=r"array\.json: a JSON array"):
        samples(open_stream(str(tmp_path / "array.json"), options()).open(0, 1), 1)
