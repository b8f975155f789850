"""Each kind of bad input in each format, a full disk, kill -9 at random moments: nothing lost, nothing half done."""

import gzip
import json
import os
import random
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import zstandard

from megatronish.data.dataset import open_dataset
from megatronish.data.tokenizer import EOD_TOKEN, train_bpe

TOOL = Path(__file__).resolve().parents[2] / "tools" / "preprocess_data.py"
GOOD = [f"good {i}" for i in range(40)]
PACK = {"": bytes, ".gz": gzip.compress, ".zst": zstandard.compress}


def arguments(*more: object) -> list[str]:
    return [sys.executable, str(TOOL), "--output-prefix", "o", "--workers", "2", *map(str, more)]


def run(folder: Path, *more: object, **options) -> subprocess.CompletedProcess[str]:
    return subprocess.run(arguments(*more), cwd=folder, capture_output=True, text=True, timeout=120, **options)


def line(text: object) -> bytes:
    return json.dumps({"text": text}).encode() + b"\n"


def contents(folder: Path) -> list[str]:
    return [raw.decode() for raw in documents(folder)]


def documents(folder: Path) -> list[bytes]:
    dataset = open_dataset(folder / "o_text_document")
    return list(dataset.document_bytes(range(dataset.reader.num_documents)))


FAULTY_LINES = {
    "bad JSON": b'{"text": "a"\n',
    "missing key": b'{"body": "a"}\n',
    "null": b'{"text": null}\n',
    "number": b'{"text": 5}\n',
    "raw NUL": b'{"text": "a\x00b"}\n',
    "lone surrogate": b'{"text": "a\\ud800"}\n',
    "invalid UTF-8": b'{"text": "a\xff"}\n',
}
REPAIRED = {"raw NUL": "a\x00b", "lone surrogate": "a\ufffd", "invalid UTF-8": "a\ufffd"}


@pytest.mark.parametrize("packed", sorted(PACK))
def test_each_faulty_line_stops_is_skipped_or_is_repaired(tmp_path, packed):
    """All kinds in one file, spread over many units, so that line numbers have to be right across units and workers."""
    lines, place = [], {}
    for number, (kind, fault) in enumerate(FAULTY_LINES.items()):
        lines += [line(text) for text in GOOD[5 * number : 5 * number + 5]]
        lines.append(fault)
        place[kind] = len(lines)
    (tmp_path / f"d.jsonl{packed}").write_bytes(PACK[packed](b"".join(lines)))
    given = ["--input", f"d.jsonl{packed}", "--tokenizer-model", "bytes", "--shard-size", 50]
    done = run(tmp_path, *given)
    assert done.returncode == 2 and f"d.jsonl{packed}, line {place['bad JSON']}: not JSON" in done.stderr
    assert not list(tmp_path.glob("o_*"))
    done = run(tmp_path, *given, "--on-error", "skip", "--overwrite")
    assert done.returncode == 0, done.stderr
    assert contents(tmp_path) == GOOD[: 5 * len(FAULTY_LINES)]
    manifest = open_dataset(tmp_path / "o_text_document").manifest
    assert manifest.counts["rejected_documents"] == len(FAULTY_LINES)
    assert [reject["place"] for reject in manifest.rejects] == [
        f"d.jsonl{packed}, line {number}" for number in place.values()
    ]
    assert run(tmp_path, *given, "--on-error", "replace", "--overwrite").returncode == 0
    expected: list[str] = []
    for number, kind in enumerate(FAULTY_LINES):
        expected += GOOD[5 * number : 5 * number + 5] + ([REPAIRED[kind]] if kind in REPAIRED else [])
    assert contents(tmp_path) == expected


@pytest.mark.parametrize("packed", sorted(PACK))
def test_text_that_is_not_utf8_and_byte_order_mark(tmp_path, packed):
    raw = b"\xef\xbb\xbffirst;" + b";".join(b"t%d" % i for i in range(50)) + b";bad\xff;last"
    (tmp_path / f"d.txt{packed}").write_bytes(PACK[packed](raw))
    given = ["--input", f"d.txt{packed}", "--tokenizer-model", "bytes", "--doc-separator", ";", "--shard-size", 40]
    done = run(tmp_path, *given)
    assert (
        f"d.txt{packed}, byte {raw.index(b'bad')}: not UTF-8 at byte 3 (0xff)" in done.stderr and done.returncode == 2
    )
    assert run(tmp_path, *given, "--on-error", "skip", "--overwrite").returncode == 0
    assert contents(tmp_path) == ["first", *(f"t{i}" for i in range(50)), "last"]
    assert run(tmp_path, *given, "--on-error", "replace", "--overwrite").returncode == 0
    assert contents(tmp_path)[-2:] == ["bad\ufffd", "last"]


def test_parquet_faults(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    values = [*(text.encode() for text in GOOD), None, b"bad\xff", b"last", b""]
    parquet.write_table(
        pyarrow.table({"text": pyarrow.array(values, pyarrow.binary())}), tmp_path / "d.parquet", row_group_size=7
    )
    given = ["--input", "d.parquet", "--tokenizer-model", "bytes", "--shard-size", 60]
    done = run(tmp_path, *given)
    assert done.returncode == 2 and "d.parquet, row 41: the value of 'text' is null" in done.stderr
    done = run(tmp_path, *given, "--on-error", "skip", "--overwrite")
    assert done.returncode == 0 and contents(tmp_path) == [*GOOD, "last"]
    manifest = open_dataset(tmp_path / "o_text_document").manifest
    assert [reject["place"] for reject in manifest.rejects] == ["d.parquet, row 41", "d.parquet, row 42"]
    assert manifest.counts["empty_documents"] == 1 and len(manifest.shards) > 3
    whole = (tmp_path / "d.parquet").read_bytes()
    (tmp_path / "d.parquet").write_bytes(whole[:-30])
    assert "d.parquet: truncated or corrupt parquet" in run(tmp_path, *given, "--overwrite").stderr


@pytest.mark.parametrize("packed", sorted(PACK))
def test_blank_lines_byte_order_mark_empty_documents_duplicate_keys(tmp_path, packed):
    raw = b'\xef\xbb\xbf{"text": "a"}\r\n\n   \n{"text": ""}\n{"text": "x", "text": "b"}\n{"text": "c"}'
    (tmp_path / f"d.jsonl{packed}").write_bytes(PACK[packed](raw))
    given = ["--input", f"d.jsonl{packed}", "--tokenizer-model", "bytes", "--append-eod"]
    done = run(tmp_path, *given)
    assert done.returncode == 0, done.stderr
    assert contents(tmp_path) == ["a", "b", "c"]
    counts = open_dataset(tmp_path / "o_text_document").manifest.counts
    assert (counts["blank_lines"], counts["empty_documents"], counts["duplicate_keys"]) == (2, 1, 1)
    assert f"d.jsonl{packed}, line 5: a key comes twice in one object; the last one counts" in done.stdout
    assert run(tmp_path, *given, "--keep-empty", "--overwrite").returncode == 0
    reader = open_dataset(tmp_path / "o_text_document").reader
    # As Megatron writes them: a document without a sequence, and without an end-of-document token.
    assert reader.document_boundaries.tolist() == [0, 1, 1, 2, 3] and reader.document_lengths.tolist() == [2, 0, 2, 2]


@pytest.mark.parametrize("packed", sorted(PACK))
def test_array_and_empty_files_are_refused(tmp_path, packed):
    (tmp_path / f"array.json{packed}").write_bytes(PACK[packed](b'\n [{"text": "a"}]'))
    (tmp_path / f"empty.jsonl{packed}").write_bytes(PACK[packed](b""))
    for name, message in (("array.json", "a JSON array"), ("empty.jsonl", "no document with text")):
        done = run(tmp_path, "--input", name + packed, "--tokenizer-model", "bytes", "--on-error", "skip")
        assert done.returncode == 2 and message in done.stderr, done.stderr
    assert not list(tmp_path.glob("*o*_document*")) and not list(tmp_path.glob(".o*"))


def test_literal_special_token_is_text_and_eod_is_an_id(tmp_path):
    tokenizer = train_bpe([*GOOD, EOD_TOKEN] * 3, 300)
    path = tokenizer.save(tmp_path / "t")
    (tmp_path / "d.jsonl").write_bytes(line(f"a{EOD_TOKEN}b"))
    for backend in ("hf", "gigatoken", "tiktoken"):
        pytest.importorskip({"hf": "tokenizers"}.get(backend, backend))
        done = run(
            tmp_path,
            "--input",
            "d.jsonl",
            "--tokenizer-model",
            path,
            "--append-eod",
            "--backend",
            backend,
            "--overwrite",
        )
        assert done.returncode == 0, done.stderr
        ids = open_dataset(tmp_path / "o_text_document").reader.document(0).tolist()
        assert ids.count(tokenizer.eod_id) == 1 and ids[-1] == tokenizer.eod_id
        assert contents(tmp_path) == [f"a{EOD_TOKEN}b"]


@pytest.mark.parametrize("packed", [".gz", ".zst"])
def test_truncated_file_is_named_finished_units_are_kept_and_the_mended_one_gives_the_same(tmp_path, packed):
    lines = b"".join(line(f"{i} " + "word " * 20) for i in range(2000))
    (tmp_path / "a.jsonl").write_bytes(lines)
    whole = PACK[packed](lines)
    (tmp_path / f"b.jsonl{packed}").write_bytes(whole[: len(whole) // 2])
    given = ["--input", "a.jsonl", f"b.jsonl{packed}", "--tokenizer-model", "bytes", "--shard-size", 20000]
    done = run(tmp_path, *given, "--on-error", "skip")
    assert done.returncode == 2 and f"b.jsonl{packed}: truncated or corrupt" in done.stderr
    assert "finished units are kept" in done.stdout and not list(tmp_path.glob("o_*"))
    assert "--resume goes on with it" in run(tmp_path, *given, "--on-error", "skip").stderr
    (tmp_path / f"b.jsonl{packed}").write_bytes(whole)
    done = run(tmp_path, *given, "--on-error", "skip", "--resume")
    assert done.returncode == 0 and "going on after" in done.stdout, done.stderr
    texts = [json.loads(raw)["text"] for raw in lines.splitlines()]
    assert contents(tmp_path) == texts * 2 and not list(tmp_path.glob(".o*"))


@pytest.mark.parametrize(
    ("backend", "megabytes", "longest", "limit"), [("auto", 30, "1M", 400), ("hf", 6, "128K", 200)]
)
def test_long_line_in_bounded_memory(tmp_path, backend, megabytes, longest, limit):
    """`tokenizers` given a text whole takes 140 bytes for each of its bytes, 600 with a vocabulary as small as this."""
    tokenizer = train_bpe(["some words to merge " * 50], 280).save(tmp_path / "t")
    words = "some words to merge " * (megabytes * 50_000)
    (tmp_path / "d.jsonl").write_bytes(line("before") + line(words) + line("after"))
    # VmHWM and not ru_maxrss: the latter takes over what the process that starts this one has used.
    program = (
        "import runpy, sys; sys.argv = sys.argv[1:]\n"
        "try: runpy.run_path(sys.argv[0], run_name='__main__')\n"
        "finally: print('PEAK', [int(line.split()[1]) // 1024 for line in open('/proc/self/status') if 'VmHWM' in line][0])"
    )
    given = ["--input", "d.jsonl", "--tokenizer-model", str(tokenizer), "--backend", backend, "--output-prefix", "o"]
    given += ["--max-doc-bytes", longest]
    done = subprocess.run(
        [sys.executable, "-c", program, str(TOOL), *given, "--workers", "1"],
        cwd=tmp_path, capture_output=True, text=True, timeout=200,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "1 documents above --max-doc-bytes" in done.stdout
    assert contents(tmp_path) == ["before", words, "after"]
    # Program and tokenizer 100 MB; line, text, parts and ids 10 bytes a byte; a part in `tokenizers` 80 MB.
    assert int(done.stdout.split("PEAK")[1]) < limit
    (tmp_path / "d.jsonl").write_bytes(line("before") + line("x" * 5000) + line("after"))
    more = ["--input", "d.jsonl", "--tokenizer-model", "bytes", "--overwrite", "--max-doc-bytes", "4K"]
    assert run(tmp_path, *more, "--long-documents", "skip").returncode == 0
    assert contents(tmp_path) == ["before", "after"]


def test_full_disk_is_told_and_resuming_with_room_gives_the_same(tmp_path):
    """A file-size limit stands in for a full disk: the write fails in the same way."""
    (tmp_path / "d.jsonl").write_bytes(b"".join(line(f"{i} {'x' * 990}") for i in range(1000)))

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (500_000, 500_000))
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)

    given = ["--input", "d.jsonl", "--tokenizer-model", "bytes", "--shard-size", 100_000, "--dtype", "uint16"]
    done = run(tmp_path, *given, preexec_fn=limit)
    assert done.returncode == 2 and "File too large" in done.stderr, done.stderr
    assert not list(tmp_path.glob("o_*")) and "finished units are kept" in done.stdout
    assert run(tmp_path, *given, "--resume").returncode == 0
    assert contents(tmp_path) == [f"{i} {'x' * 990}" for i in range(1000)]
    assert not list(tmp_path.glob(".o*"))


def test_resuming_another_run_is_refused(tmp_path):
    (tmp_path / "d.jsonl").write_bytes(b"".join(map(line, GOOD)) + b"bad\n")
    given = ["--input", "d.jsonl", "--tokenizer-model", "bytes", "--shard-size", 50]
    assert run(tmp_path, *given).returncode == 2
    done = run(tmp_path, *given, "--resume", "--append-eod")
    assert done.returncode == 2 and "--resume: the unfinished run was another one" in done.stderr
    # Resuming what is whole tells so, and what has not begun starts it: a script may always ask for it.
    (tmp_path / "d.jsonl").write_bytes(b"".join(map(line, GOOD)))
    assert run(tmp_path, *given, "--resume").returncode == 0
    assert contents(tmp_path) == GOOD
    assert "already there" in run(tmp_path, *given, "--resume").stdout


def test_worker_that_is_killed_ends_the_run_with_its_signal(tmp_path):
    (tmp_path / "d.jsonl").write_bytes(b"".join(line(f"{i} " + "words " * 2000) for i in range(3000)))
    process = subprocess.Popen(
        arguments("--input", "d.jsonl", "--tokenizer-model", "bytes", "--shard-size", "1M"),
        cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    deadline = time.monotonic() + 60
    while not children.read_text().split() and time.monotonic() < deadline:
        time.sleep(0.005)
    os.kill(int(children.read_text().split()[0]), signal.SIGKILL)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 2 and "a worker was ended by SIGKILL" in errors
    assert not list(tmp_path.glob("o_*"))


@pytest.mark.slow
def test_killed_twenty_times_and_resumed_gives_the_same_bytes(tmp_path):
    """Small shards make many journal lines, so that kills fall between all kinds of steps; the moments are drawn."""
    draw = random.Random(7)
    raw = b"".join(line(f"{i} " + "".join(draw.choices("abc ", k=draw.randint(0, 900)))) for i in range(6000))
    (tmp_path / "a.jsonl").write_bytes(raw[: raw.index(b"\n", len(raw) // 2) + 1])
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(raw[raw.index(b"\n", len(raw) // 2) + 1 :]))
    given = ["--input", "a.jsonl", "b.jsonl.gz", "--tokenizer-model", "bytes", "--append-eod", "--shard-size", "4K"]
    started = time.monotonic()
    assert run(tmp_path, *given).returncode == 0
    whole = time.monotonic() - started
    expected = {path.name: path.read_bytes() for path in tmp_path.glob("o_*")}
    for path in tmp_path.glob("o_*"):
        path.unlink()
    kills = 0
    while kills < 20:
        process = subprocess.Popen(
            arguments(*given, "--resume"), cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        try:
            # From while it starts to while it ends; each run goes on from where the one before was killed.
            assert process.wait(draw.uniform(0.15, 0.35) * whole + 0.2) == 0
            for path in tmp_path.glob("o_*"):
                assert path.read_bytes() == expected[path.name]
                path.unlink()
        except subprocess.TimeoutExpired:
            process.kill()
            assert process.wait() == -signal.SIGKILL
            kills += 1
            if (tmp_path / "o_text_document.manifest.json").exists():  # killed after its last rename
                assert {path.name: path.read_bytes() for path in tmp_path.glob("o_*")} == expected
                for path in tmp_path.glob("o_*"):
                    path.unlink()
    assert run(tmp_path, *given, "--resume").returncode == 0
    assert {path.name: path.read_bytes() for path in tmp_path.glob("o_*")} == expected and len(expected) == 3
    assert not list(tmp_path.glob(".o*"))
