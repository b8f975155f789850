"""The results as lines, as JSON and as a picture."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from tools.bench.operators.bars import Verdict
from tools.bench.operators.operators import HOST, STEP


@dataclass(frozen=True)
class Result:
    """One implementation of one operator in one direction. The last two are None where the host's time counts."""

    op: str
    direction: str
    dtype: str
    rows: int
    width: int
    implementation: str
    in_place: bool
    error: float
    microseconds: float
    spread: float
    gb_per_s: float | None
    of_copy: float | None


@dataclass
class Report:
    """Everything that a run found out."""

    machine: dict[str, Any]
    missing: dict[str, str]
    results: list[Result] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)  # implementations that failed or computed something else
    verdicts: dict[str, list[Verdict]] = field(default_factory=dict)

    def write_json(self, path: Path) -> None:
        """All of it."""
        content = {
            "machine": self.machine,
            "missing": self.missing,
            "left_out": self.left_out,
            "results": [asdict(result) for result in self.results],
            "bars": {case: [asdict(verdict) for verdict in each] for case, each in self.verdicts.items()},
        }
        path.write_text(json.dumps(content, indent=1) + "\n")


def line(results: Sequence[Result]) -> str:
    """One line a case: the figures of the fused operator (else of the first), and how many times as long others take."""
    first = next((r for r in results if r.implementation == "fused"), results[0])
    others = "  ".join(
        f"{r.implementation} {r.microseconds / first.microseconds:.2f}x" for r in results if r is not first
    )
    rate = "host time included        "
    if first.gb_per_s is not None:
        rate = f"{first.gb_per_s:6.1f} GB/s  {first.of_copy:4.2f} of copy"
    name = first.implementation + (" (in place)" if first.in_place else "")
    return (
        f"{first.op:12} {first.direction:7} {first.dtype} {first.rows:7}x{first.width:<5} {name} error {first.error:.1e} "
        f"{first.microseconds:8.0f} us +-{first.spread:4.0%}  {rate} | {others}"
    )


def plot(report: Report, path: Path) -> None:
    """A panel for each operator and direction: the share of the copy bandwidth, a group of bars a dtype and width."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    results = [r for r in report.results if r.direction != HOST]
    ops, names = (list(dict.fromkeys(getattr(r, key) for r in results)) for key in ("op", "implementation"))
    colours = dict(zip(names, pyplot.get_cmap("tab10").colors, strict=False))  # type: ignore[attr-defined]
    figure, grid = pyplot.subplots(
        max(len(ops), 1), 2, figsize=(12, 1.2 + 2.4 * max(len(ops), 1)), squeeze=False, sharey=True
    )
    for row, op in zip(grid, ops, strict=False):
        later = STEP if any((r.op, r.direction) == (op, STEP) for r in results) else "bwd"
        for axes, direction in zip(row, ("fwd", later), strict=True):
            mine = [r for r in results if (r.op, r.direction) == (op, direction)]
            _panel(axes, mine, names, colours)
            title = {"fwd": "forward", "bwd": "backward", STEP: "forward and backward"}[direction]
            axes.set_title(f"{op}, {title}", fontsize=10, loc="left")
        row[0].set_ylabel("share of copy bandwidth", fontsize=8)
    handles = [pyplot.Rectangle((0, 0), 1, 1, color=colours[name]) for name in names]
    figure.legend(handles, names, loc="upper right", ncols=len(names), fontsize=9, frameon=False)
    machine = report.machine
    figure.suptitle(f"{machine['name']}, torch {machine['torch']}, {machine['date']}", fontsize=10, x=0.01, ha="left")
    figure.tight_layout(rect=(0, 0, 1, 0.99))
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def _panel(axes: Any, results: list[Result], names: list[str], colours: dict[str, Any]) -> None:
    """Bars of equal width, the height written above each; a line where the copy is."""
    groups = list(dict.fromkeys((r.dtype, r.width) for r in results))
    for place, group in enumerate(groups):
        mine = [r for name in names for r in results if (r.dtype, r.width) == group and r.implementation == name]
        size = 0.86 / max(len(mine), 1)
        for number, r in enumerate(mine):
            x, height = place - 0.43 + (number + 0.5) * size, r.of_copy or 0.0
            axes.bar(x, height, 0.94 * size, color=colours[r.implementation])
            axes.text(x, height + 0.02, f"{height:.2f}", ha="center", va="bottom", fontsize=6)
    axes.set_xticks(range(len(groups)), [f"{dtype}, width {width}" for dtype, width in groups], fontsize=8)
    axes.axhline(1.0, color="grey", linewidth=0.8, linestyle="--")
    axes.tick_params(axis="y", labelsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    axes.margins(y=0.12)
