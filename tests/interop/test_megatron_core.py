"""megatron-core and this project read and write the same files, and `data.order: megatron` has the same samples in order.

The fixture creates an environment with megatron-core (from the package index, without its dependencies) and this one's
torch and NumPy, and runs all jobs in one process, about 15 seconds. See tests/environments.py for when tests are skipped.
"""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatronish.config.data import DataConfig
from megatronish.data.indexed.builder import IndexedWriter
from megatronish.data.indexed.format import IndexedReader
from megatronish.data.samples.megatron_order import MegatronBlendedDataset, greedy_blend, normalized
from megatronish.data.training_data import open_training_data
from megatronish.preprocessing.surgery import merge
from tests.environments import make_environment
from tests.runs import make_dataset

pytestmark = [pytest.mark.interop, pytest.mark.slow]
RELEASE = "megatron-core==0.16.1"
Documents = list[list[list[int]]]


def documents(seed: int, count: int, sequences: int = 3, longest: int = 40, largest: int = 256) -> Documents:
    """Documents of 0 to `sequences` sequences, no sequence empty."""
    draw = np.random.default_rng(seed)
    return [
        [
            draw.integers(0, largest, size=draw.integers(1, longest)).tolist()
            for _ in range(draw.integers(0, sequences + 1))
        ]
        for _ in range(count)
    ]


FILES: dict[str, tuple[str, Documents]] = {
    "u16": ("<u2", documents(0, 60, largest=65_000)),
    "i32": ("<i4", documents(1, 60, largest=2_000_000_000)),
    "one-sequence-each": ("<u2", [[[1, 2, 3]], [[4]], [[5, 6]]]),
    "empty-documents": ("<u2", [[], [[1, 2]], [], [], [[3], [4, 5]], []]),
    "only-empty": ("<i4", [[], []]),
}
TRAINED = {"a": documents(2, 90), "b": documents(3, 25, sequences=1), "c": documents(4, 40, longest=200)}
SPLIT = "90,10,0"
# Samples wanted: a part of an epoch, almost one, little of the last epoch (kept apart), much of it, several epochs.
SINGLE = [
    {"prefix": prefix, "seed": seed, "seq_length": length, "epochs": epochs}
    for prefix, length in (("a", 16), ("b", 7), ("c", 64), ("c", 300))
    for seed, epochs in ((1234, 0.4), (7, 0.97), (1234, 1.3), (7, 1.95), (3, 3.5), (3, 2.81))
]
BLENDS: list[dict[str, Any]] = [
    {"prefixes": ["a", "b", "c"], "weights": [0.5, 0.2, 0.3], "samples": 900},
    {"prefixes": ["c", "a"], "weights": [1.0, 1.0], "samples": 333},
    {"prefixes": ["a", "b", "c"], "weights": [97.0, 1.0, 2.5], "samples": 1501},
    {"prefixes": ["a"], "weights": [3.0], "samples": 200},
    {"prefixes": ["a", "b", "c"], "weights": None, "samples": 250},
]


def write_ours(prefix: Path, dtype: str, docs: Documents) -> str:
    writer = IndexedWriter(prefix, dtype)
    for sequences in docs:
        for sequence in sequences:
            writer.add_sequence(np.array(sequence))
        writer.end_document()
    writer.finalize()
    return str(prefix)


@pytest.fixture(scope="module")
def peer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the files of this project, ours/NAME, and of megatron-core, theirs/NAME and OUT.npz of each job."""
    folder = tmp_path_factory.mktemp("megatron")
    python = make_environment(folder / "venv", RELEASE)
    for name in ("ours", "theirs", "trained", "merged"):
        (folder / name).mkdir()
    jobs: list[dict[str, Any]] = []
    for name, (dtype, docs) in FILES.items():
        write_ours(folder / "ours" / name, dtype, docs)
        jobs.append({"do": "write", "prefix": f"theirs/{name}", "dtype": dtype, "documents": docs, "out": "none.npz"})
        jobs.append({"do": "read", "prefix": f"ours/{name}", "out": f"read-{name}.npz"})
    for name, docs in TRAINED.items():
        write_ours(folder / "trained" / name, "<u2", docs)
    for i, case in enumerate(SINGLE):
        run = {"seed": case["seed"], "seq_length": case["seq_length"], "samples": wanted(case)}
        blend = {"prefixes": [f"trained/{case['prefix']}"], "weights": None, "split": SPLIT}
        jobs.append({"do": "order", **run, **blend, "out": f"single-{i}.npz"})
    for i, case in enumerate(BLENDS):
        prefixes = [f"trained/{name}" for name in case["prefixes"]]
        run = {"seed": 5, "seq_length": 16, "samples": case["samples"], "weights": case["weights"]}
        run["split"] = split_of_blend(case)
        jobs.append({"do": "order", **run, "prefixes": prefixes, "out": f"blend-{i}.npz"})
    inputs = []
    for seed in (0, 1, 2):
        (folder / f"set{seed}").mkdir()
        inputs.append(make_dataset(folder / f"set{seed}", documents=9, seed=seed))
    jobs.append({"do": "merge", "prefix": "merged/theirs", "inputs": inputs, "out": "none.npz"})
    (folder / "jobs.json").write_text(json.dumps(jobs))
    script = Path(__file__).with_name("megatron_jobs.py")
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([python, script, "jobs.json"], cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    return folder


def wanted(case: dict[str, Any]) -> int:
    """Number of samples in the epochs of a case, over the training part."""
    lengths = [len(sequence) for sequences in TRAINED[case["prefix"]] for sequence in sequences]
    tokens = sum(lengths[: round(0.9 * len(lengths))])
    return max(1, int(case["epochs"] * tokens / case["seq_length"]))


@pytest.mark.parametrize("name", FILES)
def test_same_documents_same_bytes(peer: Path, name: str) -> None:
    for suffix in ("bin", "idx"):
        ours, theirs = ((peer / who / f"{name}.{suffix}").read_bytes() for who in ("ours", "theirs"))
        assert ours == theirs, f"{name}.{suffix}"


@pytest.mark.parametrize("name", FILES)
def test_megatron_reads_ours(peer: Path, name: str) -> None:
    found = np.load(peer / f"read-{name}.npz")
    dtype, docs = FILES[name]
    sequences = [sequence for sequences in docs for sequence in sequences]
    assert np.dtype(str(found["dtype"]).split("'")[1].removeprefix("numpy.")) == np.dtype(dtype)
    assert found["lengths"].tolist() == [len(sequence) for sequence in sequences]
    assert found["boundaries"].tolist() == [0, *np.cumsum([len(sequences) for sequences in docs]).tolist()]
    assert found["tokens"].tolist() == [token for sequence in sequences for token in sequence]


@pytest.mark.parametrize("name", FILES)
def test_ours_reads_megatrons(peer: Path, name: str) -> None:
    dtype, docs = FILES[name]
    reader = IndexedReader(peer / "theirs" / name)
    assert reader.dtype == np.dtype(dtype) and reader.num_documents == len(docs)
    for number, sequences in enumerate(docs):
        assert reader.document(number).tolist() == [token for sequence in sequences for token in sequence]
    sequences = [sequence for sequences in docs for sequence in sequences]
    assert [reader.sequence(i).tolist() for i in range(len(sequences))] == sequences
    single = IndexedReader(peer / "theirs" / name, "sequence")
    assert [single.document(i).tolist() for i in range(single.num_documents)] == sequences


def test_merging_is_adding_indexes(peer: Path) -> None:
    inputs = [str(next((peer / f"set{seed}").glob("*.manifest.json"))) for seed in (0, 1, 2)]
    merge([name.removesuffix(".manifest.json") for name in inputs], str(peer / "merged" / "ours"))
    for suffix in ("bin", "idx"):
        assert (peer / "merged" / f"ours.{suffix}").read_bytes() == (peer / "merged" / f"theirs.{suffix}").read_bytes()


def split_of_blend(case: dict[str, Any]) -> str:
    """Without weights megatron-core fails on a part of less than one sample, such as the validation of these small sets."""
    return SPLIT if case["weights"] else "100,0,0"


def training_rows(
    peer: Path, path: Any, seed: int, seq_length: int, samples: int, count: int, split: str = SPLIT
) -> tuple[np.ndarray, Any]:
    """Our first `count` samples as token rows [count, s + 1], read as a training run does."""
    config = DataConfig(path=path, order="megatron", split=split, tokenizer="bytes")
    data = open_training_data(config, seq_length=seq_length, vocab_size=257, seed=seed, samples=samples, group=4)
    return data.train.rows(np.arange(count)).tokens, data


@pytest.mark.parametrize("number", range(len(SINGLE)))
def test_order_of_one_data_set(peer: Path, number: int) -> None:
    """Every sample that Megatron builds, including those after the requested ones."""
    case = SINGLE[number]
    theirs = np.load(peer / f"single-{number}.npz")
    path = str(peer / "trained" / case["prefix"])
    rows, data = training_rows(peer, path, case["seed"], case["seq_length"], wanted(case), len(theirs["rows"]))
    assert data.train.size == int(theirs["size"])
    assert len(rows) >= wanted(case)
    assert np.array_equal(rows, theirs["rows"])


@pytest.mark.parametrize("number", range(len(BLENDS)))
def test_order_and_counts_of_a_blend(peer: Path, number: int) -> None:
    case = BLENDS[number]
    theirs = np.load(peer / f"blend-{number}.npz")
    prefixes = [str(peer / "trained" / name) for name in case["prefixes"]]
    weights = case["weights"]
    path = prefixes if weights is None else [{"path": p, "weight": w} for p, w in zip(prefixes, weights, strict=True)]
    rows, data = training_rows(peer, path, 5, 16, case["samples"], len(theirs["rows"]), split_of_blend(case))
    assert isinstance(data.train, MegatronBlendedDataset)
    source_of, number_of = data.train.locate(np.arange(data.train.size))
    assert source_of.tolist() == theirs["source_of"].tolist()
    assert number_of.tolist() == theirs["number_of"].tolist()
    assert np.array_equal(rows, theirs["rows"])
    counts = np.bincount(theirs["source_of"][: case["samples"]], minlength=len(prefixes))
    assert data.train.counts(case["samples"]) == counts.tolist()


def test_default_split_is_megatrons(peer: Path) -> None:
    """Without data.split the order is that of Megatron's own default, 969,30,1."""
    config = DataConfig(path=str(peer / "trained" / "a"), order="megatron", tokenizer="bytes")
    data = open_training_data(config, seq_length=16, vocab_size=257, seed=1, samples=10, group=1)
    count = IndexedReader(peer / "trained" / "a", "sequence").num_documents
    bounds = [round(0.969 * count), round((0.969 + 0.03) * count)]
    assert data.splits[0].train.tolist() == list(range(bounds[0]))
    assert data.splits[0].validation.tolist() == list(range(*bounds))


def test_greedy_blend_by_hand() -> None:
    """Weights 2:1, without megatron-core."""
    source_of, number_of = greedy_blend(normalized([2, 1]), 7)
    assert source_of.tolist() == [0, 1, 0, 0, 1, 0, 0]
    assert number_of.tolist() == [0, 0, 1, 2, 1, 3, 4]
