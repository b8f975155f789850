"""Locations of streams: the hub, named datasets, URL lists, local files."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from megatronish.data.readers.hub_names import NAMED, parse_hub
from megatronish.data.readers.inputs import expand_counts, is_stream
from megatronish.data.readers.locations import resolve
from megatronish.data.streams.streaming import DocumentStream
from megatronish.errors import DataError
from tests.data.streams.shard_server import shard_server
from tests.data.streams.text_shards import (
    ROOT,
    documents_of,
    make_texts,
    options,
    write_shard,
)

HUB_PROGRAM = """
import json, sys
from megatronish.data.loader import MicroBatchLoader
from megatronish.data.samples.blend import BlendedDataset
from megatronish.data.samples.sampler import MicroBatchSampler
from megatronish.data.streams.streaming import open_stream
from tests.data.streams.text_shards import documents_of, options, samples

stream = open_stream("hf://allenai/c4:en", options())
reader = stream.open(1, 3)
before, state = samples(reader, 10), reader.state()
assert before + samples(stream.open(1, 3, state), 10) == samples(stream.open(1, 3), 20)

def loader(consumed, states):
    sampler = MicroBatchSampler(consumed, 4, 2, 0, 1)
    return MicroBatchLoader(BlendedDataset([stream], [1], 5), sampler, num_workers=2, prefetch=2, stream_states=states)

def batches(source, count):
    return [next(source)["tokens"].tolist() for _ in range(count)]

with loader(0, None) as unbroken:
    expected = batches(unbroken, 12)
with loader(0, None) as first:
    found, states, consumed = batches(first, 6), first.stream_states(), first.consumed_samples
with loader(consumed, states) as second:
    assert found + batches(second, 6) == expected

def texts(location, count):
    return documents_of(open_stream(location, options()).open(0, 1), count)

def error(location):
    try:
        open_stream(location, options())
    except ValueError as error:
        return str(error)

print(json.dumps({
    "described": stream.describe(),
    "shards": repr(stream.shards),
    "train": texts("hf://c4", 16),
    "validation": texts("hf://c4:validation", 8),
    "pattern": texts("hf://openwebtext2", 4),
    "url list": texts("hf://redpajama:arxiv", 4),
    "test": texts("hf://some/corpus:test", 4),
    "errors": [error(f"hf://{name}") for name in ("allenai/c4:xx", "c4:en/dev", "no/such", "oscar:en/dev")],
}))
"""


@pytest.mark.slow
def test_hub_datasets(tmp_path: Path) -> None:
    """Configurations, splits, file patterns and URL lists at one commit, resumed exactly, also in loader processes."""
    pytest.importorskip("datasets")
    sha = "0123456789abcdef0123456789abcdef01234567"
    c4, other = tmp_path / "allenai/c4", tmp_path / "some/corpus"
    for number in range(2):
        write_shard(c4 / f"en/c4-train.0000{number}-of-00002.json.gz", make_texts(number, 8))
    write_shard(c4 / "en/c4-validation.00000-of-00001.json.gz", make_texts(2, 8))
    split = "  - split: {0}\n    path: en/c4-{0}.*.json.gz\n".format
    (c4 / "README.md").write_text(
        f"---\nconfigs:\n- config_name: en\n  data_files:\n{split('train')}{split('validation')}---\n"
    )
    write_shard(other / "data/train-00000-of-00001.jsonl", make_texts(3, 4))
    write_shard(other / "data/test-00000-of-00001.jsonl", make_texts(4, 4))
    write_shard(tmp_path / "segyges/OpenWebText2/a/b.jsonl.zst", make_texts(5, 4))
    write_shard(tmp_path / "arxiv_0.jsonl", make_texts(6, 4))
    listed = tmp_path / "togethercomputer/RedPajama-Data-1T/urls/arxiv.txt"
    listed.parent.mkdir(parents=True)
    with shard_server(tmp_path, commit=sha) as (url, served):
        listed.write_text(f"{url}/arxiv_0.jsonl\n\n")
        there = {"HF_ENDPOINT": url, "HF_HUB_OFFLINE": "0", "HF_HOME": str(tmp_path / "cache"), "HF_TOKEN": "hf_secret"}
        done = subprocess.run(
            [sys.executable, "-c", HUB_PROGRAM],
            env=os.environ | there | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=200,
        )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert sha[:12] in found["described"][0] and "ODC-BY" in found["described"][1]
    assert sorted(found["train"]) == sorted(make_texts(0, 8) + make_texts(1, 8))
    for name, number, count in (("validation", 2, 8), ("test", 4, 4), ("pattern", 5, 4), ("url list", 6, 4)):
        assert sorted(found[name]) == sorted(make_texts(number, count)), name
    words = (r"'xx' not found.*\['en'\]", "split: dev.*'validation'", "no/such.*Hub", "has no split 'dev'")
    assert all(re.search(word, error) for word, error in zip(words, found["errors"], strict=True)), found["errors"]
    assert any(token == "Bearer hf_secret" for _, _, token in served.requests)
    assert all(token is None for path, _, token in served.requests if path == "/arxiv_0.jsonl")
    assert "hf_secret" not in done.stdout + done.stderr


def test_named_sources() -> None:
    """Every dataset that is promised is known by name and by repository, with fields and a licence."""
    assert {known.name for known in NAMED} >= {
        "c4", "openwebtext2", "redpajama", "oscar", "the-stack", "fineweb-edu", "dolly"
    }  # fmt: skip
    for known in NAMED:
        for location in (f"hf://{known.name}", f"hf://{known.repository}"):
            assert parse_hub(location) == known
        assert known.keys and known.licence and "{config}" not in str(known.data_files())
    assert parse_hub("hf://fineweb-edu:CC-MAIN-2024-10").config == "CC-MAIN-2024-10"
    assert parse_hub("hf://oscar:de").data_files() == {"train": "de_meta/de_meta_part_*.jsonl.zst"}
    pinned = parse_hub("hf://allenai/c4@v1.2:en/validation")
    assert (pinned.revision, pinned.split) == ("v1.2", "validation")
    validation = parse_hub("hf://c4:validation")
    assert (validation.config, validation.split) == ("en", "validation"), "a split alone, of the usual configuration"
    with pytest.raises(DataError, match="no dataset known as 'c5'"):
        parse_hub("hf://c5")
    with pytest.raises(DataError, match="expected hf://OWNER/NAME"):
        parse_hub("hf:///tmp/c5")


def test_several_fields_make_a_document(tmp_path: Path) -> None:
    """Dolly's instruction, context and response; an empty context leaves no gap."""
    records = [
        {"instruction": "Add.", "context": "", "response": "2"},
        {"instruction": "Name it.", "context": "A dog.", "response": "Rex", "category": "x"},
    ]
    (tmp_path / "dolly.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    location = resolve(str(tmp_path / "dolly.jsonl"))
    keys = next(known.keys for known in NAMED if known.name == "dolly")
    stream = DocumentStream(replace(location, keys=keys), options())
    assert sorted(documents_of(stream.open(0, 1), 2)) == ["Add.\n\n2", "Name it.\n\nA dog.\n\nRex"]


def test_locations() -> None:
    assert expand_counts("a-{08..10}.gz") == ["a-08.gz", "a-09.gz", "a-10.gz"]
    assert expand_counts("{0..1}{5..6}") == ["05", "06", "15", "16"]
    with pytest.raises(DataError, match="decreases"):
        expand_counts("{3..1}")
    for yes in ("hf://c4", "https://x/y.jsonl", "data/*.jsonl.zst", "a.parquet", "A.JSON.GZ", "a.csv", "b.tar"):
        assert is_stream(yes)
    for no in ("data/default_text_document", "corpus", "x.txt"):
        assert not is_stream(no)
    with pytest.raises(DataError, match="no such shard"):
        resolve("nowhere/*.jsonl")
    with pytest.raises(DataError, match="a shard ends in one of"):
        resolve("https://host/file.txt")
