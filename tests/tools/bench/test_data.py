"""tools/bench/data.py on small cases: every part runs, says which peers are missing, and judges figures by their bars."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tools.bench.data_corpora import paragraphs
from tools.bench.data_stage import Row

ROOT = Path(__file__).resolve().parents[2]


def test_bars() -> None:
    """A bar is met at its limit; with a peer it is on the ratio."""

    def row(value: float, bar: str, ratio: float | None = None) -> Row:
        return Row("part", "what", value, "MB", value, value, ratio=ratio, bar=bar)

    assert row(250.0, "<= 250").holds is True and row(250.1, "<= 250").holds is False
    assert row(9.0, ">= 10", ratio=10.0).holds is True and row(11.0, ">= 10", ratio=9.9).holds is False
    assert row(1.0, "").holds is None


def test_paragraphs_lose_nothing() -> None:
    text = "\n\n".join(f"paragraph {i} " + "x" * (i % 50) for i in range(100))
    pieces = list(paragraphs(text, 200))
    assert "".join(pieces) == text + "\n\n"
    assert all(len(piece) >= 200 for piece in pieces[:-1])


@pytest.mark.slow
def test_parts_without_peers(tmp_path: Path) -> None:
    """Figures of our own parts with an own corpus, and the peers that are not there named; the exit status follows."""
    corpus = tmp_path / "corpus.jsonl"
    texts = [f"Document {i}: " + "some words and more of them, " * (i % 40) for i in range(300)]
    corpus.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    figures, picture = tmp_path / "bench.json", tmp_path / "bench.png"
    command = [sys.executable, "tools/bench/data.py", "--parts", "tokenise", "reads", "index", "hash", "stream", "grow"]
    command += ["--corpus", str(corpus), "--repeats", "1", "--read-tokens", "100000", "--index-documents", "50000"]
    command += [
        "--grow-gb",
        "0.001",
        "--stream-samples",
        "5",
        "--kills",
        "1",
        "--json",
        str(figures),
        "--plot",
        str(picture),
    ]
    # Python itself stands for an interpreter without megatron-core: isolated, it sees no other packages.
    bare = tmp_path / "bare-python"
    bare.write_text(f'#!/bin/sh\nexec "{sys.executable}" -I -S "$@"\n')
    bare.chmod(0o755)
    done = subprocess.run([*command, "--peer-python", str(bare)], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode in (0, 1), done.stderr
    rows = json.loads(figures.read_text())["rows"]
    assert done.returncode == int(any(row["holds"] is False for row in rows))
    assert "skipped Megatron's standard tool" in done.stdout and "cannot import megatron-core" in done.stdout
    assert picture.read_bytes().startswith(b"\x89PNG")
    found = {(row["part"], row["what"]): row for row in rows}
    assert found["tokenise", "raw encode_batch_fast"]["value"] > 0
    assert found["hash", "different outputs of 1, 2, 3 and 7 workers"]["value"] == 1
    assert found["index", "state to resume from"]["value"] <= 1024
    for what in (
        "plain, 100-token documents, single samples",
        "positions and cu_seqlens, 1000-token documents, batches of 8",
    ):
        assert found["reads", what]["value"] > 0
    assert found["grow", "gigatoken back end, 1 MB"]["value"] > 0
    assert found["stream", "ours, samples of 2048"]["value"] > 0
