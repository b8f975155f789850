"""Performance bars of the fused operators: shares of a copy's bandwidth, and multiples of other implementations."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from tools.bench.operators.operators import HOST

HALF = frozenset({"bf16", "fp16"})
FULL = frozenset({"fp32"})
ANY = HALF | FULL
NOISE = 0.005  # a ratio that rounds to the bar has met it
# The largest relative L2 error against float64: (a result or an input's gradient, with a weight's gradient among them). In 16
# bits that is one rounding; a weight's gradient has few elements, so the mean over them scatters, by a fifth at most in tests.
ERRORS = {"fp32": (3e-7, 1e-6), "bf16": (1.8e-3, 2.2e-3), "fp16": (2.2e-4, 2.7e-4)}


@dataclass(frozen=True)
class Bar:
    """Holds for one operator, direction and device, these dtypes, and widths from `width` on.

    times: implementation -> how many times as long as the fused one it must take; a tuple of names means the best of them.
    """

    op: str
    direction: str
    device: str
    dtypes: frozenset[str] = ANY
    width: int = 0
    of_copy: float | None = None
    times: tuple[tuple[tuple[str, ...], float], ...] = ()
    microseconds: float | None = None


def _cpu(op: str, direction: str, fp32: float, bf16: float, eager: float, compiled: float) -> list[Bar]:
    """One row of the CPU table; its multiples are those of bf16."""
    times = ((("eager",), eager), (("compiled",), compiled))
    return [Bar(op, direction, "cpu", FULL, of_copy=fp32), Bar(op, direction, "cpu", HALF, of_copy=bf16, times=times)]


BARS: tuple[Bar, ...] = (
    *_cpu("rms_norm", "fwd", 0.60, 0.70, 8, 1.5),
    Bar("rms_norm", "fwd", "cpu", FULL, times=((("compiled",), 0.8),)),
    *_cpu("rms_norm", "bwd", 0.65, 0.60, 12, 2.5),
    *_cpu("add_rms_norm", "fwd", 0.80, 0.80, 4.5, 1.4),
    *_cpu("swiglu", "fwd", 0.80, 0.50, 2.2, 1.3),
    *_cpu("swiglu", "bwd", 0.80, 0.50, 2.2, 1.3),
    *_cpu("rope", "fwd", 0.85, 0.90, 6, 3.5),
    *_cpu("rope", "bwd", 0.85, 0.90, 6, 3.5),
    # For an H100; on other GPUs they serve as a reference.
    Bar("rms_norm", "fwd", "cuda", HALF, of_copy=0.85, times=((("liger", "quack", "compiled"), 0.97),)),
    Bar("rms_norm", "fwd", "cuda", HALF, width=2048, of_copy=0.90),
    Bar("rms_norm", "bwd", "cuda", HALF, of_copy=0.65, times=((("F.rms_norm",), 3.0),)),
    Bar("rms_norm", "bwd", "cuda", HALF, width=4096, of_copy=0.75),
    Bar("rms_norm", HOST, "cuda", HALF, microseconds=80, times=((("liger",), 3.0),)),
    Bar("add_rms_norm", "fwd", "cuda", HALF, of_copy=0.90),
    Bar("swiglu", "fwd", "cuda", HALF, of_copy=0.90),
    Bar("swiglu", "bwd", "cuda", HALF, of_copy=0.90),
    *(
        Bar(op, direction, "cuda", HALF, of_copy=0.85, times=((("compiled",), 1.2),))
        for op in ("rope", "rope_qkv_")
        for direction in ("fwd", "bwd")
    ),
)


@dataclass(frozen=True)
class BarResult:
    """One bar: the figure, the bar, and whether it is met; None where the implementation to compare with is missing."""

    what: str
    met: bool | None

    def __str__(self) -> str:
        return f"{self.what} {'met' if self.met else 'not measured' if self.met is None else 'MISSED'}"


def judge(
    op: str,
    direction: str,
    device: str,
    dtype: str,
    width: int,
    *,
    microseconds: Mapping[str, float],
    of_copy: float | None,
    error: float,
    weight_gradient: bool,
) -> list[BarResult]:
    """The bars of the implementation "fused" of one case; microseconds: of every implementation that was timed."""
    mine = microseconds["fused"]
    limit = ERRORS[dtype][weight_gradient and direction != "fwd"]
    found = [BarResult(f"error {error:.1e} <= {limit:.1e}", error <= limit)]
    bars = [b for b in BARS if (b.op, b.direction, b.device) == (op, direction, device) and dtype in b.dtypes]
    bars = [b for b in bars if width >= b.width]
    shares = [b.of_copy for b in bars if b.of_copy is not None]
    if shares and of_copy is not None:
        wanted = max(shares)
        found.append(BarResult(f"copy {of_copy:.2f} >= {wanted:.2f}", of_copy >= wanted - NOISE))
    for bar in bars:
        if bar.microseconds is not None:
            found.append(BarResult(f"{mine:.0f} <= {bar.microseconds:.0f} us", mine <= bar.microseconds))
        found += [_compare(names, wanted, mine, microseconds) for names, wanted in bar.times]
    return found


def _compare(names: Sequence[str], wanted: float, mine: float, microseconds: Mapping[str, float]) -> BarResult:
    others = {microseconds[name]: name for name in names if name in microseconds}
    if not others:
        return BarResult(f"{'/'.join(names)} >= {wanted:g}x", None)
    fastest = min(others)
    return BarResult(f"{others[fastest]} {fastest / mine:.2f} >= {wanted:g}x", fastest / mine >= wanted * (1 - NOISE))
