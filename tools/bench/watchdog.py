"""Measure the CPU time of the watchdog's thread on rank 0 while its main thread trains a small model.

    python tools/bench/watchdog.py [--seconds 20] [--ranks 2,64,512]

Rank 0's is the most expensive thread. The other ranks are simulated: connections of a second process that send heartbeats
only. The model has 4 layers and one CPU thread. tools/bench/guards.py on one rank measures steps with and without the watchdog.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import tempfile
import time
from dataclasses import astuple
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # run from a checkout that is not installed

from megatronish.launch.process import initialize_process


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=20.0, help="seconds per measurement (20)")
    parser.add_argument("--ranks", default="2,64,512", help="numbers of ranks (2,64,512)")
    arguments = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    initialize_process()
    step = small_training_step()
    for ranks in map(int, arguments.ranks.split(",")):
        thread_share(ranks, arguments.seconds, step)
    return 0


def small_training_step() -> Any:
    """A function that trains one step: forward, backward, AdamW."""
    import torch

    from megatronish.config.model import ModelConfig
    from megatronish.model.transformer import Transformer

    shape: dict[str, Any] = {
        "vocab_size": 512,
        "num_layers": 4,
        "hidden_size": 128,
        "num_attention_heads": 4,
        "ffn_hidden_size": 256,
    }
    model = Transformer(ModelConfig(**shape, seq_length=128))
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    tokens = torch.randint(512, (2, 128))

    def step() -> None:
        loss, _ = model.loss(tokens, labels=tokens)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    for _ in range(3):
        step()
    return step


class LocalStore:
    """A store within this process, for simulated ranks."""

    def __init__(self) -> None:
        self._values: dict[str, str] = {}

    def set(self, key: str, value: str) -> None:
        self._values[key] = value

    def get(self, key: str) -> bytes:
        return self._values[key].encode()


def thread_share(ranks: int, seconds: float, step: Any) -> None:
    """Print the share of a core that rank 0's watchdog takes while the main thread trains."""
    from megatronish.launch.rendezvous import RankProcess, Rendezvous
    from megatronish.launch.watchdog import Watchdog

    store: Any = LocalStore()
    here = RankProcess.current(0)
    processes = tuple(RankProcess(rank, here.host, here.pid, here.pid_namespace) for rank in range(ranks))
    with tempfile.TemporaryDirectory() as folder:
        watchdog = Watchdog(Rendezvous(store, "127.0.0.1", 0, processes), 300.0, Path(folder), count_cpu=True)
        others = other_ranks(store, processes, watchdog.beat_seconds)
        clock = time.pthread_getcpuclockid(watchdog.thread_ident)
        run_steps(step, 2.0, watchdog)
        begin, cpu = time.monotonic(), time.clock_gettime(clock)
        steps = run_steps(step, seconds, watchdog)
        share = (time.clock_gettime(clock) - cpu) / (time.monotonic() - begin)
        watchdog.close()  # before the other ranks are killed, or it would report them
        os.kill(others, signal.SIGTERM)
        os.waitpid(others, 0)
    print(
        f"{ranks} ranks, a heartbeat every {watchdog.beat_seconds:g} s: {share:.3%} of a core on rank 0 ({steps} steps)"
    )


def other_ranks(store: Any, processes: Any, beat_seconds: float) -> int:
    """A process that holds the sockets of all ranks but the first and sends their heartbeats until it is killed; its pid."""
    from megatronish.launch.rank_status import RankStatus
    from megatronish.launch.rendezvous import Rendezvous
    from megatronish.launch.sockets import RankSockets

    pid = os.fork()
    if pid:
        return pid
    sockets = [RankSockets(Rendezvous(store, "127.0.0.1", rank, processes)) for rank in range(1, len(processes))]
    rank_status = RankStatus(512, "training", "all_reduce", "training/engine.py:131 (train_step)", 0.25, 100, 1000)
    while True:
        for link in sockets:
            link.send_all({"beat": astuple(rank_status)})
            link.receive(0.0)
            time.sleep(beat_seconds / len(sockets))


def run_steps(step: Any, seconds: float, watchdog: Any) -> int:
    """Train for `seconds`; returns the number of steps."""
    done, end = 0, time.monotonic() + seconds
    while time.monotonic() < end:
        watchdog.mark("training", done)
        step()
        done += 1
    return done


if __name__ == "__main__":
    sys.exit(main())
