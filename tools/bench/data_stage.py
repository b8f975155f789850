"""What the parts of tools/bench/data.py share: contestants in processes of their own, peak memory, rows."""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar

import psutil

sys.path.insert(
    0, str(Path(__file__).resolve().parents[2])
)  # the root of the checkout: `tools.bench` is no installed package

from tools.bench.data_corpora import documents, train_tokenizer, write_corpus

T = TypeVar("T")
ROOT = Path(__file__).resolve().parents[2]
SAMPLE_SECONDS = 0.02
# Before Python 3.12 `typing` has no `override`, which Megatron-LM's training package imports; it only marks methods.
MEGATRON_SHIM = (
    "import runpy, sys, typing, typing_extensions as t; typing.override = t.override; "
    "sys.argv = sys.argv[1:]; runpy.run_path(sys.argv[0], run_name='__main__')"
)


@dataclass(frozen=True)
class Row:
    """One figure. `bar` is what `value` (or, with a peer, the ratio to it) must reach: ">= 4" or "<= 250"."""

    part: str
    what: str
    value: float
    unit: str
    low: float
    high: float
    peer: str = ""
    ratio: float | None = None
    bar: str = ""

    @property
    def holds(self) -> bool | None:
        """Whether the bar is met; None where there is none."""
        if not self.bar:
            return None
        sign, limit = self.bar.split()
        figure = self.value if self.ratio is None else self.ratio
        return figure >= float(limit) if sign == ">=" else figure <= float(limit)


@dataclass(frozen=True)
class Run:
    """One process from start to end; cpu_seconds: of all its cores, its own processes included."""

    seconds: float
    peak_mb: float
    cpu_seconds: float


@dataclass(frozen=True)
class Speed:
    """How fast one round went over a text: MB/s by the clock, MB a second of processor time, and its peak memory."""

    rate: float
    cpu_rate: float
    peak_mb: float = 0.0

    @classmethod
    def of(cls, text_bytes: int, run: Run) -> Speed:
        """That of a process from start to end."""
        return cls(text_bytes / 1e6 / run.seconds, text_bytes / 1e6 / run.cpu_seconds, run.peak_mb)


class Measured(Protocol):
    """A round of a contestant; its memory is looked at every `sample_seconds`, with None not at all."""

    def __call__(self, sample_seconds: float | None = None) -> Speed: ...


class Failed(RuntimeError):
    """A contestant did not do its work; the text holds the end of what it said."""


class Bench:
    """What the parts share: options, working folder, corpora, and the rows found."""

    def __init__(self, options: argparse.Namespace, work: Path) -> None:
        self.options = options
        self.work = work
        self.rows: list[Row] = []
        self.peer_python: str = options.peer_python or sys.executable
        self.environment = os.environ | {
            "RAYON_NUM_THREADS": str(options.threads),
            "TOKENIZERS_PARALLELISM": "true",
            "HF_HUB_OFFLINE": "1",
            "HF_DATASETS_OFFLINE": "1",
        }

    def corpus(self, megabytes: float) -> Path:
        """JSON lines of about that much text, made once."""
        if self.options.corpus:
            return Path(self.options.corpus)
        path = self.work / f"corpus-{megabytes:g}.jsonl"
        if not path.exists():
            write_corpus(path, documents(int(megabytes * 1e6)))
        return path

    def tokenizer(self) -> Path:
        """A folder with a byte-level BPE of 32,000 entries with GPT-2's splitting, which every contestant can load."""
        folder = self.work / "tokenizer"
        if not folder.exists():
            train_tokenizer(documents(4_000_000), folder)
        return folder

    def ours(self, corpus: Path, prefix: str, *extra: str, workers: int | None = None) -> list[str]:
        """The command that prepares `corpus` with our tool."""
        command = [sys.executable, str(ROOT / "tools/preprocess_data.py"), "--input", str(corpus), "--append-eod"]
        command += [
            "--output-prefix",
            str(self.work / prefix),
            "--tokenizer-model",
            str(self.tokenizer()),
            "--overwrite",
        ]
        return [*command, "--workers", str(workers or self.options.threads), *extra]

    def megatron(self, tool: str, corpus: Path, prefix: str, *extra: str) -> list[str]:
        """The command that prepares `corpus` with one of Megatron's tools."""
        script = str(Path(self.options.megatron) / "tools" / tool)
        command = [self.peer_python, "-c", MEGATRON_SHIM, script, "--input", str(corpus), "--append-eod"]
        command += ["--tokenizer-type", "HuggingFaceTokenizer", "--tokenizer-model", str(self.tokenizer())]
        return [*command, "--output-prefix", str(self.work / prefix), *extra]

    def help(self) -> str:
        """What our tool says of its options: which of them this version has."""
        command = [sys.executable, str(ROOT / "tools/preprocess_data.py"), "--help"]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout

    def rounds(self, role: str, arguments: dict[str, Any]) -> list[str]:
        """The command of a role of data_rounds.py."""
        python = self.peer_python if role.endswith("_megatron") else sys.executable
        return [python, str(ROOT / "tools/bench/data_rounds.py"), role, json.dumps(arguments)]

    def run(self, command: Sequence[str], stdin: str = "", sample_seconds: float | None = None) -> Run:
        """Runs a command to its end, looking at its memory that often (None: never, and at full speed).

        Raises Failed unless it exits with 0.
        """
        environment = self.environment | {"PYTHONPATH": str(ROOT)}
        if MEGATRON_SHIM in command:
            environment["PYTHONPATH"] = str(self.options.megatron)
        with (
            tempfile.TemporaryFile() as said,
            subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=said, stderr=said, env=environment, cwd=self.work
            ) as process,
        ):
            start = time.perf_counter()
            used = cpu_seconds_of_children()
            peak = None if sample_seconds is None else PeakMemory(process.pid, sample_seconds)
            assert process.stdin is not None
            process.stdin.write(stdin.encode())
            process.stdin.close()
            status = process.wait()
            seconds = time.perf_counter() - start
            peak_mb = peak.stop() if peak else 0.0
            said.seek(0)
            if status:
                raise Failed(
                    f"{' '.join(command)[:200]}: exit status {status}\n{said.read()[-1500:].decode(errors='replace')}"
                )
        return Run(seconds, peak_mb, cpu_seconds_of_children() - used)

    def peak_mb(self, command: Sequence[str]) -> float:
        """Peak memory of a command run to its end, in MB."""
        return self.run(command, sample_seconds=SAMPLE_SECONDS).peak_mb

    def take_turns(self, calls: Mapping[str, Callable[[], T]]) -> dict[str, list[T]]:
        """What each call gives, one after the other in every round."""
        figures: dict[str, list[T]] = {name: [] for name in calls}
        for _ in range(self.options.repeats):
            for name, call in calls.items():
                figures[name].append(call())
        return figures

    def row(self, part: str, what: str, values: Sequence[float], unit: str, bar: str = "") -> None:
        """Adds a figure of its own."""
        self.add(Row(part, what, statistics.median(values), unit, min(values), max(values), bar=bar))

    def ratio(
        self, part: str, what: str, ours: Sequence[float], peer: str, theirs: Sequence[float], bar: str = ""
    ) -> None:
        """Adds the ratio of two medians (bar on the ratio); the spread is that of the rounds' own ratios."""
        each = [a / b for a, b in zip(ours, theirs, strict=True)]
        value = statistics.median(ours) / statistics.median(theirs)
        self.add(Row(part, what, value, "x", min(each), max(each), peer, value, bar))

    def add(self, row: Row) -> None:
        """Adds a row and prints it."""
        self.rows.append(row)
        print(line(row), flush=True)

    def missing(self, part: str, what: str) -> None:
        """Says that a contestant is left out."""
        print(f"{part}: skipped {what}", flush=True)


def line(row: Row) -> str:
    """A row as one line of the table."""
    spread = f"({row.low:.3g} to {row.high:.3g})" if row.low != row.high else ""
    name = f"{row.what} / {row.peer}" if row.peer else row.what
    verdict = {True: f"holds {row.bar}", False: f"MISSES {row.bar}", None: ""}[row.holds]
    return f"{row.part:9} {name:78} {row.value:10.4g} {row.unit:10} {spread:24} {verdict}".rstrip()


class PeakMemory:
    """Samples the proportional set size of a process and its descendants until stopped."""

    def __init__(self, pid: int, sample_seconds: float) -> None:
        self.peak = 0
        self._every = sample_seconds
        self._process = psutil.Process(pid)
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)
        self._thread.start()

    def _sample(self) -> None:
        while not self._done.wait(self._every):
            total = 0
            try:
                for process in [self._process, *self._process.children(recursive=True)]:
                    try:
                        memory = process.memory_full_info()
                        total += getattr(memory, "pss", memory.rss)
                    except (psutil.NoSuchProcess, psutil.ZombieProcess, psutil.AccessDenied):
                        continue
            except psutil.NoSuchProcess:
                return
            self.peak = max(self.peak, total)

    def stop(self) -> float:
        """The peak in MB."""
        self._done.set()
        self._thread.join()
        return self.peak / 1e6


def cpu_seconds_of_children() -> float:
    """Processor time of the processes that this one has waited for, and of those that they have."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


class Contestant:
    """A running data_rounds.py; `go` runs one round."""

    def __init__(self, bench: Bench, role: str, arguments: dict[str, Any]) -> None:
        self._said = tempfile.TemporaryFile()  # noqa: SIM115  # closed by close
        environment = bench.environment | ({} if role.endswith("_megatron") else {"PYTHONPATH": str(ROOT)})
        self._process = subprocess.Popen(
            bench.rounds(role, arguments),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._said,
            env=environment,
            text=True,
        )
        self._answer()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        answer = self._process.stdout.readline()
        if not answer:
            self._process.wait()
            self._said.seek(0)
            raise Failed(self._said.read()[-1500:].decode(errors="replace"))
        return json.loads(answer)

    def go(self) -> dict[str, Any]:
        """One round's answer. Raises Failed if the process died."""
        assert self._process.stdin is not None
        self._process.stdin.write("go\n")
        self._process.stdin.flush()
        return self._answer()

    def close(self) -> None:
        """Ends the process."""
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.close()
        self._process.wait()
        self._process.stdout.close()
        self._said.close()
