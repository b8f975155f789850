"""Initialization of a process before torch is imported: its rank, its threads, its allocator.

`deepspeed`, `torchrun`, `mpirun`, `srun` and plain `python` pass the rank in environment variables of their own.
`initialize_process` reads them once, sets those of torch.distributed, and configures threads and allocator. It must run
before `import torch`, because OpenMP reads its variables when it is loaded.
"""

from __future__ import annotations

import ctypes
import os
import re
import secrets
import socket
import sys
from collections.abc import Callable, MutableMapping
from dataclasses import dataclass
from pathlib import Path

from megatronish.errors import UserError

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # mallopt(3)
ONE_GIB = 1 << 30
PORT_BASE, PORT_SPAN = 20000, 9000  # below the ephemeral range, so that no client socket takes the port first


class LaunchError(UserError):
    """The ranks cannot be found or do not agree: wrong environment variables, or a rendezvous that failed."""


@dataclass(frozen=True)
class Rank:
    """Rank and world size of this process, in the run and on its machine, and the launcher that set them."""

    rank: int
    world_size: int
    local_rank: int
    local_world_size: int
    launcher: str

    @property
    def is_first(self) -> bool:
        """Whether this is the rank that prints and writes files."""
        return self.rank == 0

    @property
    def name(self) -> str:
        """For messages: the rank and its machine."""
        return f"rank {self.rank} ({socket.gethostname()})"


def find_rank(env: MutableMapping[str, str]) -> Rank:
    """Read the rank from the launcher's variables: torch's names first, then Open MPI's, then Slurm's.

    Raises LaunchError if a variable is missing or not a number, or the rank is not below the world size.
    """

    def number(name: str, default: str | None = None) -> int:
        text = env.get(name, default)
        if text is None:
            raise LaunchError(f"the launcher set some of the rank variables but not {name}; start all ranks with it.")
        if not text.isdecimal():
            raise LaunchError(f"{name}={text!r} is not a number; the launcher sets it, so unset it in your shell.")
        return int(text)

    found = _read_rank(env, number)
    if not (found.rank < found.world_size and found.local_rank < found.local_world_size):
        raise LaunchError(
            f"rank {found.rank} of {found.world_size} (local rank {found.local_rank} of {found.local_world_size}) is "
            "not possible: ranks count from 0. Unset RANK, WORLD_SIZE, LOCAL_RANK and LOCAL_WORLD_SIZE in your shell."
        )
    return found


def _read_rank(env: MutableMapping[str, str], number: Callable[..., int]) -> Rank:
    if "RANK" in env and "WORLD_SIZE" in env:
        world = number("WORLD_SIZE")
        launcher = "torchrun" if "TORCHELASTIC_RUN_ID" in env else "deepspeed" if "CROSS_RANK" in env else "environment"
        local_world = number("LOCAL_WORLD_SIZE", env.get("LOCAL_SIZE", _deepspeed_local_size(env, world)))
        return Rank(number("RANK"), world, number("LOCAL_RANK", "0"), local_world, launcher)
    if "OMPI_COMM_WORLD_SIZE" in env:
        names = ("RANK", "SIZE", "LOCAL_RANK", "LOCAL_SIZE")
        rank, world, local_rank, local_world = (number(f"OMPI_COMM_WORLD_{name}") for name in names)
        return Rank(rank, world, local_rank, local_world, "mpirun")
    if "SLURM_PROCID" in env and "SLURM_STEP_NODELIST" in env:
        # srun sets SLURM_NTASKS_PER_NODE only on request; the tasks of each node are always in SLURM_STEP_TASKS_PER_NODE.
        tasks = tasks_of_node(env.get("SLURM_STEP_TASKS_PER_NODE", "1"), number("SLURM_NODEID", "0"))
        return Rank(number("SLURM_PROCID"), number("SLURM_NTASKS"), number("SLURM_LOCALID"), tasks, "srun")
    if "RANK" in env or "WORLD_SIZE" in env:
        number("RANK"), number("WORLD_SIZE")  # one of them is missing
    return Rank(0, 1, 0, 1, "python")


def _deepspeed_local_size(env: MutableMapping[str, str], world: int) -> str:
    """`deepspeed` lists its local ranks only in CUDA_VISIBLE_DEVICES; CROSS_SIZE is the number of nodes."""
    visible = env.get("CUDA_VISIBLE_DEVICES", "")
    if "CROSS_SIZE" in env and visible:
        return str(len(visible.split(",")))
    return str(world)


def tasks_of_node(counts: str, node: int) -> int:
    """How many tasks Slurm starts on a node, by number: ('2(x3),1', 3) -> 1. Raises LaunchError if there is none."""
    tasks: list[int] = []
    for part in counts.split(","):
        found = re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", part)
        tasks += [int(found[1])] * int(found[2] or 1) if found else []
    if node >= len(tasks):
        raise LaunchError(f"SLURM_STEP_TASKS_PER_NODE={counts!r} has no entry for node {node} (SLURM_NODEID).")
    return tasks[node]


def first_host(node_list: str) -> str:
    """The first host of a Slurm node list: 'gpu[07-09,12],login1' -> 'gpu07'."""
    head = re.match(r"(?:[^,\[\]]|\[[^\]]*\])+", node_list)  # a comma inside [...] does not end the first entry
    if not head:
        raise LaunchError(f"SLURM_STEP_NODELIST={node_list!r} names no host.")
    return re.sub(r"\[(\w+)[^\]]*\]", r"\1", head[0])


def find_master(rank: Rank, env: MutableMapping[str, str]) -> tuple[str, int]:
    """Address and port of the rendezvous.

    MASTER_ADDR and MASTER_PORT are used if they are set. Otherwise ranks of Open MPI get them from rank 0 through mpi4py, and
    those of Slurm use the first host of the job. Raises LaunchError if ranks on several machines cannot agree on one.
    """
    if "MASTER_ADDR" in env and "MASTER_PORT" in env:
        port = env["MASTER_PORT"]
        if not (port.isdecimal() and 0 < int(port) < 1 << 16):
            raise LaunchError(
                f"MASTER_PORT={port!r} is not a TCP port; the launcher sets it, so unset it in your shell."
            )
        return env["MASTER_ADDR"], int(port)
    if rank.world_size == 1:
        return "127.0.0.1", free_port()
    if rank.launcher == "mpirun":
        return _agree_by_mpi(rank, env)
    if rank.launcher == "srun":
        job = int(env.get("SLURM_JOB_ID", "0")) * 31 + int(env.get("SLURM_STEP_ID", "0"))
        return first_host(env["SLURM_STEP_NODELIST"]), PORT_BASE + job % PORT_SPAN
    raise LaunchError("MASTER_ADDR and MASTER_PORT are not set: start the ranks with deepspeed, torchrun or mpirun.")


def _agree_by_mpi(rank: Rank, env: MutableMapping[str, str]) -> tuple[str, int]:
    try:
        from mpi4py import MPI
    except ImportError:
        if rank.local_world_size != rank.world_size:
            raise LaunchError("mpirun over several machines needs mpi4py: pip install 'megatronish[mpi]'.") from None
        job = sum(
            ord(letter) * (index + 1) for index, letter in enumerate(env.get("PMIX_NAMESPACE", str(os.getppid())))
        )
        return "127.0.0.1", PORT_BASE + job % PORT_SPAN
    here = None
    if rank.rank == 0:
        name = socket.gethostname()
        address = "127.0.0.1" if rank.local_world_size == rank.world_size else socket.gethostbyname(name)
        if address.startswith("127.") and rank.local_world_size < rank.world_size:
            address = name  # /etc/hosts maps this machine to a loopback address, which other machines cannot use
        here = (address, free_port())
    address, port = MPI.COMM_WORLD.bcast(here, root=0)
    return address, port


def device_number(rank: Rank, visible: str | None) -> int:
    """Index of a rank's GPU among those visible to it; visible: CUDA_VISIBLE_DEVICES.

    srun --gpus-per-task and mpirun wrappers show each rank one GPU, which has index 0 for each of them.
    """
    own = rank.launcher in ("srun", "mpirun") and visible is not None and visible != "" and "," not in visible
    return 0 if own else rank.local_rank


def free_port() -> int:
    """A free TCP port below the ephemeral range, drawn at random, so that two runs are unlikely to choose the same one."""
    for port in (PORT_BASE + secrets.randbelow(PORT_SPAN) for _ in range(100)):
        with socket.socket() as probe:
            try:
                probe.bind(("", port))
            except OSError:
                continue
            return port
    raise LaunchError(
        f"of 100 TCP ports from {PORT_BASE} to {PORT_BASE + PORT_SPAN - 1} none is free; set MASTER_PORT."
    )


def has_gpu() -> bool:
    """Whether this machine has an NVIDIA driver, found without importing torch."""
    return Path("/dev/nvidiactl").exists() and os.environ.get("DS_ACCELERATOR", "cuda") == "cuda"


def initialize_process() -> Rank:
    """Prepare this process for torch and return its rank. Call before `import torch`.

    Sets the torch.distributed variables. On machines without GPUs it also sets the number of threads, a passive OpenMP
    wait policy (ranks that spin slow down others on shared cores) and allocator thresholds (by default glibc maps new
    memory for every tensor over 32 MiB, which takes longer than the arithmetic on it).
    """
    env = os.environ
    rank = find_rank(env)
    address, port = find_master(rank, env)
    env.update(
        RANK=str(rank.rank),
        WORLD_SIZE=str(rank.world_size),
        LOCAL_RANK=str(device_number(rank, env.get("CUDA_VISIBLE_DEVICES"))),
        MASTER_ADDR=address,
        MASTER_PORT=str(port),
    )
    env.setdefault("TORCH_EXTENSIONS_DIR", str(Path(sys.prefix) / "torch_extensions"))
    env.setdefault("TOKENIZERS_PARALLELISM", "false")
    env.setdefault("DS_SKIP_CUDA_CHECK", "1")
    if not has_gpu():
        env.setdefault("DS_ACCELERATOR", "cpu")
        env.setdefault("OMP_WAIT_POLICY", "passive")
        threads = env.get("OMP_NUM_THREADS")
        if threads is None or (threads == "1" and rank.launcher == "torchrun"):  # torchrun sets 1 by default
            env["OMP_NUM_THREADS"] = str(claim_cores(rank))
        tune_allocator()
    return rank


def claim_cores(rank: Rank) -> int:
    """The number of cores for this rank: its share of the launcher's cores, or fewer if it is bound to fewer.

    Open MPI binds each of one or two ranks to a single core by default, which is undone. A binding that leaves a rank its
    share (`--bind-to`, `--map-by ...:pe=N`) is kept.
    """
    mine = os.sched_getaffinity(0)
    try:
        available = os.sched_getaffinity(os.getppid())
    except OSError:  # the launcher runs outside this container
        available = mine
    share = max(1, len(available) // rank.local_world_size)
    if rank.launcher == "mpirun" and len(mine) < share:
        os.sched_setaffinity(0, available)
        return share
    return min(share, len(mine))


def tune_allocator() -> bool:
    """Keep freed tensors in the heap instead of returning each to the kernel. False if the C library is not glibc."""
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):
        return False
    return bool(mallopt(M_MMAP_THRESHOLD, ONE_GIB)) and bool(mallopt(M_TRIM_THRESHOLD, ONE_GIB))
