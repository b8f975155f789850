"""Norms and singular values of the weight matrices of a run, by step: measured from its checkpoints, drawn, and as JSON."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from megatronish.checkpoint.paths import CHECKPOINTS, STATE_FILE
from megatronish.checkpoint.store import step_of
from megatronish.checkpoint.weights import WEIGHTS_FILE
from megatronish.errors import UserError
from megatronish.files import write_atomic

if TYPE_CHECKING:
    from matplotlib.axes import Axes

SPECTRA_FILE, WEIGHTS_JSON = "spectra.png", "weights.json"
MAX_LAYERS = 8  # measured, evenly spaced, the first and the last among them
MAX_ROWS = 16384  # of a matrix, evenly spaced
QUANTILES = 65  # singular values that are kept of each matrix
KINDS = {  # by the end of a parameter's name: kind and color
    "attention.qkv.weight": ("attention qkv", "#2563a8"),
    "attention.out.weight": ("attention out", "#5fa8d3"),
    "mlp.up.weight": ("MLP in", "#d1495b"),
    "mlp.down.weight": ("MLP out", "#edae49"),
    "embedding.weight": ("embedding", "#3b7d4f"),
    "head.weight": ("head", "#8d6a9f"),
}
COLORS = dict(KINDS.values())


@dataclass(frozen=True)
class MatrixMeasure:
    """One matrix [rows, columns] of a checkpoint, with singular values s in descending order and r = min(rows, columns).

    rms: root mean square of the entries; spectral_norm: s[0]; stable_rank: sum(s^2) / s[0]^2; effective_rank: exp of the entropy
    of s / sum(s) (Roy and Vetterli, 2007), both from 1 to r; quantiles: `QUANTILES` of s, evenly spaced from s[0] to s[r - 1].
    """

    step: int
    name: str
    kind: str
    layer: int | None  # None outside the blocks
    shape: tuple[int, int]
    rms: float
    spectral_norm: float
    stable_rank: float
    effective_rank: float
    quantiles: tuple[float, ...]


def measure_matrix(weight: Tensor, step: int, name: str) -> MatrixMeasure:
    """Measure a matrix, in fp32. With more than MAX_ROWS rows, a sample is measured, scaled to the norm of the full matrix.

    All measures of a matrix with non-finite entries are NaN.
    """
    rows, columns = weight.shape
    stride = -(-rows // MAX_ROWS)
    sample = weight[::stride].float()
    if sample.isfinite().all():
        values = torch.linalg.svdvals(sample).double().cpu() * (rows / sample.shape[0]) ** 0.5
    else:
        values = torch.full((min(sample.shape),), torch.nan, dtype=torch.float64)
    squares, shares = values.square(), values / values.sum().clamp(min=1e-300)
    positions = torch.linspace(0, len(values) - 1, QUANTILES).round().long()
    layer = name.split(".")[1] if name.startswith("blocks.") else None
    return MatrixMeasure(
        step=step,
        name=name,
        kind=kind_of(name),
        layer=None if layer is None else int(layer),
        shape=(rows, columns),
        rms=(squares.sum() / (rows * columns)).sqrt().item(),
        spectral_norm=values[0].item(),
        stable_rank=(squares.sum() / squares[0].clamp(min=1e-300)).item(),
        effective_rank=torch.special.entr(shares).sum().exp().item(),
        quantiles=tuple(values[positions].tolist()),
    )


def kind_of(name: str) -> str:
    """The kind of a parameter; "" for those that are not measured."""
    return next((kind for end, (kind, _) in KINDS.items() if name == end or name.endswith("." + end)), "")


def _evenly(items: Sequence[int], count: int) -> list[int]:
    """At most `count` of `items`, evenly spaced, the first and the last among them."""
    if len(items) <= count:
        return list(items)
    return [items[round(i * (len(items) - 1) / max(1, count - 1))] for i in range(count)]


def measure_run(
    run_dir: Path, minutes: float, layers: int = MAX_LAYERS, progress: Callable[[float, float], None] = lambda *_: None
) -> list[MatrixMeasure]:
    """Measure the checkpoints of a run: the newest first, then the oldest, then those between, until `minutes` have passed.

    No checkpoint is begun that would end too late, but one is always measured. progress: receives the cost done and the total.
    Returns [] for a run without checkpoints; raises UserError for one that cannot be read.
    """
    folders = sorted(path.parent for path in (run_dir / CHECKPOINTS).glob(f"step-*/{STATE_FILE}"))
    device = "cuda" if torch.cuda.is_available() else "cpu"
    begin, spent, done, measures = time.monotonic(), 0.0, 0.0, []
    for number, index in enumerate(_coarse_to_fine(len(folders))):
        if number and time.monotonic() - begin + spent > 60 * minutes:
            break
        started = time.monotonic()
        try:
            with safe_open(folders[index] / WEIGHTS_FILE, framework="pt") as file:
                names = _chosen(list(file.keys()), layers)
                costs = [_cost(file.get_slice(name).get_shape()) for name in names]
                total = sum(costs) * len(folders)
                for name, cost in zip(names, costs, strict=True):
                    measures.append(measure_matrix(file.get_tensor(name).to(device), step_of(folders[index]), name))
                    done += cost
                    progress(done, total)
        except (OSError, SafetensorError) as error:
            raise UserError(f"{folders[index] / WEIGHTS_FILE} cannot be read: {error}") from None
        spent = time.monotonic() - started
    return sorted(measures, key=lambda measure: measure.step)


def _chosen(names: list[str], layers: int) -> list[str]:
    found = sorted({int(name.split(".")[1]) for name in names if name.startswith("blocks.")})
    kept = {f"blocks.{layer}." for layer in _evenly(found, layers)}
    return [n for n in names if kind_of(n) and (not n.startswith("blocks.") or n[: n.index(".", 7) + 1] in kept)]


def _cost(shape: Sequence[int]) -> float:
    """Of the singular values of a matrix, up to a constant factor."""
    rows, columns = min(shape[0], MAX_ROWS), shape[1]
    return float(rows * columns * min(rows, columns))


def _coarse_to_fine(count: int) -> Iterator[int]:
    """0 to count - 1: the last, the first, then the middle of each gap."""
    seen: set[int] = set()
    parts = 1
    while len(seen) < count:
        for part in range(parts, -1, -1):
            index = round(part * (count - 1) / parts)
            if index not in seen:
                seen.add(index)
                yield index
        parts *= 2


def write_measures(measures: Sequence[MatrixMeasure], path: Path) -> Path:
    """Write the measures as a JSON list with an object per matrix and step; returns `path`."""
    write_atomic(path, json.dumps([asdict(measure) for measure in measures], indent=1) + "\n")
    return path


def table(measures: Sequence[MatrixMeasure]) -> str:
    """Means over layers by kind of matrix, at the first and the last step."""
    first, last = measures[0].step, measures[-1].step
    steps = f"step {last:,}" if first == last else f"step {first:,} > {last:,}"
    lines = [f"{steps:<24}{'RMS':>20}{'spectral norm':>20}{'stable rank':>20}{'effective rank':>20}"]
    for kind in COLORS:
        of_kind = [measure for measure in measures if measure.kind == kind]
        if not of_kind:
            continue
        cells = []
        for field in ("rms", "spectral_norm", "stable_rank", "effective_rank"):
            ends = [_mean([getattr(m, field) for m in of_kind if m.step == step]) for step in sorted({first, last})]
            cells.append(f"{' > '.join(f'{end:.4g}' for end in ends):>20}")
        lines.append(f"{kind + ' (' + ' x '.join(map(str, of_kind[0].shape)) + ')':<24}" + "".join(cells))
    return "\n".join(lines)


def draw_spectra(measures: Sequence[MatrixMeasure], title: str, output: Path) -> Path:
    """Draw norms and ranks by step (of one checkpoint by layer) and the newest singular values; returns `output`.

    Lines are means over layers, shaded from the smallest to the largest layer.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 7), layout="constrained")
    FigureCanvasAgg(figure)
    steps = sorted({measure.step for measure in measures})
    newest = [measure for measure in measures if measure.step == steps[-1]]
    by_step = len(steps) > 1
    axes = figure.subplot_mosaic([[0, 1, 2], [3, "values", "layers" if by_step else "values"]])
    panels: list[tuple[str, Callable[[MatrixMeasure], float]]] = [
        ("RMS of the entries", lambda m: m.rms),
        ("spectral norm", lambda m: m.spectral_norm),
        ("stable rank / full rank", lambda m: m.stable_rank / min(m.shape)),
        ("effective rank / full rank", lambda m: m.effective_rank / min(m.shape)),
    ]
    for number, (name, value) in enumerate(panels):
        (_draw_by_step if by_step else _draw_by_layer)(axes[number], name, measures, value)
    _draw_values(axes["values"], newest, steps[-1])
    if by_step:
        _draw_by_layer(axes["layers"], f"spectral norm, step {steps[-1]:,}", newest, lambda m: m.spectral_norm)
    handles, labels = axes["values"].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False)
    figure.suptitle(title, x=0.01, ha="left", fontsize=13, fontweight="bold")
    try:
        figure.savefig(output, dpi=130)
    except OSError as error:
        raise UserError(f"{output} cannot be written: {error.strerror}") from None
    return output


def _draw_by_step(
    axes: Axes, name: str, measures: Sequence[MatrixMeasure], value: Callable[[MatrixMeasure], float]
) -> None:
    for kind, color in COLORS.items():
        steps = sorted({measure.step for measure in measures if measure.kind == kind})
        if steps:
            groups = [[value(m) for m in measures if m.kind == kind and m.step == step] for step in steps]
            axes.plot(steps, [_mean(group) for group in groups], color=color, lw=1.6, marker="o", markersize=3)
            axes.fill_between(steps, [min(g) for g in groups], [max(g) for g in groups], color=color, alpha=0.12, lw=0)
    _style(axes, name, "optimizer step")


def _draw_by_layer(
    axes: Axes, name: str, measures: Sequence[MatrixMeasure], value: Callable[[MatrixMeasure], float]
) -> None:
    """Of one checkpoint; matrices outside the blocks are dashed lines."""
    for kind, color in COLORS.items():
        points = [(m.layer, value(m)) for m in measures if m.kind == kind]
        layers = [layer for layer, _ in points if layer is not None]
        if layers:
            points.sort()
            axes.plot(*zip(*points, strict=True), color=color, lw=1.6, marker="o", markersize=4)
        elif points:
            axes.axhline(points[0][1], color=color, lw=1.4, linestyle="--")
    _style(axes, name, "layer")


def _draw_values(axes: Axes, newest: Sequence[MatrixMeasure], step: int) -> None:
    """Singular values against their place, as means over layers."""
    places = [i / (QUANTILES - 1) for i in range(QUANTILES)]
    for kind, color in COLORS.items():
        rows = [measure.quantiles for measure in newest if measure.kind == kind]
        if rows:
            axes.plot(places, [_mean(column) for column in zip(*rows, strict=True)], color=color, lw=1.6, label=kind)
    _style(axes, f"singular values, step {step:,}", "index / full rank", integer=False)


def _style(axes: Axes, name: str, x: str, integer: bool = True) -> None:
    """Norms are drawn on a logarithmic axis, ranks from 0 to 1."""
    axes.set_title(name, fontsize=10, loc="left")
    axes.set_xlabel(x)
    if "full rank" in name:
        axes.set_ylim(0, 1.02)
    else:
        axes.set_yscale("log")
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(color="#000000", alpha=0.1, linewidth=0.6)
    axes.locator_params(axis="x", integer=integer, nbins=6)


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
