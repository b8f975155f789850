"""Run layouts beside one process and tell how far each is from it."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, astuple, dataclass
from typing import Any

from megatronish.config.base import UserError
from megatronish.config.run import RunConfig
from megatronish.training.verify.layouts import Layout, layout_run
from megatronish.training.verify.runs import Trace, layout_trace, plain_run, run_ranks

FP32_BOUND = 1e-5  # relative for losses and norms, absolute for weights
BF16_FACTOR = 2.0  # times what another order of sums does in one process: the most of sums in 2 and in 4 parts
HEADER = (
    f"{'layout':<14}{'weights':<8}{'ranks':>5}{'loss':>10}{'norm':>10}{'weight':>10}{'MB/rank':>9}{'time':>7}  verdict"
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
    """One line of the table. problem: '' when every distance is within its bound."""

    layout: str
    tied: bool
    ranks: int
    distance: Distance | None
    bound: Distance | None
    weight_bytes: int
    seconds: float
    problem: str

    def line(self) -> str:
        """The table's line."""
        kind = "tied" if self.tied else "untied"
        found = self.distance
        numbers = f"{found.loss:>10.1e}{found.norm:>10.1e}{found.weight:>10.1e}" if found else f"{'-':>10}" * 3
        return (
            f"{self.layout:<14}{kind:<8}{self.ranks:>5}{numbers}{self.weight_bytes / 1e6:>9.3f}{self.seconds:>6.1f}s  "
            + (f"FAILED: {self.problem}" if self.problem else "ok")
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


def first_deviation(found: Trace, expected: Trace, bound: Distance) -> str:
    """Where `found` first leaves the bounds: the step of the loss or norm, or the first weight of the model; or ''."""
    for step, (loss, norm) in enumerate(zip(expected.losses, expected.norms, strict=True)):
        for what, value, wanted, limit in (
            ("loss", found.losses[step], loss, bound.loss),
            ("gradient norm", found.norms[step], norm, bound.norm),
        ):
            if not abs(value - wanted) <= limit * abs(wanted):
                return f"{what} of step {step + 1} is {value:.7g}, one process has {wanted:.7g}"
    for name in expected.weights:
        apart = _apart(found, expected, name)
        if not apart <= bound.weight:
            return f"{name} is off by {apart:.1e}, allowed is {bound.weight:.1e}"
    return ""


def verify(
    layouts: Sequence[Layout],
    dtype: str,
    steps: int,
    tied: Sequence[bool],
    overrides: dict[str, Any],
    tell: Callable[[str], None],
) -> Iterator[Verdict]:
    """The verdict on every layout, tied and untied, as each is done. `tell` hears what runs now.

    Raises ConfigError, before anything runs, for a layout that cannot be trained.
    """
    runs = [(layout, tie, layout_run(layout, dtype, steps, tie, overrides)) for tie in tied for layout in layouts]
    references: dict[bool, tuple[Trace, Distance]] = {}
    for number, (layout, tie, config) in enumerate(runs, start=1):
        if tie not in references:
            tell(f"one process, {'tied' if tie else 'untied'} weights")
            references[tie] = _reference(config)
        tell(f"{number}/{len(runs)} {layout.name} on {layout.ranks} ranks")
        expected, bound = references[tie]
        begin = time.monotonic()
        try:
            traces = run_ranks(layout.ranks, layout_trace, config, layout)
        except UserError as error:
            spent = time.monotonic() - begin
            yield Verdict(layout.name, tie, layout.ranks, None, None, 0, spent, str(error))
            continue
        spent, held = time.monotonic() - begin, max(trace.weight_bytes for trace in traces)
        problem = first_deviation(traces[0], expected, bound)
        for rank, trace in enumerate(traces):
            if (trace.losses, trace.norms) != (traces[0].losses, traces[0].norms) and not problem:
                problem = f"rank {rank} reports other losses or norms than rank 0"
        yield Verdict(layout.name, tie, layout.ranks, measure(traces[0], expected), bound, held, spent, problem)


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
