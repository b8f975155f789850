"""The preprocessing tool as a user runs it: results, refusals with exit status 2 and one line, no files left."""

import gzip
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from megatronish.data.samples.dataset import open_dataset
from megatronish.data.tokenizers.tokenizer import train_bpe

TOOL = Path(__file__).resolve().parents[2] / "tools" / "preprocess_data.py"
TEXTS = [f"Document number {i}: {'word ' * (i % 7)}straße {i * i}\n" for i in range(300)]


def run(folder: Path, *arguments: object, **options) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(TOOL), *map(str, arguments)],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=120,
        **options,
    )


def refused(done: subprocess.CompletedProcess[str]) -> str:
    """The one line that a refusal prints."""
    assert done.returncode == 2, done.stdout + done.stderr
    lines = [line for line in done.stderr.splitlines() if not line.startswith(("tokenising:", "reading for"))]
    assert len(lines) == 1 and lines[0].startswith("preprocess_data: "), done.stderr
    return lines[0]


@pytest.fixture
def corpus(tmp_path):
    (tmp_path / "in.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    return tmp_path


@pytest.fixture(scope="module")
def bpe_file(tmp_path_factory):
    return train_bpe(TEXTS, 400).save(tmp_path_factory.mktemp("bpe") / "small")


def test_json_lines_to_tokens_and_back(corpus, bpe_file):
    done = run(
        corpus, "--input", "in.jsonl", "--output-prefix", "out/set", "--tokenizer-model", bpe_file, "--append-eod"
    )
    assert done.returncode == 0, done.stderr
    assert "300 documents" in done.stdout and "MB/s" in done.stderr and "tokens/s" in done.stderr
    dataset = open_dataset(corpus / "out" / "set_text_document")
    assert [raw.decode() for raw in dataset.document_bytes(range(300))] == TEXTS
    eod = dataset.manifest.tokenizer.eod_id
    assert all(dataset.reader.document(d)[-1] == eod for d in range(300))
    assert sorted(path.name for path in (corpus / "out").iterdir()) == [
        f"set_text_document.{suffix}" for suffix in ("bin", "idx", "manifest.json", "tokenizer.json")
    ]


def test_output_is_the_same_for_any_number_of_workers(corpus):
    outputs = []
    for workers in (1, 2, 3):
        folder = corpus / f"w{workers}"
        folder.mkdir()
        done = run(
            folder, "--input", "../in.jsonl", "--output-prefix", "set", "--train-tokenizer", 400, "--append-eod",
            "--workers", workers,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        outputs.append({path.name: path.read_bytes() for path in folder.iterdir()})
    assert len(outputs[0]) == 4
    assert outputs[0] == outputs[1] == outputs[2]


def test_text_files_gzip_globs_and_bytes(tmp_path):
    (tmp_path / "b.txt").write_bytes(b"plain\r\ntext")
    (tmp_path / "a.md").write_bytes("größer".encode())
    (tmp_path / "c.txt.gz").write_bytes(gzip.compress(b"zipped"))
    (tmp_path / "empty.txt").write_bytes(b"")
    done = run(
        tmp_path, "--input", "*.txt", "*.gz", "--input", "a.md", "--output-prefix", "o", "--tokenizer-model", "bytes"
    )
    assert done.returncode == 0, done.stderr
    assert "1 empty files left out, such as empty.txt" in done.stdout
    dataset = open_dataset(tmp_path / "o_text_document")
    assert list(dataset.document_bytes(range(3))) == [b"plain\r\ntext", b"zipped", "größer".encode()]
    assert dataset.reader.num_tokens == len("plain\r\ntextzippedgrößer".encode()), "no end of document unless asked"
    assert (dataset.manifest.tokenizer.kind, dataset.manifest.tokenizer.file) == ("bytes", None)


def test_separator_and_several_keys(tmp_path):
    (tmp_path / "d.txt").write_text("one\n---\ntwo\n---\n")
    done = run(
        tmp_path,
        "--input",
        "d.txt",
        "--doc-separator",
        r"\n---\n",
        "--output-prefix",
        "o",
        "--tokenizer-model",
        "bytes",
    )
    assert done.returncode == 0, done.stderr
    assert list(open_dataset(tmp_path / "o_text_document").document_bytes(range(2))) == [b"one", b"two"]
    (tmp_path / "k.jsonl").write_text('{"q": "Why?", "a": "So."}\n{"q": "", "a": "Only."}\n')
    done = run(
        tmp_path, "--input", "k.jsonl", "--json-keys", "q", "a", "--output-prefix", "k", "--tokenizer-model", "bytes"
    )
    assert done.returncode == 0, done.stderr
    assert list(open_dataset(tmp_path / "k_q_document").document_bytes([0])) == [b"Why?"]
    assert list(open_dataset(tmp_path / "k_a_document").document_bytes([0, 1])) == [b"So.", b"Only."]


def test_sentencepiece_by_megatrons_command_line(corpus):
    import sentencepiece

    with open(corpus / "m.model", "wb") as model:
        sentencepiece.SentencePieceTrainer.Train(
            sentence_iterator=iter(TEXTS), model_writer=model, vocab_size=340, model_type="bpe", byte_fallback=True, minloglevel=2,
            normalization_rule_name="identity", remove_extra_whitespaces=False,
        )  # fmt: skip
    done = run(
        corpus, "--input", "in.jsonl", "--output-prefix", "o", "--tokenizer-type", "GPTSentencePieceTokenizer",
        "--tokenizer-model", "m.model", "--append-eod", "--workers", 2, "--log-interval", 100,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("documents") >= 2
    dataset = open_dataset(corpus / "o_text_document")
    assert dataset.reader.document(0)[-1] == dataset.manifest.tokenizer.eod_id == 2
    assert dataset.held_out_text(range(300)).decode() == "".join(TEXTS)


def test_text_that_the_tokenizer_cannot_represent_is_reported(corpus):
    import sentencepiece

    with open(corpus / "m.model", "wb") as model:
        sentencepiece.SentencePieceTrainer.Train(
            sentence_iterator=iter(["plain words only"] * 5), model_writer=model, vocab_size=20, model_type="char",
            hard_vocab_limit=False, minloglevel=2,
        )  # fmt: skip
    done = run(corpus, "--input", "in.jsonl", "--output-prefix", "o", "--tokenizer-model", "m.model")
    assert done.returncode == 0, done.stderr
    dataset = open_dataset(corpus / "o_text_document")
    unknown = int((dataset.reader.tokens_view == 0).sum())
    assert unknown > 300, "each text has digits, which the model has not seen"
    assert dataset.manifest.counts["unknown_tokens"] == unknown
    assert f"{unknown:,} unknown tokens" in done.stdout


def test_skipping_counts_and_names_the_rejected(corpus):
    with open(corpus / "in.jsonl", "a") as file:
        file.write('{"text": 5}\n\n{"other": "x"}\n')
    arguments = ["--input", "in.jsonl", "--output-prefix", "o", "--tokenizer-model", "bytes"]
    assert "in.jsonl, line 301: the value of 'text' is 5" in refused(run(corpus, *arguments))
    assert not list(corpus.glob("o_*")) and not list(corpus.glob(".*"))
    done = run(corpus, *arguments, "--on-error", "skip")
    assert done.returncode == 0, done.stderr
    assert "1 blank lines ignored, 2 faulty documents skipped" in done.stdout
    manifest = open_dataset(corpus / "o_text_document").manifest
    assert (manifest.counts["rejected_documents"], manifest.counts["documents"]) == (2, 300)
    assert [reject["place"] for reject in manifest.rejects] == ["in.jsonl, line 301", "in.jsonl, line 303"]


def test_existing_output_is_kept_unless_asked(corpus):
    arguments = ["--input", "in.jsonl", "--output-prefix", "o", "--tokenizer-model", "bytes"]
    assert run(corpus, *arguments).returncode == 0
    before = (corpus / "o_text_document.bin").read_bytes()
    assert "exists already; use --overwrite" in refused(run(corpus, *arguments))
    # A failed replacement leaves the old data set complete.
    (corpus / "in.jsonl").write_text('{"text": "new"}\n{"text": ')
    assert "line 2: not JSON" in refused(run(corpus, *arguments, "--overwrite"))
    assert (corpus / "o_text_document.bin").read_bytes() == before
    assert open_dataset(corpus / "o_text_document").manifest.counts["documents"] == 300
    (corpus / "in.jsonl").write_text('{"text": "new"}\n')
    assert run(corpus, *arguments, "--overwrite").returncode == 0
    assert open_dataset(corpus / "o_text_document").held_out_text([0]) == b"new"
    (corpus / "o_text_document.manifest.json").unlink()
    assert "exists without a manifest" in refused(run(corpus, *arguments))


def test_bad_command_lines(corpus, bpe_file):
    (corpus / "empty.txt").write_text("")
    (corpus / "array.json").write_text('[{"text": "a"}]')
    (corpus / "latin.txt").write_bytes(b"caf\xe9")
    (corpus / "cut.jsonl.gz").write_bytes(gzip.compress((corpus / "in.jsonl").read_bytes())[:-20])
    to_bytes = ["--output-prefix", "o", "--tokenizer-model", "bytes"]
    cases = {
        "no such file: nothing.txt": ["--input", "nothing.txt", *to_bytes],
        "no document with text": ["--input", "empty.txt", *to_bytes],
        "no document with text in": ["--input", "empty.txt", "--output-prefix", "o", "--train-tokenizer", "300"],
        "array.json: a JSON array": ["--input", "array.json", *to_bytes],
        "latin.txt: not UTF-8 at byte 3 (0xe9)": ["--input", "latin.txt", *to_bytes],
        "cut.jsonl.gz: truncated": ["--input", "cut.jsonl.gz", *to_bytes],
        "no key 'body'; keys are ['text']": ["--input", "in.jsonl", "--json-keys", "body", *to_bytes],
        "--input needs --output-prefix": ["--input", "in.jsonl", "--tokenizer-model", "bytes"],
        "no tokenizer; give": ["--input", "in.jsonl", "--output-prefix", "o"],
        "exclude each other": ["--input", "in.jsonl", *to_bytes, "--train-tokenizer", "300"],
        "tokenizer gpt-9: no such file": ["--input", "in.jsonl", "--output-prefix", "o", "--tokenizer-model", "gpt-9"],
        "at least 257": ["--input", "in.jsonl", "--output-prefix", "o", "--train-tokenizer", "10"],
        "--workers 0": ["--input", "in.jsonl", *to_bytes, "--workers", "0"],
        "is a huggingface tokenizer, but": [
            "--input", "in.jsonl", "--output-prefix", "o", "--tokenizer-model", bpe_file, "--tokenizer-type", "Llama2Tokenizer",
        ],
        "give each key once": ["--input", "in.jsonl", "--json-keys", "text", "text", *to_bytes],
    }  # fmt: skip
    for message, arguments in cases.items():
        assert message in refused(run(corpus, *arguments)), arguments
    assert not list(corpus.glob("*o_text*")) and not list(corpus.glob(".*")), "a refusal leaves nothing behind"


def test_tokenizer_without_an_end_token(corpus, bpe_file):
    spec = json.loads(bpe_file.read_text())
    spec["added_tokens"][0]["content"] = "<stop>"
    (corpus / "t.json").write_text(json.dumps(spec))
    arguments = ["--input", "in.jsonl", "--output-prefix", "o", "--tokenizer-model", "t.json", "--append-eod"]
    assert "names no end-of-document token; name one with --eod-token" in refused(run(corpus, *arguments))
    assert run(corpus, *arguments, "--eod-token", "<stop>").returncode == 0
    dataset = open_dataset(corpus / "o_text_document")
    assert dataset.tokenizer().eod_id == dataset.reader.document(0)[-1]
    assert dataset.held_out_text([0]) == TEXTS[0].encode()


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_folder_without_write_permission(corpus):
    (corpus / "locked").mkdir(mode=0o500)
    arguments = ["--input", "in.jsonl", "--output-prefix", "locked/o", "--tokenizer-model", "bytes"]
    assert "cannot write in locked: Permission denied" in refused(run(corpus, *arguments))


def test_folder_that_cannot_be_made(corpus):
    """A file where a folder should be: refused for root too, unlike missing permission."""
    (corpus / "file").write_text("")
    arguments = ["--input", "in.jsonl", "--output-prefix", "file/o", "--tokenizer-model", "bytes"]
    assert "cannot write in file" in refused(run(corpus, *arguments))


def test_bare_command_prepares_the_default_corpus_once(tmp_path):
    """On a stand-in for the standard library, so that it takes a second; the real one is prepared by `make demo`."""
    library = tmp_path / "lib"
    library.mkdir()
    for i in range(40):
        (library / f"m{i}.py").write_text(
            f'"""Module {i}."""\n\n\ndef function_{i}(value):\n    return value + {i}\n' * 50
        )
    program = (
        "import sys, sysconfig; from pathlib import Path; sys.argv = ['preprocess_data.py', *sys.argv[3:]];"
        "import runpy; import megatronish.preprocessing.corpus as corpus;"
        f"corpus.default_corpus_folders = lambda: (Path({str(library)!r}), Path({str(tmp_path / 'none')!r}));"
        f"runpy.run_path({str(TOOL)!r}, run_name='__main__')"
    )

    def bare(*arguments: str) -> subprocess.CompletedProcess[str]:
        environment = os.environ | {"PYTHONPATH": str(TOOL.parents[1])}
        return subprocess.run(
            [sys.executable, "-c", program, "-", "-", *arguments],
            cwd=tmp_path, capture_output=True, text=True, timeout=120, env=environment,
        )  # fmt: skip

    done = bare()
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("adding the sources of the packages") == 1
    dataset = open_dataset(tmp_path / "data" / "default_text_document")
    assert dataset.manifest.counts["documents"] == 40 and dataset.manifest.appended_eod
    assert dataset.held_out_text([0]) == (library / "m0.py").read_bytes()
    files = {path: path.stat().st_mtime_ns for path in (tmp_path / "data").iterdir()}
    again = bare()
    assert again.returncode == 0 and "exists already" in again.stdout and "training" not in again.stdout
    assert files == {path: path.stat().st_mtime_ns for path in (tmp_path / "data").iterdir()}
    other = bare("--train-tokenizer", "300")
    assert "made with other options: train_tokenizer 4096 (now 300)" in refused(other)
    (tmp_path / "data" / "default_text_document.bin").write_bytes(b"")
    assert "make it again with --overwrite" in refused(bare())
    assert bare("--overwrite").returncode == 0
    assert open_dataset(tmp_path / "data" / "default_text_document").manifest == dataset.manifest


def test_help_names_every_option(tmp_path):
    done = run(tmp_path, "--help")
    assert done.returncode == 0
    for option in (
        "--input",
        "--json-keys",
        "--append-eod",
        "--tokenizer-model",
        "--train-tokenizer",
        "--output-prefix",
    ):
        assert option in done.stdout
