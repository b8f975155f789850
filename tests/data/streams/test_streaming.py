"""Streaming: every document once in an epoch over any number of parts, and exact resumption."""

from __future__ import annotations

import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatronish.data.indexed.builder import IndexedWriter
from megatronish.data.indexed.format import IndexedReader
from megatronish.data.loader import MicroBatchLoader
from megatronish.data.samples.blend import BlendedDataset
from megatronish.data.samples.packing import PackedDataset
from megatronish.data.samples.sampler import MicroBatchSampler
from megatronish.data.streams.streaming import open_stream
from megatronish.errors import DataError
from tests.data.streams.shard_server import shard_server
from tests.data.streams.text_shards import (
    FORMATS,
    ROOT,
    documents_of,
    make_corpus,
    make_texts,
    options,
    samples,
    write_shard,
)


@pytest.mark.parametrize("suffix", FORMATS)
@pytest.mark.parametrize("parts", [1, 2, 3, 7])
def test_every_document_once_in_an_epoch_over_all_parts(tmp_path: Path, suffix: str, parts: int) -> None:
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


KILLED = """
import json, os, sys
from megatronish.data.readers.remote import Retry
from megatronish.data.streams.streaming import StreamOptions, open_stream
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
    """Two ranks x loader processes, a blend with an indexed set: streamed documents reach no two ranks before an epoch
    has ended, the indexed samples are those of the blend, and a loader with saved states resumes exactly."""
    everything = make_corpus(tmp_path, "jsonl", (60, 60, 60, 60))
    stream = open_stream(str(tmp_path / "*.jsonl"), options(seq_length=64))
    writer = IndexedWriter(tmp_path / "indexed", "<u2")
    for number in range(50):
        writer.add_document(np.full(20, 300 + number))  # tokens that no byte of text is
    writer.finalize()
    indexed = PackedDataset(IndexedReader(tmp_path / "indexed"), np.arange(50), 64, seed=1)
    blend = BlendedDataset([stream, indexed], [2, 1], seed=5)

    def loader(rank: int, consumed: int, states: Any = None) -> MicroBatchLoader:
        sampler = MicroBatchSampler(consumed, 8, 2, rank, 2)
        return MicroBatchLoader(blend, sampler, num_workers=workers, prefetch=2, stream_states=states)

    def batches(source: MicroBatchLoader, count: int) -> list[list[list[int]]]:
        return [next(source)["tokens"].tolist() for _ in range(count)]

    ends: list[Counter[bytes]] = []
    for rank in range(2):
        with loader(rank, 0) as complete:
            expected = batches(complete, 60)
        with loader(rank, 0) as first:
            found = batches(first, 25)
            states = json.loads(json.dumps(first.stream_states()))
            consumed = first.consumed_samples
        assert consumed == 25 * 4
        with loader(rank, consumed, states) as second:
            assert found + batches(second, 35) == expected
        numbers = [number for number, _ in enumerate(range(240)) if number // 2 % 2 == rank]
        sources, ordinals = blend.locate(np.array(numbers))
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
