"""Subcommands, further inputs, Megatron's tokenizer files, dry runs: as a user runs them."""

import base64
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from megatronish.data.indexed.builder import IndexedWriter
from megatronish.data.indexed.format import IndexedReader
from megatronish.data.samples.dataset import open_dataset
from megatronish.data.tokenizers.formats import byte_alphabet
from megatronish.data.tokenizers.tokenizer import load_tokenizer, train_bpe
from tests.data.streams.shard_server import shard_server

TOOL = Path(__file__).resolve().parents[2] / "tools" / "preprocess_data.py"
TEXTS = [f"Document {i}: {'word ' * (i % 7)}straße {i * i}" for i in range(100)]


def run(folder: Path, *arguments: object, **environment: str) -> str:
    """Output of the tool, which has to succeed."""
    done = attempt(folder, *arguments, **environment)
    assert done.returncode == 0, done.stderr
    return done.stdout


def attempt(folder: Path, *arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(TOOL), *map(str, arguments)]
    offline = os.environ | {"HF_HUB_OFFLINE": "1"} | environment
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=120, env=offline)


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "d.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    return tmp_path


@pytest.fixture
def dataset(folder):
    tokenizer = train_bpe(TEXTS, 350).save(folder / "t")
    run(folder, "--input", "d.jsonl", "--output-prefix", "o", "--tokenizer-model", tokenizer, "--append-eod")
    return folder


def texts_of(prefix: Path) -> list[str]:
    dataset = open_dataset(prefix)
    return [raw.decode() for raw in dataset.document_bytes(range(dataset.reader.num_documents))]


def test_inspect_and_decode(dataset):
    printed = run(dataset, "inspect", "o_text_document")
    assert (
        "100 documents in 100 sequences" in printed
        and "documents 100" in printed
        and repr(TEXTS[0][:5])[:-1] in printed
    )
    assert (
        run(dataset, "decode", "o_text_document", "--documents", 3, "7-8") == "\n".join([TEXTS[3], *TEXTS[7:9]]) + "\n"
    )
    ids = run(dataset, "decode", "o_text_document", "--documents", 3, "--tokens").split()
    assert list(map(int, ids)) == IndexedReader(dataset / "o_text_document").document(3).tolist()
    assert "has 100 documents" in attempt(dataset, "decode", "o_text_document", "--documents", 100).stderr


def test_verify_finds_a_changed_byte_and_a_missing_end(dataset):
    assert "equals its manifest: 100 documents" in run(dataset, "verify", "o_text_document")
    path = dataset / "o_text_document.bin"
    raw = bytearray(path.read_bytes())
    raw[-2:] = b"\x01\x00"
    path.write_bytes(raw)
    done = attempt(dataset, "verify", "o_text_document")
    assert done.returncode == 2 and "o_text_document.bin: xxh3 is" in done.stderr
    assert "1 documents do not end with" in done.stderr
    raw[-2:] = b"\xff\xff"
    path.write_bytes(raw)
    assert "token id 65535, but the vocabulary ends at" in attempt(dataset, "verify", "o_text_document").stderr


@pytest.mark.parametrize("seed", [None, 3])
def test_split_then_merge(dataset, seed):
    more = [] if seed is None else ["--seed", seed]
    run(dataset, "split", "o_text_document", "--parts", "train=0.8", "valid=0.15", "test=0.05", *more)
    parts = [texts_of(dataset / f"o_text_document_{name}") for name in ("train", "valid", "test")]
    assert list(map(len, parts)) == [80, 15, 5]
    joined = [text for part in parts for text in part]
    assert sorted(joined) == sorted(TEXTS) and (joined == TEXTS) is (seed is None)
    assert all(part == [text for text in TEXTS if text in set(part)] for part in parts), "in their order"
    for name in ("train", "valid", "test"):
        assert "equals its manifest" in run(dataset, "verify", f"o_text_document_{name}")
    names = [f"o_text_document_{name}" for name in ("train", "valid", "test")]
    run(dataset, "merge", "--input", *names, "--output-prefix", "again")
    assert texts_of(dataset / "again") == joined
    if seed is None:
        for suffix in ("bin", "idx"):
            original = (dataset / f"o_text_document.{suffix}").read_bytes()
            assert (dataset / f"again.{suffix}").read_bytes() == original
    assert "exists already" in attempt(dataset, "merge", "--input", *names, "--output-prefix", "again").stderr
    assert "add up to 1" in attempt(dataset, "split", "o_text_document", "--parts", "a=0.8", "b=0.3").stderr


def test_merge_keeps_sequences_and_empty_documents_and_refuses_other_tokenizers(dataset):
    for name, documents in (("a", [[[1, 2], [3]], [], [[4]]]), ("b", [[], [[5, 6]]])):
        writer = IndexedWriter(dataset / name, "<i4")
        for sequences in documents:
            for sequence in sequences:
                writer.add_sequence(sequence)
            writer.end_document()
        writer.finalize()
    run(dataset, "merge", "--input", "a", "b", "--output-prefix", "ab")
    reader = IndexedReader(dataset / "ab")
    assert reader.document_boundaries.tolist() == [0, 2, 2, 3, 3, 4]
    assert reader.sequence_lengths.tolist() == [2, 1, 1, 2] and reader.tokens_view.tolist() == [1, 2, 3, 4, 5, 6]
    assert "the index is sound; there is no manifest" in run(dataset, "verify", "ab")
    run(dataset, "--input", "d.jsonl", "--output-prefix", "bytes", "--tokenizer-model", "bytes")
    done = attempt(dataset, "merge", "--input", "o_text_document", "bytes_text_document", "--output-prefix", "x")
    assert "made with another tokenizer" in done.stderr
    assert "others have" in attempt(dataset, "merge", "--input", "o_text_document", "a", "--output-prefix", "x").stderr
    assert not list(dataset.glob("x*")) and not list(dataset.glob(".unfinished*"))


@pytest.mark.parametrize("model", ["bpe", "unigram"])
def test_train_tokenizer(folder, model):
    printed = run(
        folder,
        "train-tokenizer",
        "--input",
        "d.jsonl",
        "--output",
        "t/mine.json",
        "--vocab-size",
        320,
        "--model",
        model,
    )
    assert f"{model}, " in printed
    tokenizer = load_tokenizer(folder / "t" / "mine.json")
    assert 257 < tokenizer.vocab_size <= 320 and tokenizer.lossless
    assert tokenizer.decode(tokenizer.encode(TEXTS[9])) == TEXTS[9]
    again = ["train-tokenizer", "--input", "d.jsonl", "--output", "t/mine.json", "--vocab-size", 320]
    assert "the file exists" in attempt(folder, *again).stderr
    assert [path.name for path in (folder / "t").iterdir()] == ["mine.json"]


def test_dry_run_writes_nothing(folder):
    before = sorted(path.name for path in folder.rglob("*"))
    printed = run(folder, "--input", "d.jsonl", "--output-prefix", "o", "--tokenizer-model", "bytes", "--dry-run")
    assert "would write o_text_document" in printed and "257, uint16 tokens" in printed and "sample: 100" in printed
    assert sorted(path.name for path in folder.rglob("*")) == before


def test_remote_inputs(folder):
    """The hub by `datasets`, a web server with faults: named fields joined, bad lines located, splits chosen."""
    pytest.importorskip("datasets")
    sha = "0123456789abcdef0123456789abcdef01234567"
    records = [
        {"instruction": "Add.", "context": "", "response": "2"},
        {"instruction": "A", "context": "B", "response": "C"},
    ]
    hub = folder / "served"
    dolly, other = hub / "databricks/databricks-dolly-15k", hub / "some/corpus"
    for path, rows in ((dolly / "a.jsonl", records), (other / "test.jsonl", [{"text": "held out"}, {"text": None}])):
        path.parent.mkdir(parents=True)
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    (hub / "d.jsonl").write_bytes((folder / "d.jsonl").read_bytes())
    (hub / "bad.jsonl").write_text('{"text": "good"}\n\n{"text": \n{"text": null}\n')
    given = ["--tokenizer-model", "bytes", "--shard-size", 500, "--output-prefix"]
    with shard_server(hub, commit=sha) as (url, served):
        there = {"HF_ENDPOINT": url, "HF_HUB_OFFLINE": "0", "HF_HOME": str(folder / "cache")}
        lines = run(folder, "--input", "hf://dolly", *given, "o", **there)
        assert texts_of(folder / "o_text_document") == ["Add.\n\n2", "A\n\nB\n\nC"]
        assert "hf://dolly at 0123456789ab: 1 shards; licence: CC BY-SA 3.0" in lines
        run(folder, "--input", "hf://dolly", "--json-keys", "response", *given, "r", **there)
        assert texts_of(folder / "r_response_document") == ["2", "C"]
        done = attempt(folder, "--input", "hf://some/corpus:test", *given, "p", **there)
        assert done.returncode == 2 and f"corpus@{sha}/test.jsonl, row 2: the value of 'text' is null" in done.stderr
        run(folder, "--input", "hf://some/corpus:test", *given, "p", "--on-error", "skip", **there)
        assert texts_of(folder / "p_text_document") == ["held out"]
        assert open_dataset(folder / "p_text_document").manifest.counts["rejected_documents"] == 1
        (folder / "some/corpus").mkdir(parents=True)
        done = attempt(folder, "--input", "hf://some/corpus:test", *given, "q", **there)
        assert done.returncode == 2 and "would read the local folder some/corpus" in done.stderr
        served.faults, served.kinds = 0.3, ("500", "reset", "truncate")
        run(folder, "--input", f"{url}/d.jsonl", *given, "w", **there)
        assert texts_of(folder / "w_text_document") == TEXTS
        done = attempt(folder, "--input", f"{url}/bad.jsonl", *given, "q", **there)
        assert done.returncode == 2 and f"{url}/bad.jsonl, line 3: not JSON" in done.stderr
        done = attempt(folder, "--input", f"hf://{folder}/set", *given, "q", **there)
        assert done.returncode == 2 and "expected hf://OWNER/NAME" in done.stderr


def test_file_input_imports_neither_torch_nor_datasets(folder):
    program = (
        "import runpy, sys; sys.argv = sys.argv[1:]\n"
        "try: runpy.run_path(sys.argv[0], run_name='__main__')\n"
        "except SystemExit as end: assert end.code == 0\n"
        "print('LOADED', [m for m in ('torch', 'datasets', 'awkward', 'pandas', 'pyarrow', 'transformers') if m in sys.modules])"
    )
    given = ["--input", "d.jsonl", "--output-prefix", "o", "--train-tokenizer", "300", "--workers", "1"]
    done = subprocess.run(
        [sys.executable, "-c", program, str(TOOL), *given], cwd=folder, capture_output=True, text=True, timeout=120
    )
    assert "LOADED []" in done.stdout, done.stdout + done.stderr


def _gpt2_files(folder: Path) -> tuple[dict[str, int], list[str]]:
    """A vocabulary in GPT-2's order (its byte alphabet, then merges, then the end) and its merges."""
    alphabet = list(byte_alphabet())
    merges = ["a b", "Ġ w", "Ġw o", "Ġwo r", "Ġwor d", "D o"]
    words = [*alphabet, *("".join(merge.split()) for merge in merges), "<|endoftext|>"]
    vocabulary = {word: i for i, word in enumerate(words)}
    (folder / "vocab.json").write_text(json.dumps(vocabulary))
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges) + "\n")
    return vocabulary, merges


def test_gpt2_files_by_megatrons_command_line(folder):
    vocabulary, _ = _gpt2_files(folder)
    printed = run(
        folder, "--input", "d.jsonl", "--output-prefix", "o", "--tokenizer-type", "GPT2BPETokenizer", "--vocab-file",
        "vocab.json", "--merge-file", "merges.txt", "--append-eod", "--workers", 2, "--partitions", 2, "--log-interval", 50,
    )  # fmt: skip
    assert "--partitions: the input is cut into units of its own accord" in printed
    first = IndexedReader(folder / "o_text_document").document(1).tolist()
    assert first[0] == vocabulary["Do"] and vocabulary["Ġword"] in first and first[-1] == vocabulary["<|endoftext|>"]
    assert texts_of(folder / "o_text_document") == TEXTS
    done = attempt(folder, "--input", "d.jsonl", "--output-prefix", "p", "--vocab-file", "vocab.json")
    assert "--vocab-file and --merge-file belong together" in done.stderr


def test_tiktoken_rank_file(folder):
    """Named after its encoding, which defines how text is split; its ranks are the ids."""
    tokens = [bytes([b]) for b in range(256)] + [b"wo", b"wor", b" wor", b" word"]
    lines = [base64.b64encode(token) + b" %d" % i for i, token in enumerate(tokens)]
    (folder / "gpt2.tiktoken").write_bytes(b"\n".join(lines) + b"\n")
    run(folder, "--input", "d.jsonl", "--output-prefix", "o", "--tokenizer-model", "gpt2.tiktoken", "--append-eod")
    ids = IndexedReader(folder / "o_text_document").document(1)
    assert 259 in ids and ids[-1] == 50256
    assert texts_of(folder / "o_text_document") == TEXTS
    (folder / "gpt2.tiktoken").rename(folder / "mine.tiktoken")
    done = attempt(folder, "--input", "d.jsonl", "--output-prefix", "p", "--tokenizer-model", "mine.tiktoken")
    assert "a rank file does not contain the split pattern; name it after its encoding" in done.stderr


def test_back_ends_write_the_same_bytes(dataset):
    written = {}
    for backend in ("hf", "gigatoken", "tiktoken"):
        pytest.importorskip({"hf": "tokenizers"}.get(backend, backend))
        printed = run(
            dataset, "--input", "d.jsonl", "--output-prefix", backend, "--tokenizer-model", "t.tokenizer.json", "--append-eod",
            "--backend", backend,
        )  # fmt: skip
        assert f"encoded by {backend}" in printed
        written[backend] = np.fromfile(dataset / f"{backend}_text_document.bin", dtype=np.uint16)
    assert all(np.array_equal(tokens, written["hf"]) for tokens in written.values())
