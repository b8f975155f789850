"""Where streams come from: the hub, named datasets, url lists, local files."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest

from megatronish.data.readers.sources import NAMED, expand_counts, is_stream, parse_hub, resolve
from megatronish.data.streams.streaming import DocumentStream, open_stream
from megatronish.errors import DataError
from tests.data.streams.shard_server import shard_server
from tests.data.streams.text_shards import (
    QUICK,
    documents_of,
    hub_answers,
    make_texts,
    options,
    write_shard,
)


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
    validation, _, split = parse_hub("hf://c4:validation")
    assert (validation.config, split) == ("en", "validation"), "a split alone, of the usual configuration"
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
