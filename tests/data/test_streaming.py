"""Streaming: every document once an epoch over any number of parts, exact resumption, and the network's faults."""

from __future__ import annotations

import gzip
import itertools
import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatronish.data.blend import Blend
from megatronish.data.builder import IndexedWriter
from megatronish.data.errors import DataError
from megatronish.data.indexed import IndexedReader
from megatronish.data.loader import MicroBatchLoader
from megatronish.data.packing import PackedDataset
from megatronish.data.remote import Retry
from megatronish.data.sampler import MicroBatchSampler
from megatronish.data.sources import NAMED, expand_counts, is_stream, parse_hub, resolve
from megatronish.data.streaming import DocumentStream, PackedReader, StreamOptions, open_stream
from tests.data.shard_server import STALL_SECONDS, shard_server

EOD = 256  # of the byte tokenizer
QUICK = Retry(attempts=25, first_wait=0.001, longest_wait=0.004, timeout=5.0)
FORMATS = ("jsonl", "jsonl.gz", "jsonl.zst", "parquet")
ROOT = Path(__file__).resolve().parents[2]


def write_shard(path: Path, texts: Sequence[str], key: str = "text") -> Path:
    """One shard in the format that its name says."""
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
    """Shards part-0, part-1, ... with so many documents; all their texts."""
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


@pytest.mark.parametrize("suffix", FORMATS)
@pytest.mark.parametrize("parts", [1, 2, 3, 7])
def test_every_document_once_an_epoch_over_all_parts(tmp_path: Path, suffix: str, parts: int) -> None:
    """Two epochs of every part: together each document exactly twice, whether shards or documents are divided."""
    everything = make_corpus(tmp_path, suffix)
    stream = open_stream(str(tmp_path / f"*.{suffix}"), options())
    first = [documents_of(stream.open(part, parts), 200) for part in range(parts)]
    found: Counter[str] = Counter()
    for documents in first:
        own = set(documents)
        size = len(own)
        assert sorted(documents[:size]) == sorted(documents[size : 2 * size]) == sorted(own), (
            "an epoch misses or repeats"
        )
        assert documents[:size] != documents[size : 2 * size] or size < 5, "epochs are in different orders"
        found.update(own)
    assert found == everything


def test_the_order_is_shuffled_and_depends_on_the_seed_alone(tmp_path: Path) -> None:
    make_corpus(tmp_path, "jsonl", (40,))
    place = str(tmp_path / "part-0.jsonl")
    one = documents_of(open_stream(place, options()).open(0, 1), 40)
    assert one == documents_of(open_stream(place, options()).open(0, 1), 40)
    assert one != documents_of(open_stream(place, options(seed=4)).open(0, 1), 40)
    written = make_texts(0, 40)
    assert one != written
    # A window of six documents is permuted within itself and goes no farther.
    for start in range(0, 36, 6):
        assert sorted(one[start : start + 6]) == sorted(written[start : start + 6])
    assert sorted(documents_of(open_stream(place, options(buffer_documents=40)).open(0, 1), 40)) == sorted(written)


@pytest.mark.parametrize("suffix", FORMATS)
def test_resumes_exactly_after_every_sample(tmp_path: Path, suffix: str) -> None:
    make_corpus(tmp_path, suffix)
    stream = open_stream(str(tmp_path / f"*.{suffix}"), options())
    reader = stream.open(1, 2)
    expected = samples(stream.open(1, 2), 160)  # more than two epochs of this part
    assert reader.state() == {}
    for done in range(1, 120):
        reader.next_sample()
        state = json.dumps(reader.state())
        assert len(state) <= 1024
        if done % 3 == 0:
            assert samples(stream.open(1, 2, json.loads(state)), 20) == expected[done : done + 20], done


@settings(max_examples=40, deadline=None)
@given(
    lengths=st.lists(st.lists(st.integers(0, 60), max_size=12), min_size=1, max_size=4),
    seq_length=st.integers(1, 50),
    buffer=st.integers(1, 9),
    parts=st.integers(1, 4),
    stops=st.lists(st.integers(1, 15), min_size=1, max_size=4),
)
def test_any_chain_of_resumptions_gives_the_same_samples(
    tmp_path_factory: pytest.TempPathFactory,
    lengths: list[list[int]],
    seq_length: int,
    buffer: int,
    parts: int,
    stops: list[int],
) -> None:
    folder = tmp_path_factory.mktemp("shards")
    for shard, sizes in enumerate(lengths):
        write_shard(folder / f"{shard}.jsonl", ["d" * size for size in sizes])
    stream = open_stream(str(folder / "*.jsonl"), options(seq_length=seq_length, buffer_documents=buffer))
    for part in range(parts):
        try:
            expected = samples(stream.open(part, parts), sum(stops))
        except DataError as error:
            assert "has no document" in str(error)
            continue
        found, state = [], None
        for stop in stops:
            reader = stream.open(part, parts, state)
            found += samples(reader, stop)
            state = json.loads(json.dumps(reader.state()))
        assert found == expected


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
    """Each retry asks for the bytes behind the last one received, and nothing is read twice."""
    texts = [f"{i} " + "x" * 20_000 for i in range(60)]
    write_shard(tmp_path / "big.jsonl", texts)
    size = (tmp_path / "big.jsonl").stat().st_size
    with shard_server(tmp_path, faults=0.8, kinds=("truncate", "reset later")) as (url, behaviour):
        stream = open_stream(f"{url}/big.jsonl", options(seq_length=4000, buffer_documents=100))
        assert sorted(documents_of(stream.open(0, 1), 60)) == sorted(texts)
        offsets = [int(asked.split("=")[1].rstrip("-")) if asked else 0 for _, asked, _ in behaviour.requests]
        assert sum(0 < offset < size for offset in offsets) >= 2, "the body was never cut"
        # It goes back only where a new epoch begins: the window behind the 60 documents is of the next one.
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


@pytest.mark.parametrize(("status", "words"), [(404, "check the location"), (403, "gated"), (401, "token")])
def test_what_retrying_cannot_mend_is_said_at_once(tmp_path: Path, status: int, words: str) -> None:
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
        with pytest.raises(DataError, match="another file lies there now"):
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


KILLED = """
import json, os, sys
from megatronish.data.remote import Retry
from megatronish.data.streaming import StreamOptions, open_stream
url, log = sys.argv[1:]
retry = Retry(attempts=25, first_wait=0.001, longest_wait=0.004, timeout=5.0)
stream = open_stream(url, StreamOptions(tokenizer="bytes", seq_length=16, seed=3, buffer_documents=6, retry=retry))
done = [json.loads(line) for line in open(log)] if os.path.exists(log) else []
reader = stream.open(0, 1, done[-1][1] if done else None)
with open(log, "a") as file:
    for _ in range(len(done), 400):
        tokens, starts = reader.next_sample()
        file.write(json.dumps([[tokens.tolist(), starts.tolist()], reader.state()]) + "\\n")
        file.flush()
"""


def test_killed_at_random_moments(tmp_path: Path) -> None:
    """kill -9, the torn last line cut off, started again from the last state: the samples of an undisturbed run."""
    make_corpus(tmp_path, "jsonl.gz", (60, 80))
    log = tmp_path / "log"
    draw = random.Random(7)
    with shard_server(tmp_path, faults=0.2) as (url, behaviour):
        location = f"{url}/part-{{0..1}}.jsonl.gz"
        command = [sys.executable, "-c", KILLED, location, str(log)]
        environment = os.environ | {"PYTHONPATH": str(ROOT)}
        kills = 0
        for _ in range(4):
            process = subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL)
            before = log.stat().st_size if log.exists() else 0
            while process.poll() is None and (not log.exists() or log.stat().st_size <= before):
                time.sleep(0.002)  # until this run has written something
            time.sleep(draw.uniform(0.0, 0.02))
            kills += process.poll() is None
            process.send_signal(signal.SIGKILL)
            process.wait()
            written = log.read_bytes()
            log.write_bytes(written[: written.rfind(b"\n") + 1])
        assert kills, "every run ended before it was killed"
        subprocess.run(command, env=environment, check=True, stderr=subprocess.DEVNULL)
        behaviour.faults = 0.0
        expected = samples(open_stream(location, options()).open(0, 1), 400)
    found = [tuple(json.loads(line)[0]) for line in log.read_text().splitlines()]
    assert found == expected


def hub_answers(repository: str, sha: str, names: Sequence[str]) -> dict[str, bytes]:
    """The hub's description of a dataset, for its newest state and for that commit."""
    info = {
        "id": repository,
        "sha": sha,
        "siblings": [{"rfilename": name} for name in names],
        "tags": [],
        "private": False,
    }
    content = json.dumps(info | {"downloads": 0, "likes": 0}).encode()
    return {f"/api/datasets/{repository}{end}": content for end in ("", "/revision/main", f"/revision/{sha}")}


def test_a_hub_dataset(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A named dataset by the hub's interface, its files redirected to another host, which never sees the token."""
    pytest.importorskip("huggingface_hub")
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    sha = "0123456789abcdef0123456789abcdef01234567"
    place = tmp_path / "datasets/allenai/c4/resolve" / sha
    names = ["README.md", "en/c4-train.00000-of-00002.json.gz", "en/c4-train.00001-of-00002.json.gz"]
    names += ["en/c4-validation.00000-of-00001.json.gz", "realnewslike/c4-train.00000-of-00001.json.gz"]
    for number, name in enumerate(names[1:]):
        write_shard(place / name, make_texts(number, 8))
    with shard_server(tmp_path) as (store, stored), shard_server(tmp_path, redirect_to=store) as (hub, asked):
        hub = hub.replace("127.0.0.1", "localhost")
        asked.answers = hub_answers("allenai/c4", sha, names)
        asked.faults, asked.kinds = 0.3, ("500", "reset")
        stream = open_stream("hf://allenai/c4:en", options(), endpoint=hub)
        assert len(stream.shards) == 2 and all(shard.pinned for shard in stream.shards)
        assert any("ODC-BY" in line for line in stream.describe()) and sha[:12] in stream.describe()[0]
        found = documents_of(stream.open(0, 1), 16)
        assert Counter(found) == Counter(make_texts(0, 8) + make_texts(1, 8))
        assert "hf_secret" not in repr(stream.shards)
        assert any(token == "Bearer hf_secret" for _, _, token in asked.requests)
        assert stored.requests and all(token is None for _, _, token in stored.requests)
        held_out = open_stream("hf://c4:en/validation", options(), endpoint=hub)
        assert sorted(documents_of(held_out.open(0, 1), 8)) == sorted(make_texts(2, 8))
        asked.answers = {}
        asked.faults, asked.redirect_to = 0.0, None
        with pytest.raises(DataError, match="hf://allenai/c4"):
            open_stream("hf://allenai/c4", options(), endpoint=hub)


def test_unknown_hub_datasets_and_url_lists(tmp_path: Path) -> None:
    """A dataset that is not known by name is its shards that name the split; RedPajama is a list of URLs."""
    pytest.importorskip("huggingface_hub")
    sha = "f" * 40
    with shard_server(tmp_path) as (hub, asked):
        names = ["data/train-00000-of-00001.jsonl", "data/test-00000-of-00001.jsonl", "extra/train.jsonl", "card.md"]
        asked.answers = hub_answers("some/corpus", sha, names)
        folder = tmp_path / "datasets/some/corpus/resolve" / sha
        for number, name in enumerate(names[:3]):
            write_shard(folder / name, make_texts(number, 4))

        def shards(location: str) -> list[str]:
            return [shard.name.split(f"{sha}/")[1] for shard in resolve(location, QUICK, hub).shards]

        assert shards("hf://some/corpus") == [names[0], names[2]]
        assert shards("hf://some/corpus:extra") == [names[2]]
        assert shards(f"hf://some/corpus@{sha}:data/test") == [names[1]]
        with pytest.raises(DataError, match="no shard of split 'dev'"):
            shards("hf://some/corpus:data/dev")
        repository = "togethercomputer/RedPajama-Data-1T"
        asked.answers = hub_answers(repository, sha, ["urls/arxiv.txt"])
        listed = tmp_path / f"datasets/{repository}/resolve/{sha}/urls/arxiv.txt"
        write_shard(tmp_path / "arxiv_0.jsonl", make_texts(0, 4))
        listed.parent.mkdir(parents=True)
        listed.write_text(f"{hub}/arxiv_0.jsonl\n\n")
        stream = open_stream("hf://redpajama:arxiv", options(), endpoint=hub)
        assert sorted(documents_of(stream.open(0, 1), 4)) == sorted(make_texts(0, 4))


def test_named_sources() -> None:
    """Every dataset that is promised is known by name and by repository, with fields, a licence and a train split."""
    assert {source.name for source in NAMED} >= {
        "c4", "openwebtext2", "redpajama", "oscar", "the-stack", "fineweb-edu", "dolly"
    }  # fmt: skip
    for source in NAMED:
        for location in (f"hf://{source.name}", f"hf://{source.repository}"):
            found, revision, split = parse_hub(location)
            assert (found.name, revision, split) == (source.name, None, "train")
        assert source.keys and source.licence and "{" not in found.pattern("train")
    assert parse_hub("hf://fineweb-edu:sample-100BT")[0].pattern("train") == "sample/100BT/*.parquet"
    assert parse_hub("hf://fineweb-edu:CC-MAIN-2024-10")[0].pattern("train") == "data/CC-MAIN-2024-10/*.parquet"
    assert parse_hub("hf://oscar:de")[0].pattern("train") == "de_meta/de_meta_part_*.jsonl.zst"
    assert parse_hub("hf://allenai/c4@v1.2:en/validation")[1:] == ("v1.2", "validation")
    with pytest.raises(DataError, match="no dataset known as 'c5'"):
        parse_hub("hf://c5")
    with pytest.raises(DataError, match="has no split 'dev'"):
        parse_hub("hf://c4:en/dev")[0].pattern("dev")


def test_several_fields_make_a_document(tmp_path: Path) -> None:
    """Dolly's instruction, context and response; an empty context leaves no gap."""
    records = [
        {"instruction": "Add.", "context": "", "response": "2"},
        {"instruction": "Name it.", "context": "A dog.", "response": "Rex", "category": "x"},
    ]
    (tmp_path / "dolly.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    location = resolve(str(tmp_path / "dolly.jsonl"), QUICK)
    keys = next(source.keys for source in NAMED if source.name == "dolly")
    stream = DocumentStream(type(location)(location.name, location.shards, keys), options())
    assert sorted(documents_of(stream.open(0, 1), 2)) == ["Add.\n\n2", "Name it.\n\nA dog.\n\nRex"]


@pytest.mark.parametrize(
    ("line", "words"),
    [
        (b"{", "line 3: not JSON"),
        (b'{"body": "x"}', r"line 3: no key 'text'; keys are \['body'\]"),
        (b'{"text": null}', "line 3: the value of 'text' is 'None', not a string"),
        (b'["x"]', "line 3: a JSON object is needed, found list"),
        (b'{"text": "\\ud800"}', "line 3: the text has a lone surrogate"),
        (b'{"text": "\xff"}', "line 3: not JSON: 'utf-8'"),
    ],
)
def test_a_faulty_document(tmp_path: Path, line: bytes, words: str) -> None:
    """Names file and line, or is passed over where asked; blank lines and empty texts never matter."""
    path = tmp_path / "bad.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"text": "first"}\n\n' + line + b'\n{"text": ""}\n{"text": "last"}\n')
    with pytest.raises(DataError, match=words):
        samples(open_stream(str(path), options()).open(0, 1), 9)
    stream = open_stream(str(path), options(on_error="skip"))
    assert sorted(documents_of(stream.open(0, 1), 2)) == ["first", "last"]


def test_damaged_shards(tmp_path: Path) -> None:
    """What is cut off or no shard is said, with the file's name, and never taken for its end."""
    for suffix in ("jsonl.gz", "jsonl.zst"):
        whole = write_shard(tmp_path / f"whole.{suffix}", make_texts(0, 300)).read_bytes()
        (tmp_path / f"cut.{suffix}").write_bytes(whole[: len(whole) - 9])
        with pytest.raises(DataError, match=rf"cut\.{suffix}: truncated"):
            samples(open_stream(str(tmp_path / f"cut.{suffix}"), options(buffer_documents=1000)).open(0, 1), 1)
        (tmp_path / f"bad.{suffix}").write_bytes(b"no such thing" * 9)
        with pytest.raises(DataError, match=rf"bad\.{suffix}: .*corrupt"):
            samples(open_stream(str(tmp_path / f"bad.{suffix}"), options()).open(0, 1), 1)
    (tmp_path / "bad.parquet").write_bytes(b"no such thing" * 9)
    with pytest.raises(DataError, match=r"bad\.parquet: not a Parquet file"):
        samples(open_stream(str(tmp_path / "bad.parquet"), options()).open(0, 1), 1)
    write_shard(tmp_path / "other.parquet", make_texts(0, 3), key="body")
    with pytest.raises(DataError, match=r"no column 'text'; columns are \['id', 'body'\]"):
        samples(open_stream(str(tmp_path / "other.parquet"), options()).open(0, 1), 1)
    assert len(samples(open_stream(str(tmp_path / "other.parquet"), options(text_key="body")).open(0, 1), 1)) == 1
    (tmp_path / "array.json").write_text('[{"text": "x"}]')
    with pytest.raises(DataError, match=r"array\.json: a JSON array"):
        samples(open_stream(str(tmp_path / "array.json"), options()).open(0, 1), 1)


def test_locations() -> None:
    assert expand_counts("a-{08..10}.gz") == ["a-08.gz", "a-09.gz", "a-10.gz"]
    assert expand_counts("{0..1}{5..6}") == ["05", "06", "15", "16"]
    with pytest.raises(DataError, match="runs backwards"):
        expand_counts("{3..1}")
    for yes in ("hf://c4", "https://x/y.jsonl", "data/*.jsonl.zst", "a.parquet", "A.JSON.GZ"):
        assert is_stream(yes)
    for no in ("data/default_text_document", "corpus", "x.txt"):
        assert not is_stream(no)
    with pytest.raises(DataError, match="no such shard"):
        resolve("nowhere/*.jsonl", QUICK)
    with pytest.raises(DataError, match="a shard ends in one of"):
        resolve("https://host/file.txt", QUICK)


def test_options_and_too_little_text(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="at least 1"):
        options(buffer_documents=0)
    with pytest.raises(DataError, match="choose fail or skip"):
        options(on_error="ignore")
    make_corpus(tmp_path, "jsonl", (2,))
    stream = open_stream(str(tmp_path / "*.jsonl"), options())
    with pytest.raises(DataError, match="part 2 of 3 has no document"):
        stream.open(2, 3).next_sample()


@pytest.mark.parametrize("workers", [0, 2])
def test_ranks_read_disjoint_parts_through_the_loader(tmp_path: Path, workers: int) -> None:
    """Two ranks x loader processes, a blend with an indexed set: streamed documents meet no rank twice before an epoch
    is through, the indexed samples are those of the blend, and a loader with saved states goes on exactly."""
    everything = make_corpus(tmp_path, "jsonl", (60, 60, 60, 60))
    stream = open_stream(str(tmp_path / "*.jsonl"), options(seq_length=64))
    writer = IndexedWriter(tmp_path / "indexed", "<u2")
    for number in range(50):
        writer.add_document(np.full(20, 300 + number))  # tokens that no byte of text is
    writer.finalize()
    indexed = PackedDataset(IndexedReader(tmp_path / "indexed"), np.arange(50), 64, seed=1)
    blend = Blend([stream, indexed], [2, 1], seed=5)

    def loader(rank: int, consumed: int, states: Any = None) -> MicroBatchLoader:
        sampler = MicroBatchSampler(consumed, 8, 2, rank, 2)
        return MicroBatchLoader(blend, sampler, num_workers=workers, prefetch=2, stream_states=states)

    def batches(source: MicroBatchLoader, count: int) -> list[list[list[int]]]:
        return [next(source)["tokens"].tolist() for _ in range(count)]

    ends: list[Counter[bytes]] = []
    for rank in range(2):
        with loader(rank, 0) as whole:
            expected = batches(whole, 60)
        with loader(rank, 0) as first:
            found = batches(first, 25)
            states = json.loads(json.dumps(first.stream_states()))
            consumed = first.consumed_samples
        assert consumed == 25 * 4
        with loader(rank, consumed, states) as second:
            assert found + batches(second, 35) == expected
        numbers = [number for number, _ in enumerate(range(240)) if number // 2 % 2 == rank]
        sources, ordinals = blend.places(np.array(numbers))
        rows = [row for batch in expected for row in batch]
        assert [row[0] >= 300 for row in rows] == (sources == 1).tolist()
        for row, source, ordinal in zip(rows, sources, ordinals, strict=True):
            if source == 1:
                assert row == indexed.sample(int(ordinal))[0][:-1].tolist()
        text = b"\0".join(bytes(t for t in row if t < 256) for row, s in zip(rows, sources, strict=True) if s == 0)
        ends.append(Counter(re.findall(rb"shard \d document \d+ ", text)))
    assert not ends[0].keys() & ends[1].keys() and ends[0] and ends[1]
    assert {name.decode() for name in ends[0] | ends[1]} <= {
        re.match(r"shard \d document \d+ ", t)[0] for t in everything
    }
