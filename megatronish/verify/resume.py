"""Compare a run that is killed again and again with an uninterrupted one, bit for bit."""

from __future__ import annotations

import json
import shutil
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors import safe_open

from megatronish.checkpoint.store import CheckpointStore, step_of
from megatronish.config.base import merge
from megatronish.config.run import BLOCK, RunConfig
from megatronish.errors import ConfigError
from megatronish.verify.attempts import Attempt, digest_of, run_attempt
from megatronish.verify.kills import Kill, plan_kills

HEADER = (
    f"{'kill':>4}  {'kind':<7}{'rank':>4}{'others after':>14}{'from step':>11}{'in step':>9}{'newest after':>14}  where"
)
COMPARED = ("batches", "rng", "loss_sum", "norm", "rng_after")
SMALL_RUN: dict[str, Any] = {
    "train_micro_batch_size_per_gpu": 2,
    "gradient_accumulation_steps": 2,
    "gradient_clipping": 0.5,
    "zero_optimization": {"stage": 2},
    "optimizer": {"type": "AdamW", "params": {"lr": 3e-3, "weight_decay": 0.1}},
    BLOCK: {
        "model": {
            "vocab_size": 257,
            "num_layers": 4,
            "hidden_size": 64,
            "num_attention_heads": 4,
            "num_kv_heads": 2,
            "ffn_hidden_size": 128,
            "seq_length": 64,
            "residual_dropout": 0.1,
            "attention_dropout": 0.1,
            "embedding_dropout": 0.1,
        },
        "data": {"document_mask": True, "num_workers": 0},
        "schedule": {"type": "cosine", "warmup_steps": 3},
        "train": {"steps": 1, "save_dir": "unused"},
    },
}


@dataclass
class Proof:
    """The result. problems: each difference from the uninterrupted run, and each kill that did not happen as planned."""

    kills: list[dict[str, Any]] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    steps_compared: int = 0
    tensors: dict[str, str] = field(default_factory=dict)  # hashes of the last checkpoint of the uninterrupted run
    state: dict[str, Any] = field(default_factory=dict)
    seconds: float = 0.0

    def to_json(self) -> dict[str, Any]:
        """As one JSON object."""
        return vars(self)


class ResumeProof:
    """Trains a run without interruption and again with kills, and compares the two.

    run: the contents of the run's file, with command-line overrides; folder: for all files; progress: receives a line of
    progress. Raises ConfigError for a run that cannot be trained.
    """

    def __init__(
        self, run: dict[str, Any], ranks: int, kills: int, save_interval: int, seed: int, folder: Path,
        progress: Callable[[str], None],
    ) -> None:  # fmt: skip
        self._run, self._ranks, self._folder, self._progress = run, ranks, folder, progress
        self.steps = save_interval * (2 * kills + 2)  # more than are reached before the last kill
        self._interval = save_interval
        self.kills = plan_kills(kills, ranks, save_interval, seed)
        self._config("unbroken").batch_plan(1)  # raises ConfigError

    def prove(self, show: Callable[[str], None]) -> Proof:
        """Run all attempts; `show` receives the lines of the table."""
        begin, proof = time.monotonic(), Proof()
        self._progress(f"training {self.steps} steps without interruption on {self._ranks} ranks")
        unbroken = run_attempt(self._config("unbroken"), self._ranks, self._folder / "unbroken-trace")
        reference = [{line["step"]: line for line in trace} for trace in unbroken.traces]
        usual = self._usual(unbroken)
        store = CheckpointStore(self._folder / "killed", 2)
        show(HEADER)
        killing = time.monotonic()
        for number, kill in enumerate(self.kills, 1):
            attempt = run_attempt(self._config("killed"), self._ranks, self._folder / f"attempt-{number}", kill, usual)
            line = self._note(number, kill, attempt, store, proof)
            show(line)
            self._compare_steps(f"kill {number}", attempt, reference, proof)
            left = (time.monotonic() - killing) / number * (len(self.kills) - number)
            self._progress(f"{number} of {len(self.kills)} kills done, about {left:.0f} s left")
        last = run_attempt(self._config("killed"), self._ranks, self._folder / "last-trace")
        if proof.kills:
            proof.kills[-1]["resumed_from"] = last.first_step
        self._compare_steps("the last part", last, reference, proof)
        self._compare_ends(proof)
        proof.seconds = time.monotonic() - begin
        return proof

    def _config(self, name: str) -> RunConfig:
        train = {
            "steps": self.steps,
            "save_interval": self._interval,
            "save_dir": str(self._folder / name),
            "log_interval": 1,
            "eval_interval": 0,
            "resume": "auto",
        }
        log = {"tensorboard": False, "wandb": "off"}
        return RunConfig.from_dict(merge(self._run, {BLOCK: {"train": train, "log": log}}), "verify_resume")

    def _usual(self, unbroken: Attempt) -> tuple[float, float]:
        """Median seconds of a step, and of a save according to the log."""
        steps = [line["seconds"] for line in unbroken.traces[0]]
        log = (self._folder / "unbroken-trace" / "0.log").read_text()
        saves = [float(line.split("written in ")[1].split()[0]) for line in log.splitlines() if "written in " in line]
        return statistics.median(steps), statistics.median(saves or [0.1])

    def _note(self, number: int, kill: Kill, attempt: Attempt, store: CheckpointStore, proof: Proof) -> str:
        """Add a kill to the proof, and to the one before it the step from which this attempt resumed; returns its line."""
        newest = store.newest()
        found = {**attempt.killed, "number": number, "newest": step_of(newest) if newest else 0}
        began = attempt.first_step
        if proof.kills and began is not None:
            proof.kills[-1]["resumed_from"] = began
            if began != proof.kills[-1]["newest"]:
                wanted = proof.kills[-1]["newest"]
                proof.problems.append(
                    f"after kill {number - 1} it resumed from step {began}, but the newest checkpoint is of step {wanted}"
                )
        if not attempt.killed:
            proof.problems.append(f"kill {number} ({kill.kind}) did not happen: the run ended first")
            return f"{number:>4}  {kill.kind:<7} did not happen"
        proof.kills.append(found)
        others = "at once" if not kill.late else f"{kill.late:.2f} s"
        start = "-" if began is None else str(began)
        return (
            f"{number:>4}  {kill.kind:<7}{kill.rank:>4}{others:>14}{start:>11}{found['step'] + 1:>9}{found['newest']:>14}"
            f"  {found['where']}"
        )

    def _compare_steps(
        self, name: str, attempt: Attempt, reference: list[dict[int, dict[str, Any]]], proof: Proof
    ) -> None:
        """Compare each step that an attempt completed, on each rank, with that of the uninterrupted run."""
        for rank, trace in enumerate(attempt.traces):
            for line in trace:
                expected = reference[rank][line["step"]]
                differing = [key for key in COMPARED if line[key] != expected[key]]
                proof.steps_compared += 1
                if differing:
                    proof.problems.append(
                        f"{name}, rank {rank}, step {line['step'] + 1}: different {', '.join(differing)}"
                    )

    def _compare_ends(self, proof: Proof) -> None:
        """Compare the last checkpoints, tensor by tensor, and the reported losses."""
        ends = [CheckpointStore(self._folder / run).at(self.steps) for run in ("unbroken", "killed")]
        (proof.tensors, proof.state), (tensors, state) = (checkpoint_digests(end) for end in ends)
        for name in sorted(proof.tensors.keys() | tensors.keys()):
            if proof.tensors.get(name) != tensors.get(name):
                proof.problems.append(f"the last checkpoints differ in {name}")
        if state != proof.state:
            proof.problems.append(f"the last checkpoints have different counters: {state}, uninterrupted {proof.state}")
        losses = [reported_losses(self._folder / run) for run in ("unbroken", "killed")]
        if losses[0] != losses[1] or len(losses[0]) != self.steps:
            proof.problems.append("metrics.jsonl has different losses or gradient norms")


def checkpoint_digests(folder: Path) -> tuple[dict[str, str], dict[str, Any]]:
    """A hash of each tensor and other file of a checkpoint, weights and optimizer state, and its counters."""
    found: dict[str, str] = {}
    for path in sorted([*folder.glob("*.safetensors"), *folder.glob("engine/**/*"), *folder.glob("streams-*")]):
        name = path.relative_to(folder).as_posix()
        if path.suffix == ".safetensors":
            with safe_open(path, framework="pt") as file:
                found |= {f"{name}:{key}": digest_of([file.get_tensor(key)]) for key in file.keys()}  # noqa: SIM118  no dict
                found[f"{name}:header"] = digest_of([file.metadata()])
        elif path.is_file():
            found[name] = digest_of([path.read_bytes().hex()])
    return found, json.loads((folder / "state.json").read_text())


def reported_losses(run_dir: Path) -> list[tuple[int, str, str]]:
    """(step, loss, gradient norm) of each line of metrics.jsonl with a loss."""
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [(line["step"], repr(line["loss"]), repr(line["grad_norm"])) for line in lines if "loss" in line]


def small_run(folder: Path) -> dict[str, Any]:
    """A small run with dropout, clipping and a data set of its own, which is made in `folder`."""
    from megatronish.preprocessing.preprocess import PreprocessOptions, preprocess

    source = folder / "text.txt"
    source.write_text(
        "\f".join(f"document {n}: " + "to be or not " * (n % 23 + 1) for n in range(400)), encoding="utf-8"
    )
    options = PreprocessOptions(
        inputs=(str(source),), output_prefix=str(folder / "set"), tokenizer_model="bytes", append_eod=True,
        doc_separator="\f",
    )  # fmt: skip
    data = {"path": preprocess(options, lambda line: None)[0].prefix}
    return merge(SMALL_RUN, {BLOCK: {"data": data}})


def fresh_folder(folder: Path) -> Path:
    """`folder`, emptied of an earlier proof. Raises ConfigError when it contains anything else."""
    known = folder / "verify_resume"
    if folder.exists() and any(folder.iterdir()):
        if not known.exists():
            raise ConfigError(f"--folder {folder}: is not empty and not of an earlier proof; choose a new folder.")
        shutil.rmtree(folder)
    folder.mkdir(parents=True, exist_ok=True)
    known.touch()
    return folder
