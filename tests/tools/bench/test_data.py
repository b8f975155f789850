"""tools/bench/data.py on small cases: every part runs, missing peers are named, and figures are compared with their bars."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tools.bench.data import Row
from tools.bench.data_corpora import paragraphs

ROOT = Path(__file__).resolve().parents[3]


def test_bars() -> None:
    """A bar is met at its limit."""

    def row(value: float, bar: str) -> Row:
        return Row("part", "what", value, "MB", value, value, bar)

    assert row(250.0, "<= 250").holds is True and row(250.1, "<= 250").holds is False
    assert row(10.0, ">= 10").holds is True and row(9.9, ">= 10").holds is False
    assert row(1.0, "").holds is None


def test_paragraphs_lose_nothing() -> None:
    text = "\n\n".join(f"paragraph {i} " + "x" * (i % 50) for i in range(100))
    pieces = list(paragraphs(text, 200))
    assert "".join(pieces) == text + "\n\n"
    assert all(len(piece) >= 200 for piece in pieces[:-1])


@pytest.mark.slow
def test_parts_without_peers(tmp_path: Path) -> None:
    """Figures of our own parts on a given corpus; absent peers are named; the exit status follows the bars."""
    corpus = tmp_path / "corpus.jsonl"
    texts = [f"Document {i}: " + "some words and more of them, " * (i % 40) for i in range(300)]
    corpus.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    figures = tmp_path / "bench.json"
    command = [sys.executable, "tools/bench/data.py", "--parts", "tokenise", "reads", "index", "grow", "start"]
    command += ["--corpus", str(corpus), "--repeats", "1", "--read-tokens", "100000", "--index-documents", "50000"]
    command += ["--grow-gb", "0.001", "--json", str(figures)]
    # Python itself stands for an interpreter without megatron-core: isolated, it sees no other packages.
    bare = tmp_path / "bare-python"
    bare.write_text(f'#!/bin/sh\nexec "{sys.executable}" -I -S "$@"\n')
    bare.chmod(0o755)
    done = subprocess.run([*command, "--peer-python", str(bare)], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode in (0, 1), done.stderr
    rows = json.loads(figures.read_text())["rows"]
    assert done.returncode == int(any(row["holds"] is False for row in rows))
    assert "skipped Megatron's standard tool" in done.stdout and "cannot import megatron-core" in done.stdout
    found = {(row["part"], row["what"]): row["value"] for row in rows}
    assert found["tokenise", "ours / raw encode_batch_fast"] > 0 and found["tokenise", "peak memory of ours"] > 50
    assert found["index", "state to resume from"] <= 1024
    for what in (
        "plain, 100-token documents, single samples",
        "positions and cu_seqlens, 1000-token documents, batches of 8",
    ):
        assert found["reads", what] > 0
    assert found["grow", "gigatoken back end, 1 MB"] > 0 and found["start", "one document, ours"] > 0
