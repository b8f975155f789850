"""The results as lines and as JSON."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from tools.bench.operators.bars import BarResult


@dataclass(frozen=True)
class Result:
    """One implementation of one operator in one direction. The last two are None where host time is included."""

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
    """All results of one run."""

    machine: dict[str, Any]
    missing: dict[str, str]
    results: list[Result] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)  # implementations that failed or computed something else
    verdicts: dict[str, list[BarResult]] = field(default_factory=dict)

    def write_json(self, path: Path) -> None:
        """Write the report as JSON."""
        content = {
            "machine": self.machine,
            "missing": self.missing,
            "left_out": self.left_out,
            "results": [asdict(result) for result in self.results],
            "bars": {case: [asdict(verdict) for verdict in each] for case, each in self.verdicts.items()},
        }
        path.write_text(json.dumps(content, indent=1) + "\n")


def line(results: Sequence[Result]) -> str:
    """One line per case: the fused operator (or else the first one), and the time of the others relative to it."""
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
