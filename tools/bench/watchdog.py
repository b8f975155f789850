"""What the watchdog costs a rank: CPU time of its thread, and of the steps of a small model with and without it.

    python tools/bench/watchdog.py [--seconds 20] [--ranks 2,64,512]

The thread is rank 0's, the dearest; the other ranks are connections of a second process that send heartbeats and nothing
else. The steps are of a model of 4 layers on one CPU thread, in turns of two seconds with and without a watchdog. CPU time, not
elapsed time, is compared: it stays what it is where other programs share the machine.
"""

from __future__ import annotations

import argparse
import os
import signal
import statistics
import sys
import tempfile
import time
from dataclasses import astuple
from pathlib import Path
from typing import Any

sys.path.insert(
    0, str(Path(__file__).resolve().parents[2])
)  # the root of the checkout: `tools.bench` is no installed package

from megatronish.launch.process import initialize_process


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=20.0, help="of each measurement (20)")
    parser.add_argument("--ranks", default="2,64,512", help="numbers of ranks (2,64,512)")
    arguments = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    initialize_process()
    step = small_training_step()
    for ranks in map(int, arguments.ranks.split(",")):
        thread_share(ranks, arguments.seconds, step)
    step_times(arguments.seconds, step)
    return 0


def small_training_step() -> Any:
    """A function that does one step: forward, backward, AdamW."""
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


class Shelf:
    """A store of this process, for a rendezvous of ranks that do not exist."""

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

    store: Any = Shelf()
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
        watchdog.close()  # before the others go, who take no leave
        os.kill(others, signal.SIGTERM)
        os.waitpid(others, 0)
    print(
        f"{ranks} ranks, a heartbeat each {watchdog.beat_seconds:g} s: {share:.3%} of a core on rank 0 ({steps} steps)"
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
            link.send(0, {"beat": astuple(rank_status)})
            link.receive(0.0)
            time.sleep(beat_seconds / len(sockets))


def run_steps(step: Any, seconds: float, watchdog: Any) -> int:
    """Train for `seconds`; the number of steps."""
    done, end = 0, time.monotonic() + seconds
    while time.monotonic() < end:
        if watchdog:
            watchdog.mark("training", done)
        step()
        done += 1
    return done


def step_times(seconds: float, step: Any) -> None:
    """Print the CPU time of a step in turns with a watchdog and without, all its threads together, and their ratio."""
    from megatronish.launch.rendezvous import join_rendezvous
    from megatronish.launch.watchdog import Watchdog

    times: dict[bool, list[float]] = {True: [], False: []}
    with tempfile.TemporaryDirectory() as folder:
        for turn in range(2 * max(2, round(seconds / 2))):
            watched = turn % 4 in (1, 2)  # off, on, on, off: a machine that slows down slows both
            watchdog = (
                Watchdog(join_rendezvous(0, 1, "", 0, 1.0), 300.0, Path(folder), count_cpu=True) if watched else None
            )
            begin = time.process_time()
            steps = run_steps(step, 2.0, watchdog)
            times[watched].append((time.process_time() - begin) / steps)
            if watchdog:
                watchdog.close()
    ratios = [on / off for on, off in zip(times[True], times[False])]
    low, _, high = statistics.quantiles(ratios, n=4)
    print(
        f"CPU time of a step: {statistics.median(times[True]) * 1e3:.2f} ms watched, {statistics.median(times[False]) * 1e3:.2f} ms "
        f"not; ratio of neighbouring turns: median {statistics.median(ratios):.4f}, middle half {low:.4f} to {high:.4f} "
        f"({len(ratios)} pairs)"
    )


if __name__ == "__main__":
    sys.exit(main())
