"""Benchmark the data path and its peers: rates, ratios and peak memory, with the bars that they are held to.

Parts (--parts): tokenise (the Hugging Face back end, raw `encode_batch_fast`, Megatron's standard tool, `datasets.map`),
fast (the gigatoken back end, raw gigatoken, Megatron's tools), start (process start to a data set of one document), reads
(packed samples per second, GPTDataset's too), index (10M documents: build, seek, state). Only if named: grow (rate and peak
memory at --grow-gb gigabytes, a tenth and a hundredth of it; takes minutes and 1.6 times the disk space).

Every round runs in a process of its own and the contestants take turns, so that other load slows all of them; medians of
--repeats rounds. Peak memory is the proportional set size of the process tree, sampled every 20 ms in an extra run, as
sampling costs the processes a seventh of their speed. Missing peers are named and left out. Megatron's tools come from a
checkout (--megatron) and run, as megatron-core does, in --peer-python, where it, torch and transformers can be imported.
Exit status: 0 if every bar that was measured holds, 1 if not, 2 if a contestant failed.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import psutil

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))  # run from a checkout that is not installed

from tools.bench import data_corpora as corpora  # noqa: E402

SEQ_LENGTH = 2048
MICRO_BATCH = 8
# Before Python 3.12 `typing` has no `override`, which Megatron-LM's training package imports; it only marks methods.
MEGATRON_SHIM = (
    "import runpy, sys, typing, typing_extensions as t; typing.override = t.override; "
    "sys.argv = sys.argv[1:]; runpy.run_path(sys.argv[0], run_name='__main__')"
)


class Failed(RuntimeError):
    """A contestant exited with an error; the text ends with its output."""


@dataclass(frozen=True)
class Row:
    """The median of a figure and its range. bar: what `value` must reach, such as ">= 4" or "<= 250"."""

    part: str
    what: str
    value: float
    unit: str
    low: float
    high: float
    bar: str = ""

    @property
    def holds(self) -> bool | None:
        """Whether the bar is met; None where there is none."""
        if not self.bar:
            return None
        sign, limit = self.bar.split()
        return self.value >= float(limit) if sign == ">=" else self.value <= float(limit)

    def __str__(self) -> str:
        spread = f"({self.low:.3g} to {self.high:.3g})" if self.low != self.high else ""
        verdict = {True: f"holds {self.bar}", False: f"MISSES {self.bar}", None: ""}[self.holds]
        return f"{self.part:9} {self.what:90} {self.value:10.4g} {self.unit:10} {spread:24} {verdict}".rstrip()


class Bench:
    """Options, working folder, commands, and the rows found."""

    def __init__(self, options: argparse.Namespace, work: Path) -> None:
        self.options = options
        self.work = work
        self.rows: list[Row] = []
        self.peer_python: str = options.peer_python or sys.executable

    def corpus(self, megabytes: float) -> Path:
        """JSON lines of about that much text, written once."""
        if self.options.corpus:
            return Path(self.options.corpus).resolve()
        path = self.work / f"corpus-{megabytes:g}.jsonl"
        if not path.exists():
            corpora.write_corpus(path, corpora.documents(int(megabytes * 1e6)))
        return path

    def tokenizer(self) -> str:
        """A folder with a byte-level BPE of 32,000 entries with GPT-2's splitting, which every contestant can load."""
        folder = self.work / "tokenizer"
        if not folder.exists():
            corpora.train_tokenizer(corpora.documents(4_000_000), folder)
        return str(folder)

    def ours(self, corpus: Path, prefix: str, backend: str = "auto") -> list[str]:
        """The command that prepares `corpus` with our tool."""
        command = [sys.executable, str(ROOT / "tools/preprocess_data.py"), "--input", str(corpus), "--append-eod"]
        command += ["--tokenizer-model", self.tokenizer(), "--output-prefix", str(self.work / prefix), "--overwrite"]
        return [*command, "--backend", backend, "--workers", str(self.options.threads)]

    def megatron(self, tool: str, corpus: Path, prefix: str, *extra: str) -> list[str]:
        """The command that prepares `corpus` with one of Megatron's tools."""
        script = str(Path(self.options.megatron) / "tools" / tool)
        command = [self.peer_python, "-c", MEGATRON_SHIM, script, "--input", str(corpus), "--append-eod"]
        command += ["--tokenizer-type", "HuggingFaceTokenizer", "--tokenizer-model", self.tokenizer()]
        return [*command, "--output-prefix", str(self.work / prefix), *extra]

    def role(self, role: str, **arguments: Any) -> Callable[[], dict[str, float]]:
        """A round of data_rounds.py in a process of its own: what it measured of itself."""
        python = self.peer_python if role.endswith("_megatron") else sys.executable
        command = [python, str(ROOT / "tools/bench/data_rounds.py"), role, json.dumps(arguments)]
        return lambda: json.loads(self.output(command).splitlines()[-1])

    def environment_of(self, command: Sequence[str]) -> dict[str, str]:
        """Environment variables of a command: threads, and where it imports from."""
        path = self.options.megatron if MEGATRON_SHIM in command else ROOT if command[0] == sys.executable else ""
        threads = {"RAYON_NUM_THREADS": str(self.options.threads), "TOKENIZERS_PARALLELISM": "true"}
        offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
        return {**os.environ, **threads, **offline, "PYTHONPATH": str(path)}

    def output(self, command: Sequence[str]) -> str:
        """Standard output of a command. Raises Failed unless it exits with 0."""
        environment = self.environment_of(command)
        done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=self.work, check=False)
        if done.returncode:
            output = f"{done.stdout[-1000:]}{done.stderr[-1500:]}"
            raise Failed(f"{' '.join(command)[:200]}: exit status {done.returncode}\n{output}")
        return done.stdout

    def timed(self, command: Sequence[str], text: int = 0) -> dict[str, float]:
        """Seconds of a command from process start to its end, by the clock and of processor time, and MB/s of `text` bytes."""
        start, used = time.perf_counter(), cpu_seconds_of_children()
        self.output(command)
        return speeds(text, time.perf_counter() - start, cpu_seconds_of_children() - used)

    def peak_mb(self, command: Sequence[str], every: float = 0.02) -> float:
        """Peak memory of a command and its descendants, in MB, sampled with this period in seconds."""
        peak, environment = 0, self.environment_of(command)
        with psutil.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=environment) as process:
            while process.poll() is None:
                peak = max(peak, memory_of(process))
                time.sleep(every)
        return peak / 1e6

    def take_turns(self, calls: Mapping[str, Callable[[], dict[str, float]]]) -> dict[str, dict[str, list[float]]]:
        """What each call returned in every round, by key."""
        found: dict[str, dict[str, list[float]]] = {name: {} for name in calls}
        for _ in range(self.options.repeats):
            for name, call in calls.items():
                for key, value in call().items():
                    found[name].setdefault(key, []).append(value)
        return found

    def row(self, part: str, what: str, values: Sequence[float], unit: str, bar: str = "") -> None:
        """Adds and prints the median of values."""
        self.add(Row(part, what, statistics.median(values), unit, min(values), max(values), bar))

    def ratio(self, part: str, what: str, ours: Sequence[float], theirs: Sequence[float], bar: str = "") -> None:
        """Adds and prints the ratio of two medians; its range is that of the rounds' own ratios."""
        each = [a / b for a, b in zip(ours, theirs, strict=True)]
        self.add(Row(part, what, statistics.median(ours) / statistics.median(theirs), "x", min(each), max(each), bar))

    def add(self, row: Row) -> None:
        """Adds and prints a row."""
        self.rows.append(row)
        print(row, flush=True)

    def missing(self, part: str, what: str) -> None:
        """Prints that a contestant is left out."""
        print(f"{part}: skipped {what}", flush=True)


def memory_of(process: psutil.Process) -> int:
    """Proportional set size of a process and its descendants, in bytes."""
    total = 0
    with contextlib.suppress(psutil.NoSuchProcess):
        for one in [process, *process.children(recursive=True)]:
            with contextlib.suppress(psutil.NoSuchProcess, psutil.AccessDenied):  # it has just ended
                memory = one.memory_full_info()
                total += getattr(memory, "pss", memory.rss)
    return total


def cpu_seconds_of_children() -> float:
    """Processor time of the processes that this one has waited for, and of their descendants."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def speeds(text: int, seconds: float, cpu_seconds: float) -> dict[str, float]:
    """Seconds, MB/s and MB per processor second for that many bytes."""
    return {"seconds": seconds, "rate": text / 1e6 / seconds, "cpu_rate": text / 1e6 / max(cpu_seconds, 1e-9)}


def part_tokenise(bench: Bench) -> None:
    """The Hugging Face back end, its raw tokenizer, Megatron's standard tool and `datasets.map`."""
    corpus = bench.corpus(bench.options.mb)
    commands = {"ours": bench.ours(corpus, "hf", "hf")}
    if bench.options.megatron:
        commands["Megatron's standard tool"] = standard_tool(bench, corpus)
    else:
        bench.missing("tokenise", "Megatron's standard tool: give --megatron CHECKOUT")
    if importlib.util.find_spec("datasets"):
        arguments = {"corpus": str(corpus), "tokenizer": bench.tokenizer(), "folder": str(bench.work)}
        script = str(ROOT / "tools/bench/data_rounds.py")
        commands["datasets.map"] = [sys.executable, script, "datasets_map", json.dumps(arguments)]
    else:
        bench.missing("tokenise", "datasets.map: pip install datasets")
    bars = {"raw encode_batch_fast": ">= 0.85", "Megatron's standard tool": ">= 2.5"}
    compare(bench, "tokenise", corpus, commands, {"raw encode_batch_fast": "encode_hf"}, bars, "<= 250")
    if bench.options.megatron:
        same_bytes(bench, "tokenise", "hf", "standard")


def part_fast(bench: Bench) -> None:
    """The gigatoken back end, raw gigatoken and Megatron's tools."""
    if importlib.util.find_spec("gigatoken") is None:
        return bench.missing("fast", "all of it: gigatoken is not installed")
    corpus = bench.corpus(bench.options.fast_mb)
    commands = {"ours": bench.ours(corpus, "fast", "gigatoken")}
    if bench.options.megatron:
        fast = bench.megatron("preprocess_data_fast.py", corpus, "their_fast", "--use-gigatoken")
        commands["Megatron's fast tool"] = fast
        if bench.options.standard_in_fast:
            commands["Megatron's standard tool"] = standard_tool(bench, corpus)
    else:
        bench.missing("fast", "Megatron's tools: give --megatron CHECKOUT")
    bars = {"raw gigatoken": ">= 0.30", "Megatron's fast tool": ">= 5", "Megatron's standard tool": ">= 40"}
    compare(bench, "fast", corpus, commands, {"raw gigatoken": "encode_gigatoken"}, bars, "<= 500")
    if bench.options.megatron:
        same_bytes(bench, "fast", "fast", "their_fast")


def compare(
    bench: Bench,
    part: str,
    corpus: Path,
    commands: Mapping[str, list[str]],
    roles: Mapping[str, str],
    bars: Mapping[str, str],
    peak_bar: str,
) -> None:
    """Rows of rates, of ratios to ours by the clock (with bars) and by processor time, and of peak memory."""
    text = corpora.text_bytes(corpus)

    def encoded(role: str) -> Callable[[], dict[str, float]]:
        measure = bench.role(role, corpus=str(corpus), tokenizer=bench.tokenizer())
        return lambda: speeds(text, **measure())

    calls: dict[str, Callable[[], dict[str, float]]] = {
        name: partial(bench.timed, command, text) for name, command in commands.items()
    }
    calls |= {name: encoded(role) for name, role in roles.items()}
    found = bench.take_turns(calls)
    for name, figures in found.items():
        bench.row(part, f"{name}, {text / 1e6:.0f} MB", figures["rate"], "MB/s")
    for name in [name for name in found if name != "ours"]:
        bench.ratio(part, f"ours / {name}", found["ours"]["rate"], found[name]["rate"], bars.get(name, ""))
        bench.ratio(part, f"ours / {name}, per processor second", found["ours"]["cpu_rate"], found[name]["cpu_rate"])
    for name, command in commands.items():
        bar = peak_bar if name == "ours" else ""
        bench.row(part, f"peak memory of {name}", [bench.peak_mb(command)], "MB", bar)


def part_grow(bench: Bench) -> None:
    """Rate and peak memory of the gigatoken back end on --grow-gb gigabytes in which new words never end, and on less.

    From a tenth on the peak must be flat: what the back end remembers of the words has reached its bound by then.
    """
    sizes = [int(bench.options.grow_gb * 1e9 / part) for part in (100, 10, 1)]
    free = shutil.disk_usage(bench.work).free
    if free < 1.6 * sizes[-1]:
        raise Failed(f"{free / 1e9:.1f} GB are free in {bench.work}; {1.6 * sizes[-1] / 1e9:.1f} GB are needed")
    peaks = []
    for size in sizes:
        corpus = bench.work / "grow.jsonl"
        text = corpora.write_corpus(corpus, corpora.growing_documents(size))
        command = bench.ours(corpus, "grow", "gigatoken")
        found = bench.timed(command, text)
        peaks.append(bench.peak_mb(command, every=0.2))
        for path in bench.work.glob("grow*"):
            path.unlink()
        bench.row("grow", f"gigatoken back end, {size / 1e6:g} MB", [found["rate"]], "MB/s")
        bench.row("grow", f"per processor second, {size / 1e6:g} MB", [found["cpu_rate"]], "MB/s")
        bench.row("grow", f"peak memory, {size / 1e6:g} MB", peaks[-1:], "MB", "<= 500")
    bench.ratio("grow", "peak memory / that at a tenth", peaks[2:], peaks[1:2], "<= 1.25")


def part_start(bench: Bench) -> None:
    """Process start to the finished data set of a single document."""
    corpus = bench.work / "one.jsonl"
    corpus.write_text(json.dumps({"text": "One document."}) + "\n")
    commands = {"ours": bench.ours(corpus, "one")}
    if bench.options.megatron:
        workers = ("--workers", str(bench.options.threads))
        commands["Megatron's standard tool"] = bench.megatron("preprocess_data.py", corpus, "their_one", *workers)
    found = bench.take_turns({name: partial(bench.timed, command) for name, command in commands.items()})
    for name, figures in found.items():
        bench.row("start", f"one document, {name}", figures["seconds"], "s", "<= 1" if name == "ours" else "")


def part_reads(bench: Bench) -> None:
    """Packed samples of 2048 tokens per second of processor time, from documents of 100 and of 1000 tokens.

    GPTDataset resets positions and loss mask at document ends without building its s x s attention mask, which would
    make it ten times slower. Its samples make a batch by torch's default_collate, as in Megatron's loader.
    """
    check = [bench.peer_python, "-c", "import megatron.core.datasets.gpt_dataset"]
    theirs = subprocess.run(check, capture_output=True, check=False).returncode == 0
    if not theirs:
        bench.missing("reads", "GPTDataset: --peer-python cannot import megatron-core")
    for length, bar in ((100, ">= 4"), (1000, ">= 8")):
        prefix = corpora.random_tokens(bench.work / f"random-{length}", length, bench.options.read_tokens)
        common = {"prefix": prefix, "seq_length": SEQ_LENGTH, "eod": corpora.EOD, "batch": MICRO_BATCH}
        common |= {"cache": str(bench.work / f"cache-{length}")}
        calls = {
            "plain": bench.role("reads_ours", mask=False, samples=4000, **common),
            "positions and cu_seqlens": bench.role("reads_ours", mask=True, samples=4000, **common),
        }
        if theirs:
            calls["GPTDataset"] = bench.role("reads_megatron", mask=False, samples=2000, **common)
            calls["GPTDataset, resets"] = bench.role("reads_megatron", mask=True, samples=400, **common)
        found = bench.take_turns(calls)
        for key, words in (("alone", "single samples"), ("batch", f"batches of {MICRO_BATCH}")):
            what = f"{length}-token documents, {words}"
            for name, figures in found.items():
                bench.row("reads", f"{name}, {what}", figures[key], "samples/s")
            pairs = (("plain", "GPTDataset", bar), ("positions and cu_seqlens", "GPTDataset, resets", ">= 10"))
            for name, peer, least in pairs if theirs else ():
                bench.ratio("reads", f"{name} / {peer}, {what}", found[name][key], found[peer][key], least)


def part_index(bench: Bench) -> None:
    """Ten million documents: from the path to the first sample, and to any other."""
    prefix = corpora.many_documents(
        bench.work / f"index-{bench.options.index_documents}", bench.options.index_documents
    )
    ours = bench.take_turns({"ours": bench.role("index_ours", prefix=prefix, seq_length=SEQ_LENGTH)})["ours"]
    documents = f"{bench.options.index_documents:,} documents"
    bench.row("index", f"open to first sample, {documents}", ours["seconds"], "s", "<= 1.5")
    bench.row("index", "seek within an epoch, worst of 200", ours["worst_seek_ms"], "ms", "<= 10")
    bench.row("index", "first sample of another epoch", ours["other_epoch_ms"], "ms")
    bench.row("index", "state to resume from", ours["state_bytes"], "bytes", "<= 1024")


def standard_tool(bench: Bench, corpus: Path) -> list[str]:
    """The command of Megatron's standard tool."""
    extra = ("--workers", str(bench.options.threads), "--log-interval", "1000000")
    return bench.megatron("preprocess_data.py", corpus, "standard", *extra)


def same_bytes(bench: Bench, part: str, ours: str, theirs: str) -> None:
    """A row of how many of .bin and .idx Megatron's tool wrote otherwise."""
    files = [[bench.work / f"{prefix}_text_document.{end}" for prefix in (ours, theirs)] for end in ("bin", "idx")]
    different = sum(one.read_bytes() != other.read_bytes() for one, other in files)
    bench.row(part, "files that differ from those of Megatron's tool", [different], "", "<= 0")


PARTS: dict[str, Callable[[Bench], None]] = {
    "tokenise": part_tokenise,
    "fast": part_fast,
    "start": part_start,
    "reads": part_reads,
    "index": part_index,
    "grow": part_grow,
}


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(prog="tools/bench/data.py", description=__doc__, allow_abbrev=False)
    add = parser.add_argument
    usual = [part for part in PARTS if part != "grow"]
    add("--parts", nargs="+", choices=tuple(PARTS), default=usual, metavar="PART", help=f"of {', '.join(PARTS)}")
    add("--megatron", type=Path, metavar="FOLDER", help="a checkout of Megatron-LM, for its tools")
    add("--peer-python", metavar="PYTHON", help="the interpreter with megatron-core (this one)")
    add("--corpus", type=Path, metavar="FILE", help='JSON lines with "text" (Python sources and docs of this machine)')
    add("--mb", type=float, default=20.0, help="megabytes of text in tokenise (20)")
    add("--fast-mb", type=float, default=100.0, help="megabytes of text in fast (100)")
    add("--standard-in-fast", action="store_true", help="also run Megatron's standard tool in fast (minutes per round)")
    add("--threads", type=int, default=2, help="threads or workers of every contestant (2)")
    add("--repeats", type=int, default=3, help="rounds; medians are reported (3)")
    add("--read-tokens", type=int, default=20_000_000, help="tokens of the data set in reads (20 million)")
    add("--index-documents", type=int, default=10_000_000, help="documents in index (10 million)")
    add("--grow-gb", type=float, default=10.0, help="gigabytes of text in grow (10)")
    add(
        "--work",
        type=Path,
        metavar="FOLDER",
        help="where corpora and outputs are written and kept (a temporary folder)",
    )
    add("--json", type=Path, metavar="FILE", help="write the rows and the options")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the parts; returns the exit status."""
    options = build_parser().parse_args(argv)
    failed = False
    with tempfile.TemporaryDirectory(prefix="bench-data-") as temporary:
        work = options.work or Path(temporary)
        work.mkdir(parents=True, exist_ok=True)
        bench = Bench(options, work.resolve())
        for part in options.parts:
            print(f"{part}: load average {os.getloadavg()[0]:.1f}", flush=True)
            try:
                PARTS[part](bench)
            except Failed as error:
                failed = True
                print(f"{part}: {error}", file=sys.stderr, flush=True)
    if options.json:
        rows = [asdict(row) | {"holds": row.holds} for row in bench.rows]
        settings = {name: str(value) if isinstance(value, Path) else value for name, value in vars(options).items()}
        options.json.write_text(json.dumps({"options": settings, "rows": rows}, indent=2) + "\n")
    missed = [row for row in bench.rows if row.holds is False]
    print(f"{sum(row.holds is True for row in bench.rows)} bars hold, {len(missed)} do not", flush=True)
    for row in missed:
        print(f"missed: {row}")
    return 2 if failed else int(bool(missed))


if __name__ == "__main__":
    sys.exit(main())
