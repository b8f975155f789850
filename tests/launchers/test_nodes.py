"""Several nodes on one machine: torchrun's agents, deepspeed's hostfile, Slurm's tasks; and what a stopped rank does to them."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from megatronish.launch.process import free_port
from tests.launchers.run_file import run_file
from tests.runs import make_dataset

pytestmark = pytest.mark.distributed
ROOT = Path(__file__).parents[2]
BIN = Path(sys.executable).parent
PRETRAIN = str(ROOT / "launchers" / "pretrain.py")
SETTLED = ("OMP_", "DS_", "RANK", "WORLD_SIZE", "LOCAL_", "MASTER_", "TORCH", "WANDB", "PYTEST", "SLURM")
LIMIT_SECONDS = 240.0  # a launcher starts three processes one after another, on a machine that may be busy

# Stands for pdsh: runs the command once a host, all here, with %n replaced as pdsh does; -S: the largest exit status.
PDSH = """
import subprocess, sys
words = sys.argv[1:]
hosts = words[words.index("-w") + 1].split(",")
command = " ".join(words[words.index("-w") + 2:])
nodes = [subprocess.Popen(["bash", "-c", command.replace("%n", str(n))]) for n in range(len(hosts))]
sys.exit(max(node.wait() for node in nodes))
"""
# Stands for srun: starts SLURM_NTASKS tasks on one node, with the variables of Slurm's manual.
SRUN = """
import os, subprocess, sys
words = sys.argv[1:]
command = words[words.index("python"):]
assert "--kill-on-bad-exit=1" in words, words
tasks = int(os.environ["SLURM_NTASKS"])
common = {"SLURM_STEP_ID": "0", "SLURM_STEP_NODELIST": "localhost", "SLURM_STEP_TASKS_PER_NODE": str(tasks), "SLURM_NODEID": "0"}
started = [
    subprocess.Popen(command, env={**os.environ, **common, "SLURM_PROCID": str(task), "SLURM_LOCALID": str(task)})
    for task in range(tasks)
]
sys.exit(max(task.wait() for task in started))
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a data set, the file of a run, and stand-ins for programs of a cluster."""
    path = tmp_path_factory.mktemp("nodes")
    run_file(path, make_dataset(path))
    programs = path / "bin"
    programs.mkdir()
    for name, text in (("pdsh", PDSH), ("srun", SRUN)):
        (programs / name).write_text(f"#!{sys.executable}\n{text}")
        (programs / name).chmod(0o755)
    (path / "hostfile").write_text("node1 slots=1\nnode2 slots=1\n")
    return path


def start(folder: Path, name: str, command: list[str], **variables: str) -> subprocess.Popen[str]:
    """Start a command as a user's shell would; its output goes to folder/NAME.out, its run to folder/NAME."""
    env = {key: value for key, value in os.environ.items() if not key.startswith(SETTLED)} | variables
    env["PATH"] = os.pathsep.join([str(folder / "bin"), str(BIN), env["PATH"]])
    with (folder / f"{name}.out").open("a") as out:
        return subprocess.Popen(command, env=env, cwd=folder, stdout=out, stderr=out, text=True, start_new_session=True)


def options(folder: Path, run: str, *words: str) -> list[str]:
    return ["--deepspeed_config", str(folder / "run.json"), "--train.save_dir", str(folder / run), *words]


def torchrun_agents(folder: Path, name: str, *words: str) -> list[subprocess.Popen[str]]:
    """Two agents of torchrun, one rank each, as on two nodes."""
    rendezvous = ["--nnodes", "2", "--master-addr", "127.0.0.1", "--master-port", str(free_port())]
    return [
        start(
            folder,
            name,
            [str(BIN / "torchrun"), "--nproc-per-node", "1", "--node-rank", str(node), *rendezvous, PRETRAIN]
            + options(folder, name, *words),
        )
        for node in range(2)
    ]


def losses(folder: Path, name: str) -> list[float]:
    lines = (folder / name / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line)["loss"] for line in lines]


def finish(folder: Path, name: str, processes: list[subprocess.Popen[str]]) -> list[int]:
    """Exit statuses; every process of the launch is gone when this returns."""
    try:
        return [process.wait(LIMIT_SECONDS) for process in processes]
    finally:
        print((folder / f"{name}.out").read_text())
        for process in processes:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)


@pytest.fixture(scope="module")
def expected(folder: Path) -> list[float]:
    """Losses of two ranks under Slurm, to which the others are compared bit for bit.

    The batch script itself runs, with a stand-in for srun; the job number chooses the port.
    """
    job = {"SLURM_JOB_ID": str(free_port()), "SLURM_NTASKS": "2", "SLURM_SUBMIT_DIR": str(ROOT)}
    command = ["bash", str(ROOT / "launchers" / "slurm.sbatch"), *options(folder, "slurm")]
    assert finish(folder, "slurm", [start(folder, "slurm", command, **job)]) == [0]
    return losses(folder, "slurm")


def test_slurm(expected: list[float], folder: Path) -> None:
    assert len(expected) == 3
    output = (folder / "slurm.out").read_text()
    assert "x 2 data-parallel ranks x" in output and "Traceback" not in output


def test_deepspeed_with_a_hostfile(expected: list[float], folder: Path) -> None:
    command = [sys.executable, str(BIN / "deepspeed"), "--hostfile", "hostfile", "--no_ssh_check"]
    command += ["--master_addr", "127.0.0.1", "--master_port", str(free_port()), PRETRAIN]
    assert finish(folder, "deepspeed", [start(folder, "deepspeed", command + options(folder, "deepspeed"))]) == [0]
    assert losses(folder, "deepspeed") == expected
    assert "nnodes=2, num_local_procs=1, node_rank=1" in (folder / "deepspeed.out").read_text()


def rank_process(run: Path, rank: int) -> int:
    """The pid in the file of a rank's watchdog."""
    first = (run / "stacks" / f"rank-{rank:05d}.txt").read_text().splitlines()[0]
    return int(first.rpartition("pid ")[2].rstrip(")"))


@pytest.fixture
def stopped(folder: Path) -> Iterator[tuple[list[subprocess.Popen[str]], int]]:
    """Two nodes under torchrun that train without end, with one rank stopped by a signal; its pid."""
    words = ["--train.steps", "100000", "--train.save_interval", "100000", "--train.hang_timeout", "5"]
    agents = torchrun_agents(folder, "stopped", *words, "--data.num_workers", "1")
    deadline = time.monotonic() + LIMIT_SECONDS
    metrics = folder / "stopped" / "metrics.jsonl"
    while not (metrics.exists() and metrics.read_text()):
        assert time.monotonic() < deadline and all(agent.poll() is None for agent in agents)
        time.sleep(0.1)
    pid = rank_process(folder / "stopped", 1)
    os.kill(pid, signal.SIGSTOP)
    yield agents, pid
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)


def test_a_stopped_rank_under_torchrun(
    stopped: tuple[list[subprocess.Popen[str]], int], expected: list[float], folder: Path
) -> None:
    """Two nodes train as one machine does; when a rank is stopped both end after the timeout of 5 s, and no rank is left."""
    assert losses(folder, "stopped")[0] == expected[0]
    agents, pid = stopped
    statuses = finish(folder, "stopped", agents)
    assert all(statuses), statuses
    output = (folder / "stopped.out").read_text()
    assert output.count("error: rank 1 (") == 1 and f"pid {pid}) has sent no heartbeat for 5 s" in output
    assert "exitcode  : 75" in output
    assert not Path(f"/proc/{pid}").exists() or "State:\tZ" in Path(f"/proc/{pid}/status").read_text()
