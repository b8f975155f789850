"""Run parallel layouts and compare each with a single process."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, astuple, dataclass
from pathlib import Path
from typing import Any

from megatronish.config.run import RunConfig
from megatronish.errors import UserError
from megatronish.verify.layouts import ParallelLayout, layout_run
from megatronish.verify.ranks import run_ranks
from megatronish.verify.runs import Leg, Trace, layout_trace, plain_trace
from megatronish.verify.tracked_memory import RankBytes

FP32_BOUND = 1e-5  # relative for losses and norms, absolute for weights (docs/numerics.md)
BF16_ROUNDING = 2.0**-8  # largest relative error of rounding to bf16
BF16_FACTOR = 2.0  # of the largest distance between one process and the same with other orders of summation
HEADER = (
    f"{'layout':<16}{'weights':<8}{'ranks':>5}{'loss':>10}{'norm':>10}{'weight':>10}{'MB/rank':>9}{'formula':>9}{'time':>7}"
    "  verdict"
)


@dataclass(frozen=True)
class Distance:
    """The largest relative difference of losses and of norms, and the largest absolute difference of weights, of two runs.

    Weights are compared with fp32 master weights; what rounding to bf16 explains is subtracted from the difference.
    """

    loss: float
    norm: float
    weight: float

    def scaled(self, factor: float) -> Distance:
        """All three times `factor`."""
        return Distance(self.loss * factor, self.norm * factor, self.weight * factor)


@dataclass(frozen=True)
class LayoutVerdict:
    """A row of the table. held, formula: bytes of the rank with the most; problem: "" when the layout agrees."""

    layout: str
    tied: bool
    ranks: int
    distance: Distance | None
    bound: Distance | None
    held: RankBytes | None
    formula: RankBytes | None
    seconds: float
    problem: str

    def line(self) -> str:
        """The row as text."""
        kind = "tied" if self.tied else "untied"
        found = self.distance
        numbers = f"{found.loss:>10.1e}{found.norm:>10.1e}{found.weight:>10.1e}" if found else f"{'-':>10}" * 3
        sizes = "".join(f"{size.total / 1e6:>9.3f}" if size else f"{'-':>9}" for size in (self.held, self.formula))
        return f"{self.layout:<16}{kind:<8}{self.ranks:>5}{numbers}{sizes}{self.seconds:>6.1f}s  " + (
            f"FAILED: {self.problem}" if self.problem else "ok"
        )

    def to_json(self) -> dict[str, Any]:
        """The row as a JSON object."""
        return asdict(self)


def measure(found: Trace, expected: Trace, rounding: float = 0.0) -> Distance:
    """The distance of `found` from `expected`. rounding: largest relative rounding error of the weights of `found`."""
    return Distance(
        _relative(found.losses, expected.losses),
        _relative(found.norms, expected.norms),
        max(_apart(found, expected, name, rounding) for name in expected.weights),
    )


def first_deviation(found: Trace, expected: Trace, bound: Distance, done: int = 0, rounding: float = 0.0) -> str:
    """The first loss, norm or weight of `found` outside the bounds, as text; "" when there is none.

    done: the number of steps before the first of both traces.
    """
    for step, (loss, norm) in enumerate(zip(expected.losses, expected.norms, strict=True)):
        for what, value, wanted, limit in (
            ("loss", found.losses[step], loss, bound.loss),
            ("gradient norm", found.norms[step], norm, bound.norm),
        ):
            if not abs(value - wanted) <= limit * abs(wanted):
                return f"{what} of step {done + step + 1} is {value:.7g}, one process has {wanted:.7g}"
    for name in expected.weights:
        apart = _apart(found, expected, name, rounding)
        if not apart <= bound.weight:
            return f"{name} is off by {apart:.1e}; the bound is {bound.weight:.1e}"
    return ""


class Verification:
    """Runs layouts and compares them with one process, whose run is made once for tied and once for untied weights.

    progress: receives what runs now. Raises ConfigError, before anything runs, for a layout that cannot be trained.
    """

    def __init__(
        self,
        layouts: Sequence[ParallelLayout],
        moves: Sequence[ParallelLayout],
        dtype: str,
        steps: int,
        tied: Sequence[bool],
        overrides: dict[str, Any],
        progress: Callable[[str], None],
    ) -> None:
        self._layouts, self._moves, self._steps, self._tied, self._progress = layouts, moves, steps, tied, progress
        self._runs = {
            (layout.name, tie): layout_run(layout, dtype, steps, tie, overrides)
            for tie in tied
            for layout in (*layouts, *moves)
        }
        self._references: dict[bool, tuple[Trace, Distance]] = {}
        self._left = len(tied) * (len(layouts) + len(moves) * len(moves))
        self._all = self._left

    def verdicts(self) -> Iterator[LayoutVerdict]:
        """Yield the verdict of each layout, then of each move of a checkpoint between two of `moves`."""
        for tie in self._tied:
            for layout in self._layouts:
                yield self._verdict(layout.name, layout, tie, None)
        for tie in self._tied:
            with tempfile.TemporaryDirectory() as folder:
                for source in self._moves:
                    yield from self._moved_from(source, tie, Path(folder) / source.name)

    def _moved_from(self, source: ParallelLayout, tie: bool, folder: Path) -> Iterator[LayoutVerdict]:
        """Train the first half of the steps under `source` and the second half under each other layout."""
        half = self._steps // 2
        name = f"{source.name}, saved"
        self._reference(tie, source)
        try:
            self._run(name, source, tie, Leg(0, half, save=folder))
        except UserError as error:
            yield LayoutVerdict(name, tie, source.ranks, None, None, None, None, 0.0, str(error))
            return
        for target in self._moves:
            if target is not source:
                yield self._verdict(f"{source.name} > {target.name}", target, tie, Leg(half, self._steps, load=folder))

    def _run(self, name: str, layout: ParallelLayout, tie: bool, leg: Leg | None) -> list[Trace]:
        self._left -= 1
        self._progress(f"{self._all - self._left}/{self._all} {name} on {layout.ranks} ranks")
        return run_ranks(layout.ranks, layout_trace, self._runs[layout.name, tie], layout, leg)

    def _verdict(self, name: str, layout: ParallelLayout, tie: bool, leg: Leg | None) -> LayoutVerdict:
        expected, bound = self._reference(tie, layout)
        done = leg.first if leg else 0
        expected = expected.after(done)
        begin = time.monotonic()
        try:
            traces = self._run(name, layout, tie, leg)
        except UserError as error:
            spent = time.monotonic() - begin
            return LayoutVerdict(name, tie, layout.ranks, None, None, None, None, spent, str(error))
        spent = time.monotonic() - begin
        rounding = BF16_ROUNDING if self._runs[layout.name, tie].deepspeed.dtype == "bf16" else 0.0
        problem = (
            first_deviation(traces[0], expected, bound, done, rounding) or _disagreement(traces) or _excess(traces)
        )
        most = max(traces, key=lambda trace: trace.held.total if trace.held else 0)
        distance = measure(traces[0], expected, rounding)
        return LayoutVerdict(name, tie, layout.ranks, distance, bound, most.held, most.formula, spent, problem)

    def _reference(self, tie: bool, layout: ParallelLayout) -> tuple[Trace, Distance]:
        if tie not in self._references:
            self._progress(f"one process, {'tied' if tie else 'untied'} weights")
            self._references[tie] = _reference(self._runs[layout.name, tie])
        return self._references[tie]


def _disagreement(traces: Sequence[Trace]) -> str:
    for rank, trace in enumerate(traces):
        if (trace.losses, trace.norms) != (traces[0].losses, traces[0].norms):
            return f"rank {rank} reports losses or norms that differ from those of rank 0"
    return ""


def _excess(traces: Sequence[Trace]) -> str:
    """The first rank whose bytes differ from the formula by more than the slack; "" when there is none."""
    for rank, trace in enumerate(traces):
        assert trace.held is not None and trace.formula is not None and trace.slack is not None
        for what in ("weights", "gradients", "optimizer"):
            held, wanted, allowed = (getattr(size, what) for size in (trace.held, trace.formula, trace.slack))
            if abs(held - wanted) > allowed:
                return f"rank {rank} holds {held:,} bytes of {what}; the formula gives {wanted:,}"
    return ""


def _reference(config: RunConfig) -> tuple[Trace, Distance]:
    """The run of one process, and the bound on the distance of a layout from it."""
    plain = plain_trace(config)
    if config.deepspeed.dtype == "fp32":
        return plain, Distance(FP32_BOUND, FP32_BOUND, FP32_BOUND)
    others = [measure(plain_trace(config, parts=parts), plain) for parts in (2, 3, 4, 8)]
    worst = Distance(*(max(values) for values in zip(*map(astuple, others), strict=True)))
    return plain, worst.scaled(BF16_FACTOR)


def _relative(found: Sequence[float], expected: Sequence[float]) -> float:
    return max(abs(a - b) / abs(b) for a, b in zip(found, expected, strict=True))


def _apart(found: Trace, expected: Trace, name: str, rounding: float) -> float:
    difference = (found.weights[name] - expected.weights[name]).abs() - rounding * expected.weights[name].abs()
    return float(difference.clamp(min=0.0).max())
