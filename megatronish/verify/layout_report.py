"""Run layouts beside one process and tell how far each is from it."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, astuple, dataclass
from pathlib import Path
from typing import Any

from megatronish.config.run import RunConfig
from megatronish.errors import UserError
from megatronish.verify.layouts import Layout, layout_run
from megatronish.verify.runs import Leg, Trace, layout_trace, plain_run, run_ranks
from megatronish.verify.tracked_memory import RankBytes

FP32_BOUND = 1e-5  # relative for losses and norms, absolute for weights
BF16_FACTOR = 2.0  # times what another order of sums does in one process: the most of sums in 2 and in 4 parts
HEADER = (
    f"{'layout':<16}{'weights':<8}{'ranks':>5}{'loss':>10}{'norm':>10}{'weight':>10}{'MB/rank':>9}{'formula':>9}{'time':>7}"
    "  verdict"
)


@dataclass(frozen=True)
class Distance:
    """How far two runs are apart: largest relative difference of losses and norms, largest difference of weights."""

    loss: float
    norm: float
    weight: float

    def scaled(self, factor: float) -> Distance:
        """All three times `factor`."""
        return Distance(self.loss * factor, self.norm * factor, self.weight * factor)


@dataclass(frozen=True)
class Verdict:
    """One line of the table. held, formula: of the rank that holds most; problem: '' when all is as it must be."""

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
        """The table's line."""
        kind = "tied" if self.tied else "untied"
        found = self.distance
        numbers = f"{found.loss:>10.1e}{found.norm:>10.1e}{found.weight:>10.1e}" if found else f"{'-':>10}" * 3
        sizes = "".join(f"{size.total / 1e6:>9.3f}" if size else f"{'-':>9}" for size in (self.held, self.formula))
        return f"{self.layout:<16}{kind:<8}{self.ranks:>5}{numbers}{sizes}{self.seconds:>6.1f}s  " + (
            f"FAILED: {self.problem}" if self.problem else "ok"
        )

    def to_json(self) -> dict[str, Any]:
        """As one JSON object."""
        return asdict(self)


def measure(found: Trace, expected: Trace) -> Distance:
    """How far `found` is from `expected`."""
    return Distance(
        _relative(found.losses, expected.losses),
        _relative(found.norms, expected.norms),
        max(_apart(found, expected, name) for name in expected.weights),
    )


def first_deviation(found: Trace, expected: Trace, bound: Distance, done: int = 0) -> str:
    """Where `found` first leaves the bounds: the step of the loss or norm, or the first weight of the model; or ''.

    done: steps before the first of both.
    """
    for step, (loss, norm) in enumerate(zip(expected.losses, expected.norms, strict=True)):
        for what, value, wanted, limit in (
            ("loss", found.losses[step], loss, bound.loss),
            ("gradient norm", found.norms[step], norm, bound.norm),
        ):
            if not abs(value - wanted) <= limit * abs(wanted):
                return f"{what} of step {done + step + 1} is {value:.7g}, one process has {wanted:.7g}"
    for name in expected.weights:
        apart = _apart(found, expected, name)
        if not apart <= bound.weight:
            return f"{name} is off by {apart:.1e}, allowed is {bound.weight:.1e}"
    return ""


class Verification:
    """The layouts' runs beside those of one process, tied and untied, each plain run made once.

    `tell` hears what runs now. Raises ConfigError, before anything runs, for a layout that cannot be trained.
    """

    def __init__(
        self,
        layouts: Sequence[Layout],
        moves: Sequence[Layout],
        dtype: str,
        steps: int,
        tied: Sequence[bool],
        overrides: dict[str, Any],
        tell: Callable[[str], None],
    ) -> None:
        self._layouts, self._moves, self._steps, self._tied, self._tell = layouts, moves, steps, tied, tell
        self._runs = {
            (layout.name, tie): layout_run(layout, dtype, steps, tie, overrides)
            for tie in tied
            for layout in (*layouts, *moves)
        }
        self._references: dict[bool, tuple[Trace, Distance]] = {}
        self._left = len(tied) * (len(layouts) + len(moves) * len(moves))
        self._all = self._left

    def verdicts(self) -> Iterator[Verdict]:
        """Of every layout, then of every move from one of `moves` to another, as each is done."""
        for tie in self._tied:
            for layout in self._layouts:
                yield self._verdict(layout.name, layout, tie, None)
        for tie in self._tied:
            with tempfile.TemporaryDirectory() as folder:
                for source in self._moves:
                    yield from self._moved_from(source, tie, Path(folder) / source.name)

    def _moved_from(self, source: Layout, tie: bool, folder: Path) -> Iterator[Verdict]:
        """The first half of the steps under `source`, and the second under each of the others."""
        half = self._steps // 2
        name = f"{source.name}, saved"
        self._reference(tie, source)
        try:
            self._run(name, source, tie, Leg(0, half, save=folder))
        except UserError as error:
            yield Verdict(name, tie, source.ranks, None, None, None, None, 0.0, str(error))
            return
        for target in self._moves:
            if target is not source:
                yield self._verdict(f"{source.name} > {target.name}", target, tie, Leg(half, self._steps, load=folder))

    def _run(self, name: str, layout: Layout, tie: bool, leg: Leg | None) -> list[Trace]:
        self._left -= 1
        self._tell(f"{self._all - self._left}/{self._all} {name} on {layout.ranks} ranks")
        return run_ranks(layout.ranks, layout_trace, self._runs[layout.name, tie], layout, leg)

    def _verdict(self, name: str, layout: Layout, tie: bool, leg: Leg | None) -> Verdict:
        expected, bound = self._reference(tie, layout)
        done = leg.first if leg else 0
        expected = expected.after(done)
        begin = time.monotonic()
        try:
            traces = self._run(name, layout, tie, leg)
        except UserError as error:
            spent = time.monotonic() - begin
            return Verdict(name, tie, layout.ranks, None, None, None, None, spent, str(error))
        spent = time.monotonic() - begin
        problem = first_deviation(traces[0], expected, bound, done) or _disagreement(traces) or _excess(traces)
        most = max(traces, key=lambda trace: trace.held.total if trace.held else 0)
        distance = measure(traces[0], expected)
        return Verdict(name, tie, layout.ranks, distance, bound, most.held, most.formula, spent, problem)

    def _reference(self, tie: bool, layout: Layout) -> tuple[Trace, Distance]:
        if tie not in self._references:
            self._tell(f"one process, {'tied' if tie else 'untied'} weights")
            self._references[tie] = _reference(self._runs[layout.name, tie])
        return self._references[tie]


def _disagreement(traces: Sequence[Trace]) -> str:
    for rank, trace in enumerate(traces):
        if (trace.losses, trace.norms) != (traces[0].losses, traces[0].norms):
            return f"rank {rank} reports other losses or norms than rank 0"
    return ""


def _excess(traces: Sequence[Trace]) -> str:
    """The first rank that holds more, or less, than the formula says."""
    for rank, trace in enumerate(traces):
        assert trace.held is not None and trace.formula is not None and trace.slack is not None
        for what in ("weights", "gradients", "optimizer"):
            held, wanted, allowed = (getattr(size, what) for size in (trace.held, trace.formula, trace.slack))
            if abs(held - wanted) > allowed:
                return f"rank {rank} holds {held:,} bytes of {what}, the formula says {wanted:,}"
    return ""


def _reference(config: RunConfig) -> tuple[Trace, Distance]:
    """The plain run, and how far a layout may be from it."""
    plain = plain_run(config)
    if config.deepspeed.dtype == "fp32":
        return plain, Distance(FP32_BOUND, FP32_BOUND, FP32_BOUND)
    others = [measure(plain_run(config, parts=parts), plain) for parts in (2, 4)]
    worst = Distance(*(max(values) for values in zip(*map(astuple, others), strict=True)))
    return plain, worst.scaled(BF16_FACTOR)


def _relative(found: Sequence[float], expected: Sequence[float]) -> float:
    return max(abs(a - b) / abs(b) for a, b in zip(found, expected, strict=True))


def _apart(found: Trace, expected: Trace, name: str) -> float:
    return float((found.weights[name] - expected.weights[name]).abs().max())
