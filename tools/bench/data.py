"""Time the data path beside its peers, against the bars it is held to: a table, JSON and a picture.

Parts (--parts): tokenise (the Hugging Face back end, raw `encode_batch_fast`, Megatron's standard tool, `datasets.map`),
fast (the gigatoken back end, raw gigatoken, Megatron's fast tool), memory (peak at one and four times the input), start
(process start to a data set of one document), reads (packed samples a second beside GPTDataset), index (10M documents:
build, seek, state), stream (samples straight from text) and hash (the same bytes for any number of workers, and after kill -9 with --resume).
Not among them unless named: grow (rate and peak memory at --grow-gb gigabytes beside a tenth and a hundredth; minutes, and disk for one and a half times that).

Every contestant runs in a process of its own and they take turns, so that a busy machine slows them alike; medians of
--repeats rounds. Peak memory is the proportional set size of the whole process tree (shared pages count once), sampled
every 20 ms in a run of its own: looking costs the processes that are looked at a seventh of their speed. Peers that are missing are named and left out. Megatron's tools come from a checkout (--megatron) and run, as
megatron-core does, in --peer-python, where it, torch and transformers can be imported.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))  # run from a checkout that is not installed

from tools.bench.data_corpora import (  # noqa: E402
    EOD,
    growing_documents,
    many_documents,
    random_tokens,
    text_bytes,
    write_corpus,
)
from tools.bench.data_stage import SAMPLE_SECONDS, Bench, Contestant, Failed, Measured, Row, Speed, line  # noqa: E402

SEQ_LENGTH = 2048
MICRO_BATCH = 8


def part_tokenise(bench: Bench) -> None:
    """The Hugging Face back end beside its raw tokenizer, Megatron's standard tool and `datasets.map`."""
    corpus = bench.corpus(bench.options.mb)
    text = text_bytes(corpus)
    raw = Contestant(bench, "encode_hf", {"tokenizer": str(bench.tokenizer()), "corpus": str(corpus)})
    calls: dict[str, Measured] = {
        "ours": whole(bench, bench.ours(corpus, "hf", *backend(bench, "hf")), text),
        "raw encode_batch_fast": lambda _=None: encoding(raw.go(), text),
    }
    if bench.options.megatron:
        calls["Megatron's standard tool"] = whole(bench, standard_tool(bench, corpus), text)
    else:
        bench.missing("tokenise", "Megatron's standard tool: give --megatron CHECKOUT")
    if importlib.util.find_spec("datasets"):
        calls["datasets.map"] = lambda sample_seconds=None: mapping(bench, corpus, text, sample_seconds)
    else:
        bench.missing("tokenise", "datasets.map: pip install datasets")
    found = bench.take_turns(calls)
    raw.close()
    peaks = {name: call(SAMPLE_SECONDS).peak_mb for name, call in calls.items() if not name.startswith("raw ")}
    bars = {"raw encode_batch_fast": ">= 0.85", "Megatron's standard tool": ">= 2.5"}
    compare(bench, "tokenise", f"Hugging Face back end, {text / 1e6:.0f} MB", found, bars)
    report_peaks(bench, "tokenise", peaks, "<= 250")
    if "Megatron's standard tool" in calls:
        same_bytes(bench, "tokenise", "hf", "standard")


def part_fast(bench: Bench) -> None:
    """The gigatoken back end beside raw gigatoken and both of Megatron's tools."""
    if importlib.util.find_spec("gigatoken") is None or not backend(bench, "gigatoken"):
        return bench.missing("fast", "all of it: gigatoken is not installed, or this tool has no --backend gigatoken")
    corpus = bench.corpus(bench.options.fast_mb)
    text = text_bytes(corpus)
    raw = Contestant(bench, "encode_gigatoken", {"tokenizer": str(bench.tokenizer()), "corpus": str(corpus)})
    calls: dict[str, Measured] = {
        "ours": whole(bench, bench.ours(corpus, "fast", *backend(bench, "gigatoken")), text),
        "raw gigatoken": lambda _=None: encoding(raw.go(), text),
    }
    if bench.options.megatron:
        fast = bench.megatron("preprocess_data_fast.py", corpus, "their_fast", "--use-gigatoken")
        calls["Megatron's fast tool"] = whole(bench, fast, text)
    else:
        bench.missing("fast", "Megatron's tools: give --megatron CHECKOUT")
    if bench.options.megatron and bench.options.standard_in_fast:
        calls["Megatron's standard tool"] = whole(bench, standard_tool(bench, corpus), text)
    found = bench.take_turns(calls)
    raw.close()
    peaks = {name: call(SAMPLE_SECONDS).peak_mb for name, call in calls.items() if not name.startswith("raw ")}
    bars = {"raw gigatoken": ">= 0.30", "Megatron's fast tool": ">= 5", "Megatron's standard tool": ">= 40"}
    compare(bench, "fast", f"gigatoken back end, {text / 1e6:.0f} MB", found, bars)
    report_peaks(bench, "fast", peaks, "<= 500")
    if "Megatron's fast tool" in calls:
        same_bytes(bench, "fast", "fast", "their_fast")


def compare(bench: Bench, part: str, what: str, found: Mapping[str, list[Speed]], bars: Mapping[str, str]) -> None:
    """Rows of rates, and of ratios to ours by the clock (with bars) and by processor time."""
    rates = {name: [speed.rate for speed in speeds] for name, speeds in found.items()}
    cpu_rates = {name: [speed.cpu_rate for speed in speeds] for name, speeds in found.items()}
    for name, figures in rates.items():
        bench.row(part, what if name == "ours" else name, figures, "MB/s")
    for name in [name for name in found if name != "ours"]:
        bench.ratio(part, what, rates["ours"], name, rates[name], bars.get(name, ""))
        bench.ratio(part, f"{what}, MB a processor second", cpu_rates["ours"], name, cpu_rates[name])


def report_peaks(bench: Bench, part: str, peaks: Mapping[str, float], bar: str) -> None:
    """A row of peak memory each; the bar is on ours."""
    for name, peak in peaks.items():
        bench.row(part, f"peak memory of {name}", [peak], "MB", bar if name == "ours" else "")


def part_memory(bench: Bench) -> None:
    """Our peak memory at one and at four times the input: flat means that it does not follow the input.

    The smaller input has to fill every worker's batch, as 20 MB do; less than 1.25 times is counted as flat.
    """
    cases = {"hf": (bench.options.mb, "<= 250"), "gigatoken": (bench.options.fast_mb / 4, "<= 500")}
    for name, (size, bar) in cases.items():
        if name == "gigatoken" and not backend(bench, name):
            bench.missing("memory", "gigatoken: this tool has no --backend gigatoken")
            continue
        small, large = (bench.corpus(size * factor) for factor in (1, 4))
        peaks = bench.take_turns(
            {
                "small": lambda: bench.peak_mb(bench.ours(small, "memory", *backend(bench, name))),  # noqa: B023
                "large": lambda: bench.peak_mb(bench.ours(large, "memory", *backend(bench, name))),  # noqa: B023
            }
        )
        bench.row("memory", f"peak of the {name} back end, {size * 4:g} MB", peaks["large"], "MB", bar)
        bench.ratio("memory", f"peak at {size * 4:g} MB", peaks["large"], f"at {size:g} MB", peaks["small"], "<= 1.25")


def part_grow(bench: Bench) -> None:
    """Rate and peak memory of the gigatoken back end on --grow-gb gigabytes in which new words never end, and on less.

    Flat is what it has to be from a tenth on, when what the back end remembers of the words has reached its bound.
    """
    sizes = {
        f"{bench.options.grow_gb * 1e3 / part:g} MB": int(bench.options.grow_gb * 1e9 / part) for part in (100, 10, 1)
    }
    free = shutil.disk_usage(bench.work).free
    if free < 1.6 * max(sizes.values()):
        raise Failed(
            f"{free / 1e9:.1f} GB are free in {bench.work}; {1.6 * max(sizes.values()) / 1e9:.1f} GB are needed"
        )
    speeds: dict[str, Speed] = {}
    for name, size in sizes.items():
        corpus = bench.work / "grow.jsonl"
        text = write_corpus(corpus, growing_documents(size))
        run = bench.run(bench.ours(corpus, "grow", *backend(bench, "gigatoken")), sample_seconds=0.2)
        speeds[name] = speed = Speed.of(text, run)
        for path in bench.work.glob("grow*"):
            path.unlink()
        bench.row("grow", f"gigatoken back end, {name}", [speed.rate], "MB/s")
        bench.row("grow", f"MB a processor second, {name}", [speed.cpu_rate], "MB/s")
        bench.row("grow", f"peak memory, {name}", [speed.peak_mb], "MB", "<= 500")
    small, middle, large = sizes
    for less, bar in ((small, ""), (middle, "<= 1.25")):
        ours, theirs = speeds[large], speeds[less]
        bench.ratio("grow", f"rate at {large}", [ours.rate], f"at {less}", [theirs.rate])
        bench.ratio("grow", f"MB a processor second at {large}", [ours.cpu_rate], f"at {less}", [theirs.cpu_rate])
        bench.ratio("grow", f"peak memory at {large}", [ours.peak_mb], f"at {less}", [theirs.peak_mb], bar)


def part_start(bench: Bench) -> None:
    """Process start to the finished data set of a single document."""
    corpus = bench.work / "one.jsonl"
    corpus.write_text(json.dumps({"text": "One document."}) + "\n")
    calls = {"ours": lambda: bench.run(bench.ours(corpus, "one")).seconds}
    if bench.options.megatron:
        extra = ("--workers", str(bench.options.threads))
        command = bench.megatron("preprocess_data.py", corpus, "their_one", *extra)
        calls["Megatron's standard tool"] = lambda: bench.run(command).seconds
    found = bench.take_turns(calls)
    for name, seconds in found.items():
        bench.row("start", f"one document, {name}", seconds, "s", "<= 1" if name == "ours" else "")


def part_reads(bench: Bench) -> None:
    """Packed samples of 2048 tokens a second from documents of 100 and of 1000 tokens, alone and as micro batches.

    GPTDataset resets positions and loss mask at document ends without building its s x s attention mask, which would
    make it ten times slower still. Its samples make a batch by torch's default_collate, as in Megatron's loader.
    Seconds are of processor time, which other work on the machine hardly changes.
    """
    theirs = has_megatron_core(bench, "reads")
    for length, bar in ((100, ">= 4"), (1000, ">= 8")):
        common = {
            "prefix": random_tokens(bench.work / f"random-{length}", length, bench.options.read_tokens),
            "seq_length": SEQ_LENGTH,
            "eod": EOD,
            "batch": MICRO_BATCH,
        }
        common |= {"cache": str(bench.work / f"cache-{length}")}
        plans = {"plain": ("reads_ours", False, 4000), "positions and cu_seqlens": ("reads_ours", True, 4000)}
        if theirs:
            plans |= {
                "GPTDataset": ("reads_megatron", False, 2000),
                "GPTDataset, resets": ("reads_megatron", True, 400),
            }
        players = {
            name: Contestant(bench, role, common | {"mask": mask, "samples": count})
            for name, (role, mask, count) in plans.items()
        }
        found = bench.take_turns({name: player.go for name, player in players.items()})
        for player in players.values():
            player.close()
        for unit, words in (("alone", "single samples"), ("batch", f"batches of {MICRO_BATCH}")):
            rates = {name: [answer[unit] for answer in answers] for name, answers in found.items()}
            what = f"{length}-token documents, {words}"
            for name, figures in rates.items():
                bench.row("reads", f"{name}, {what}", figures, "samples/s")
            if theirs:
                one, two = "positions and cu_seqlens", "GPTDataset, resets"
                bench.ratio("reads", f"plain, {what}", rates["plain"], "GPTDataset", rates["GPTDataset"], bar)
                bench.ratio("reads", f"{one}, {what}", rates[one], two, rates[two], ">= 10")


def part_index(bench: Bench) -> None:
    """Ten million documents: from the path to the first sample, and to any other."""
    prefix = many_documents(bench.work / f"index-{bench.options.index_documents}", bench.options.index_documents)
    common = {"prefix": prefix, "seq_length": SEQ_LENGTH, "eod": EOD, "cache": str(bench.work / "cache-index")}
    ours = Contestant(bench, "index_ours", common)
    theirs = Contestant(bench, "index_megatron", common) if has_megatron_core(bench, "index") else None
    answers: dict[str, list[dict[str, Any]]] = {"ours": [], "theirs": []}
    for _ in range(bench.options.repeats):
        answers["ours"].append(ours.go())
        if theirs:
            answers["theirs"].append(theirs.go())
    ours.close()

    def each(key: str, who: str = "ours", factor: float = 1.0) -> list[float]:
        return [answer[key] * factor for answer in answers[who]]

    bench.row(
        "index", f"open to first sample, {bench.options.index_documents:,} documents", each("seconds"), "s", "<= 1.5"
    )
    bench.row("index", "of that, opening", each("open_seconds"), "s")
    bench.row("index", "seek within an epoch, worst of 200", each("worst_seek_seconds", factor=1e3), "ms", "<= 10")
    bench.row("index", "first sample of another epoch", each("other_epoch_seconds", factor=1e3), "ms")
    bench.row("index", "state to resume from", each("state_bytes"), "bytes", "<= 1024")
    if theirs:
        theirs.close()
        bench.row("index", "GPTDataset, cold cache", each("seconds", "theirs"), "s")
        bench.row("index", "its cache on the disk", each("cache_bytes", "theirs", 1e-6), "MB")
        bench.ratio("index", "GPTDataset's build", each("seconds", "theirs"), "ours", each("seconds"))


def part_stream(bench: Bench) -> None:
    """Packed samples a second straight from text, tokenised on the way, beside `datasets`.

    A round of ours takes ten times as many samples, so that it too is long enough to read windows of the corpus anew.
    """
    corpus = bench.corpus(bench.options.mb)
    common = {"tokenizer": str(bench.tokenizer()), "corpus": str(corpus), "seq_length": SEQ_LENGTH}
    players = {"ours": Contestant(bench, "stream_ours", common | {"samples": 10 * bench.options.stream_samples})}
    if importlib.util.find_spec("datasets"):
        arguments = common | {"samples": bench.options.stream_samples}
        players["datasets, streaming"] = Contestant(bench, "stream_datasets", arguments)
    else:
        bench.missing("stream", "datasets: pip install datasets")
    found = bench.take_turns({name: player.go for name, player in players.items()})
    for player in players.values():
        player.close()
    rates = {name: [answer["samples_per_second"] for answer in answers] for name, answers in found.items()}
    for name, figures in rates.items():
        bench.row("stream", f"{name}, samples of {SEQ_LENGTH}", figures, "samples/s")
        bench.row("stream", f"{name}, first sample", [found[name][0]["first_seconds"]], "s")
    for name in list(rates)[1:]:
        bench.ratio("stream", "ours", rates["ours"], name, rates[name])


def part_hash(bench: Bench) -> None:
    """The same files for 1, 2, 3 and 7 workers, and after kill -9 at random moments with --resume."""
    corpus = bench.corpus(bench.options.mb / 4)
    shards = ("--shard-size", "1MB") if "--shard-size" in bench.help() else ()
    hashes, seconds = set(), 0.0
    for workers in (1, 2, 3, 7):
        seconds = bench.run(bench.ours(corpus, "hash", *shards, workers=workers)).seconds
        hashes.add(hash_of(bench, "hash"))
    bench.row("hash", "different outputs of 1, 2, 3 and 7 workers", [len(hashes)], "", "<= 1")
    if "--resume" not in bench.help():
        return bench.missing("hash", "kill and resume: this tool has no --resume")
    order = random.Random(1)
    killed = 0
    for number in range(bench.options.kills):
        prefix = f"killed-{number}"
        command = [part for part in bench.ours(corpus, prefix, *shards) if part != "--overwrite"]
        killed += kill_after(bench, command, seconds * order.uniform(0.1, 0.9))
        done = bench.work / f"{prefix}_text_document.manifest.json"
        if not done.exists():
            bench.run([*command, "--resume"])
        hashes.add(hash_of(bench, prefix))
    bench.row("hash", f"different outputs with {killed} killed and resumed runs", [len(hashes)], "", "<= 1")


def kill_after(bench: Bench, command: Sequence[str], seconds: float) -> bool:
    """Starts a command and kills its whole process group after so long; whether it was still running."""
    environment = bench.environment | {"PYTHONPATH": str(ROOT)}
    with subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=environment, start_new_session=True
    ) as process:
        time.sleep(seconds)
        if process.poll() is not None:
            return False
        os.killpg(process.pid, signal.SIGKILL)
    return True


def hash_of(bench: Bench, prefix: str) -> str:
    """SHA-256 over a data set's .bin and .idx."""
    digest = hashlib.sha256()
    for suffix in ("bin", "idx"):
        digest.update((bench.work / f"{prefix}_text_document.{suffix}").read_bytes())
    return digest.hexdigest()


def same_bytes(bench: Bench, part: str, ours: str, theirs: str) -> None:
    """A row that says whether Megatron's tool wrote the same .bin and .idx."""
    different = float(hash_of(bench, ours) != hash_of(bench, theirs))
    bench.row(part, "different bytes from Megatron's tool (0 no, 1 yes)", [different], "", "<= 0")


def backend(bench: Bench, name: str) -> tuple[str, ...]:
    """The option that chooses a back end, where this tool has one."""
    return ("--backend", name) if "--backend" in bench.help() else ()


def standard_tool(bench: Bench, corpus: Path) -> list[str]:
    """The command of Megatron's standard tool."""
    extra = ("--workers", str(bench.options.threads), "--log-interval", "1000000")
    return bench.megatron("preprocess_data.py", corpus, "standard", *extra)


def whole(bench: Bench, command: list[str], text: int) -> Measured:
    """Runs a command from process start to its end."""
    return lambda sample_seconds=None: Speed.of(text, bench.run(command, sample_seconds=sample_seconds))


def mapping(bench: Bench, corpus: Path, text: int, sample_seconds: float | None) -> Speed:
    """`datasets.map` to the disk, with an empty cache, process start included."""
    with tempfile.TemporaryDirectory(dir=bench.work) as folder:
        arguments = {"corpus": str(corpus), "tokenizer": str(bench.tokenizer())}
        arguments |= {"cache": f"{folder}/cache", "output": f"{folder}/tokens"}
        command = bench.rounds("hf_map", arguments)
        return Speed.of(text, bench.run(command, stdin="go\n", sample_seconds=sample_seconds))


def encoding(answer: dict[str, Any], text: int) -> Speed:
    """A raw tokenizer's round."""
    assert answer["bytes"] == text, (answer["bytes"], text)
    return Speed(text / 1e6 / answer["seconds"], text / 1e6 / answer["cpu_seconds"])


def has_megatron_core(bench: Bench, part: str) -> bool:
    """Whether --peer-python can import megatron-core's data sets; says so if it cannot."""
    check = [bench.peer_python, "-c", "import megatron.core.datasets.gpt_dataset"]
    found = subprocess.run(check, capture_output=True, env=bench.environment, check=False).returncode == 0
    if not found:
        bench.missing(part, "GPTDataset: --peer-python cannot import megatron-core")
    return found


def plot(rows: Sequence[Row], path: str) -> None:
    """Every figure that has a bar, as a multiple of it: right of 1 holds."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    barred = [row for row in rows if row.bar and float(row.bar.split()[1]) > 0][::-1]
    figure, axes = pyplot.subplots(figsize=(9, 1 + 0.35 * len(barred)), layout="constrained")
    margins = []
    for row in barred:
        sign, limit = row.bar.split()
        figure_of_row = max(row.value if row.ratio is None else row.ratio, 1e-9)
        margins.append(figure_of_row / float(limit) if sign == ">=" else float(limit) / figure_of_row)
    axes.barh(range(len(barred)), margins, color=["tab:green" if row.holds else "tab:red" for row in barred])
    axes.set_yticks(
        range(len(barred)), [f"{row.what}{' / ' + row.peer if row.peer else ''}  ({row.bar})" for row in barred]
    )
    axes.set_xscale("log")
    axes.axvline(1.0, color="black", linewidth=1)
    axes.set_xlabel("times better than its bar")
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


PARTS: dict[str, Callable[[Bench], None]] = {
    "tokenise": part_tokenise,
    "fast": part_fast,
    "memory": part_memory,
    "start": part_start,
    "reads": part_reads,
    "index": part_index,
    "hash": part_hash,
    "stream": part_stream,
    "grow": part_grow,
}


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(prog="tools/bench/data.py", description=__doc__, allow_abbrev=False)
    add = parser.add_argument
    add(
        "--parts",
        nargs="+",
        choices=tuple(PARTS),
        default=[part for part in PARTS if part != "grow"],
        metavar="PART",
        help=f"of {', '.join(PARTS)} (all but grow)",
    )
    add("--megatron", type=Path, metavar="FOLDER", help="a checkout of Megatron-LM, for its tools")
    add("--peer-python", metavar="PYTHON", help="the interpreter with megatron-core (this one)")
    add("--corpus", type=Path, metavar="FILE", help='JSON lines with "text" (Python sources and docs of this machine)')
    add("--mb", type=float, default=20.0, help="megabytes of text in tokenise; memory and hash take from it (20)")
    add("--fast-mb", type=float, default=100.0, help="megabytes of text in fast (100)")
    add("--standard-in-fast", action="store_true", help="also run Megatron's standard tool in fast (minutes a round)")
    add("--threads", type=int, default=2, help="threads or workers of every contestant (2)")
    add("--repeats", type=int, default=3, help="rounds; medians are reported (3)")
    add("--read-tokens", type=int, default=20_000_000, help="tokens of the data set in reads (20 million)")
    add("--index-documents", type=int, default=10_000_000, help="documents in index (10 million)")
    add("--stream-samples", type=int, default=400, help="samples a round in stream (400)")
    add("--grow-gb", type=float, default=10.0, help="gigabytes of text in grow (10)")
    add("--kills", type=int, default=5, help="killed runs in hash (5)")
    add("--work", type=Path, metavar="FOLDER", help="where corpora and outputs go, and stay (a temporary folder)")
    add("--json", type=Path, metavar="FILE", help="write the rows and the options")
    add("--plot", metavar="FILE", help="write a PNG of every figure against its bar")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the parts: 0 when every bar that was measured holds, 1 when one does not, 2 when a contestant failed."""
    options = build_parser().parse_args(argv)
    failed = False
    loads: list[str] = []
    with tempfile.TemporaryDirectory(prefix="bench-data-") as temporary:
        work = options.work or Path(temporary)
        work.mkdir(parents=True, exist_ok=True)
        bench = Bench(options, work.resolve())
        for part in options.parts:
            loads.append(f"{part} {os.getloadavg()[0]:.1f}")
            try:
                PARTS[part](bench)
            except Failed as error:
                failed = True
                print(f"{part}: {error}", file=sys.stderr, flush=True)
    if options.json:
        rows = [asdict(row) | {"holds": row.holds} for row in bench.rows]
        settings = {name: str(value) if isinstance(value, Path) else value for name, value in vars(options).items()}
        options.json.write_text(json.dumps({"options": settings, "load": loads, "rows": rows}, indent=2) + "\n")
    if options.plot:
        plot(bench.rows, options.plot)
    print(f"load average (1 minute) at the start of each part: {', '.join(loads)}")
    missed = [row for row in bench.rows if row.holds is False]
    print(f"{sum(row.holds is True for row in bench.rows)} bars hold, {len(missed)} do not", flush=True)
    for row in missed:
        print(f"missed: {line(row)}")
    return 2 if failed else int(bool(missed))


if __name__ == "__main__":
    sys.exit(main())
