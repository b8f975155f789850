"""Each kind of bad input in each format, a full disk, kill -9 at random moments: nothing is lost or left half done."""

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

from megatronish.data.samples.dataset import open_dataset
from megatronish.data.tokenizers.tokenizer import train_bpe

TOOL = Path(__file__).resolve().parents[2] / "tools" / "preprocess_data.py"
GOOD = [f"good {i}" for i in range(40)]
PACK = {"": bytes, ".gz": gzip.compress, ".zst": zstandard.compress}


def arguments(*more: object) -> list[str]:
    return [sys.executable, str(TOOL), "--output-prefix", "o", "--workers", "2", *map(str, more)]


def run(folder: Path, *more: object, **options) -> subprocess.CompletedProcess[str]:
    return subprocess.run(arguments(*more), cwd=folder, capture_output=True, text=True, timeout=120, **options)


def line(text: object) -> bytes:
    return json.dumps({"text": text}).encode() + b"\n"


def write(path: Path, texts: list[str]) -> None:
    """Texts as a file of the kind that its suffixes name; those of text files are cut at semicolons."""
    if path.suffix == ".parquet":
        pyarrow = pytest.importorskip("pyarrow")
        from pyarrow import parquet

        parquet.write_table(pyarrow.table({"text": texts}), path, row_group_size=50)
        return
    raw = b"".join(map(line, texts)) if ".jsonl" in path.name else ";".join(texts).encode()
    path.write_bytes(PACK.get(path.suffix, bytes)(raw))


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
    complete = (tmp_path / "d.parquet").read_bytes()
    (tmp_path / "d.parquet").write_bytes(complete[:-30])
    assert "d.parquet: truncated or corrupt parquet" in run(tmp_path, *given, "--overwrite").stderr


@pytest.mark.parametrize("packed", [".gz", ".zst"])
def test_truncated_file_is_named_and_resuming_with_the_complete_one_gives_the_same(tmp_path, packed):
    lines = b"".join(line(f"{i} " + "word " * 20) for i in range(2000))
    (tmp_path / "a.jsonl").write_bytes(lines)
    complete = PACK[packed](lines)
    (tmp_path / f"b.jsonl{packed}").write_bytes(complete[: len(complete) // 2])
    given = ["--input", "a.jsonl", f"b.jsonl{packed}", "--tokenizer-model", "bytes", "--shard-size", 20000]
    done = run(tmp_path, *given, "--on-error", "skip")
    assert done.returncode == 2 and f"b.jsonl{packed}: truncated or corrupt" in done.stderr
    assert "finished units are kept" in done.stdout and not list(tmp_path.glob("o_*"))
    assert "--resume resumes it" in run(tmp_path, *given, "--on-error", "skip").stderr
    (tmp_path / f"b.jsonl{packed}").write_bytes(complete)
    done = run(tmp_path, *given, "--on-error", "skip", "--resume")
    assert done.returncode == 0 and "resuming after" in done.stdout, done.stderr
    texts = [json.loads(raw)["text"] for raw in lines.splitlines()]
    assert contents(tmp_path) == texts * 2 and not list(tmp_path.glob(".o*"))


LONG_LINES = [("auto", 30, "1M", 400, kind) for kind in ("jsonl", "jsonl.gz", "txt.zst", "parquet")]


@pytest.mark.parametrize(
    ("backend", "megabytes", "longest", "limit", "kind"), [*LONG_LINES, ("hf", 6, "128K", 200, "jsonl")]
)
def test_long_document_in_bounded_memory(tmp_path, backend, megabytes, longest, limit, kind):
    """`tokenizers` given an entire text takes 140 bytes for each of its bytes, 600 with a vocabulary as small as this."""
    tokenizer = train_bpe(["some words to merge " * 50], 280).save(tmp_path / "t")
    words = "some words to merge " * (megabytes * 50_000)
    write(tmp_path / f"d.{kind}", ["before", words, "after"])
    # VmHWM and not ru_maxrss: the latter takes over what the process that starts this one has used.
    program = (
        "import runpy, sys; sys.argv = sys.argv[1:]\n"
        "try: runpy.run_path(sys.argv[0], run_name='__main__')\n"
        "finally: print('PEAK', [int(line.split()[1]) // 1024 for line in open('/proc/self/status') if 'VmHWM' in line][0])"
    )
    given = ["--input", f"d.{kind}", "--tokenizer-model", str(tokenizer), "--backend", backend, "--output-prefix", "o"]
    given += ["--max-doc-bytes", longest, "--doc-separator", ";"]
    done = subprocess.run(
        [sys.executable, "-c", program, str(TOOL), *given, "--workers", "1"],
        cwd=tmp_path, capture_output=True, text=True, timeout=200,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "1 documents above --max-doc-bytes" in done.stdout
    assert contents(tmp_path) == ["before", words, "after"]
    # Program and tokenizer 100 MB; line, text, parts and ids 10 bytes for each byte; a part in `tokenizers` 80 MB.
    assert int(done.stdout.split("PEAK")[1]) < limit
    write(tmp_path / f"d.{kind}", ["before", "x" * 5000, "after"])
    more = ["--input", f"d.{kind}", "--tokenizer-model", "bytes", "--overwrite", "--max-doc-bytes", "4K"]
    assert run(tmp_path, *more, "--doc-separator", ";", "--long-documents", "skip").returncode == 0
    assert contents(tmp_path) == ["before", "after"]


@pytest.mark.parametrize("kind", ["jsonl", "jsonl.gz", "txt.zst", "parquet"])
def test_full_disk_is_reported_and_resuming_with_room_gives_the_same(tmp_path, kind):
    """A file-size limit stands in for a full disk: the write fails in the same way."""
    texts = [f"{i} {'x' * 990}" for i in range(1000)]
    write(tmp_path / f"d.{kind}", texts)

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (500_000, 500_000))
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)

    given = ["--input", f"d.{kind}", "--tokenizer-model", "bytes", "--shard-size", 100_000, "--dtype", "uint16"]
    given += ["--doc-separator", ";"]
    done = run(tmp_path, *given, preexec_fn=limit)
    assert done.returncode == 2 and "File too large" in done.stderr, done.stderr
    assert not list(tmp_path.glob("o_*")) and "finished units are kept" in done.stdout
    assert run(tmp_path, *given, "--resume").returncode == 0
    assert contents(tmp_path) == texts
    assert not list(tmp_path.glob(".o*"))


def test_resuming_another_run_is_refused(tmp_path):
    (tmp_path / "d.jsonl").write_bytes(b"".join(map(line, GOOD)) + b"bad\n")
    given = ["--input", "d.jsonl", "--tokenizer-model", "bytes", "--shard-size", 50]
    assert run(tmp_path, *given).returncode == 2
    done = run(tmp_path, *given, "--resume", "--append-eod")
    assert done.returncode == 2 and "--resume: the unfinished run had other options" in done.stderr
    # Resuming a complete data set reports it, and resuming without one starts it: a script may always pass --resume.
    (tmp_path / "d.jsonl").write_bytes(b"".join(map(line, GOOD)))
    assert run(tmp_path, *given, "--resume").returncode == 0
    assert contents(tmp_path) == GOOD
    assert "exists already" in run(tmp_path, *given, "--resume").stdout


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
    texts = [f"{i} " + "".join(draw.choices("abc ", k=draw.randint(0, 900))) for i in range(6000)]
    files = ["a.jsonl", "b.jsonl.gz", "c.jsonl.zst", "d.parquet", "e.txt", "f.txt.gz"]
    for number, name in enumerate(files):
        write(tmp_path / name, texts[1000 * number : 1000 * number + 1000])
    given = ["--input", *files, "--tokenizer-model", "bytes", "--append-eod"]
    given += ["--shard-size", "4K", "--doc-separator", ";"]
    started = time.monotonic()
    assert run(tmp_path, *given).returncode == 0
    complete = time.monotonic() - started
    expected = {path.name: path.read_bytes() for path in tmp_path.glob("o_*")}
    for path in tmp_path.glob("o_*"):
        path.unlink()
    kills = 0
    while kills < 20:
        process = subprocess.Popen(
            arguments(*given, "--resume"), cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        try:
            # From while it starts to while it ends; each run resumes where the one before was killed.
            status = process.wait(draw.uniform(0.15, 0.35) * complete + 0.2)
        except subprocess.TimeoutExpired:
            process.kill()
            status = process.wait()
        assert status in (0, -signal.SIGKILL)
        kills += status != 0
        finished = (tmp_path / "o_text_document.manifest.json").exists()  # also if killed after its last rename
        assert finished or status != 0
        if finished:
            assert {path.name: path.read_bytes() for path in tmp_path.glob("o_*")} == expected
            for path in tmp_path.glob("o_*"):
                path.unlink()
    assert run(tmp_path, *given, "--resume").returncode == 0
    assert {path.name: path.read_bytes() for path in tmp_path.glob("o_*")} == expected and len(expected) == 3
    assert not list(tmp_path.glob(".o*"))
