"""Interleaved timing: implementations alternate in every round, so that load on the machine affects all of them equally."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import cycle

import torch

Call = Callable[[], object]
GPU_SAMPLE_SECONDS = 2e-3  # a launch on an idle GPU takes some 10 us: 0.5% of a sample
CPU_SAMPLE_SECONDS = 2e-4
WARMUP_ROUNDS = 2


@dataclass(frozen=True)
class Timing:
    """Seconds a call: the median of all rounds, and the distance of the 10th from the 90th percentile over it."""

    seconds: float
    spread: float


def summarise(samples: Sequence[float]) -> Timing:
    """Median and spread."""
    median, ordered = statistics.median(samples), sorted(samples)
    tenth, ninetieth = (ordered[int(share * (len(ordered) - 1))] for share in (0.1, 0.9))
    return Timing(median, (ninetieth - tenth) / median)


def take_turns(calls: dict[str, list[Call]], repeats: int, device: torch.device, *, host: bool) -> dict[str, Timing]:
    """Time each entry; its calls, which differ in their inputs only, are used in turn.

    host: on a GPU count the host's part too, from the first call to the end of the last one's work; else events on the
    GPU's own clock.
    """
    counts = {name: _calls_a_sample(each, device) for name, each in calls.items()}
    turns = {name: cycle(each) for name, each in calls.items()}
    samples: dict[str, list[float]] = {name: [] for name in calls}
    for number in range(repeats + WARMUP_ROUNDS):
        for name, turn in turns.items():
            batch = [next(turn) for _ in range(counts[name])]
            seconds = _events(batch) if device.type == "cuda" and not host else _wall_clock(batch, device)
            if number >= WARMUP_ROUNDS:
                samples[name].append(seconds / len(batch))
    return {name: summarise(each) for name, each in samples.items()}


def _calls_a_sample(calls: list[Call], device: torch.device) -> int:
    """Number of calls for which the clock and the first launch are negligible."""
    calls[0]()  # whatever the first call alone does
    once = _wall_clock(calls[:1], device)
    wanted = GPU_SAMPLE_SECONDS if device.type == "cuda" else CPU_SAMPLE_SECONDS
    return max(1, min(1000, math.ceil(wanted / once)))


def _wall_clock(batch: Sequence[Call], device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    for call in batch:
        call()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def _events(batch: Sequence[Call]) -> float:
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record()
    for call in batch:
        call()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1e3
