"""The curves of a run: read from metrics.jsonl and drawn as one figure."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from megatronish.checkpoint.paths import EVALUATION_FILE, RUN_FILE
from megatronish.config.run import RunConfig
from megatronish.errors import UserError
from megatronish.model.accounting import parameter_counts
from megatronish.training.monitoring.metrics import METRICS_FILE

if TYPE_CHECKING:
    from matplotlib.axes import Axes

FIGURE_FILE = "loss.png"
# The smoothed curve averages over about this share of the reports.
SMOOTHING_SHARE = 0.05
TRAIN_COLOR, VALIDATION_COLOR, MUTED = "#2563a8", "#d1495b", "#5f6b7a"


@dataclass
class Curves:
    """Points of metrics.jsonl in the order of steps. Steps count optimizer steps; losses are in nats per token."""

    steps: list[int] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    rates: list[float] = field(default_factory=list)
    grad_norms: list[float] = field(default_factory=list)  # NaN where none was reported
    speeds: list[float] = field(default_factory=list)  # tokens/s
    tokens: int = 0  # trained on by the last report
    validation_steps: list[int] = field(default_factory=list)
    validation_losses: list[float] = field(default_factory=list)

    @property
    def best(self) -> tuple[int, float] | None:
        """Step and loss of the lowest finite validation loss."""
        finite = [(loss, step) for step, loss in zip(self.validation_steps, self.validation_losses) if loss < math.inf]
        if not finite:
            return None
        loss, step = min(finite)
        return step, loss


def read_curves(run_dir: Path) -> Curves:
    """The metrics of a run, without lines that a crash cut short. Raises UserError when there are none."""
    path = run_dir / METRICS_FILE
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    except FileNotFoundError:
        raise UserError(f"{path} does not exist: give the folder of a run (--train.save_dir) that has begun") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None
    curves = Curves()
    for line in lines:
        try:
            record = json.loads(line)
            step = int(record["step"])
        except (ValueError, KeyError, TypeError):
            continue
        if "loss" in record:
            curves.steps.append(step)
            curves.losses.append(_number(record["loss"]))
            curves.rates.append(_number(record.get("lr")))
            curves.grad_norms.append(_number(record.get("grad_norm")))
            curves.speeds.append(_number(record.get("tokens_per_second")))
            curves.tokens = int(record.get("tokens") or curves.tokens)
        if "validation_loss" in record:
            curves.validation_steps.append(step)
            curves.validation_losses.append(_number(record["validation_loss"]))
    if not curves.steps and not curves.validation_steps:
        raise UserError(
            f"{path} holds no loss yet: wait for the run's first report (every --train.log_interval steps), or train "
            "for more steps than that"
        )
    return curves


def smooth(values: list[float], width: int) -> list[float]:
    """Centered moving average over `width` values, which does not delay a slope.

    The window shrinks towards both ends. Non-finite values are ignored; a window without finite values gives NaN.
    """
    numbers = np.array(values, dtype=np.float64)
    finite = np.isfinite(numbers)
    sums = np.concatenate(([0.0], np.cumsum(np.where(finite, numbers, 0.0))))
    counts = np.concatenate(([0], np.cumsum(finite)))
    places = np.arange(len(numbers))
    half = np.minimum(np.minimum(places, places[::-1]), max(0, width - 1) // 2)
    low, high = places - half, places + half + 1
    inside = counts[high] - counts[low]
    means = np.full(len(numbers), np.nan)
    np.divide(sums[high] - sums[low], inside, out=means, where=inside > 0)
    return means.tolist()


def draw_curves(run_dir: Path, output: Path | None = None) -> Path:
    """Draw loss, learning rate, gradient norm and speed of a run into run_dir/loss.png (or `output`); returns its path.

    The format follows the suffix of `output` (.png, .svg, .pdf). Raises UserError for missing metrics, an unknown
    suffix or no permission.
    """
    curves = read_curves(run_dir)
    output = output or run_dir / FIGURE_FILE
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 6.6), layout="constrained")
    FigureCanvasAgg(figure)
    if output.suffix.lstrip(".") not in figure.canvas.get_supported_filetypes():
        raise UserError(f"{output}: no picture format is called {output.suffix!r}: use .png, .svg or .pdf")
    grid = figure.add_gridspec(2, 3, height_ratios=[2.2, 1])
    top = figure.add_subplot(grid[0, :])
    _draw_loss(top, curves)
    _write_title(top, run_dir, curves)
    _write_evaluation(top, run_dir)
    power = _power_of_ten(curves.rates)
    panels = [
        (f"learning rate (1e{power})", [rate / 10.0**power for rate in curves.rates]),
        ("gradient norm", curves.grad_norms),
        ("speed (thousand tokens/s)", [speed / 1e3 for speed in curves.speeds]),
    ]
    for column, (name, values) in enumerate(panels):
        _draw_panel(figure.add_subplot(grid[1, column]), name, curves.steps, values)
    try:
        figure.savefig(output, dpi=140)
    except OSError as error:
        raise UserError(f"{output} cannot be written: {error.strerror}") from None
    return output


def _draw_panel(axes: Axes, name: str, steps: list[int], values: list[float]) -> None:
    axes.set_title(name, fontsize=10, loc="left")
    axes.set_xlabel("optimizer step")
    _style(axes)
    if any(math.isfinite(value) for value in values):
        axes.plot(steps, values, color=MUTED, linewidth=1.2, marker="o" if len(values) < 3 else None)
        axes.set_ylim(bottom=0)
    else:
        axes.text(0.5, 0.5, "not reported", transform=axes.transAxes, ha="center", va="center", color=MUTED)


def _power_of_ten(values: list[float]) -> int:
    """The exponent of the largest value as it is written in scientific notation; 0 where there is none."""
    largest = max((value for value in values if 0 < value < math.inf), default=1.0)
    return math.floor(math.log10(largest))


def _draw_loss(axes: Axes, curves: Curves) -> None:
    width = round(SMOOTHING_SHARE * len(curves.steps))
    if width < 3:  # too few reports to smooth
        axes.plot(curves.steps, curves.losses, color=TRAIN_COLOR, lw=1.5, marker="o", markersize=3, label="training")
    else:
        axes.plot(curves.steps, curves.losses, color=TRAIN_COLOR, alpha=0.35, lw=1, label="training, as reported")
        axes.plot(curves.steps, smooth(curves.losses, width), color=TRAIN_COLOR, lw=2, label="training, smoothed")
    if curves.validation_steps:
        axes.plot(
            curves.validation_steps,
            curves.validation_losses,
            color=VALIDATION_COLOR,
            lw=1.2,
            marker="o",
            markersize=4.5,
            label="validation (held-out documents)",
        )
    if curves.best:
        step, loss = curves.best
        axes.plot(
            [step],
            [loss],
            linestyle="none",
            marker="*",
            markersize=15,
            color=VALIDATION_COLOR,
            markeredgecolor="white",
            label=f"best validation: {loss:.3f} at step {step:,}",
            zorder=4,
        )
    axes.set_xlabel("optimizer step")
    axes.set_ylabel("loss (nats per token)")
    axes.legend(loc="upper right", frameon=False)
    _style(axes)


def _style(axes: Axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(color="#000000", alpha=0.1, linewidth=0.6)
    axes.margins(x=0.02)
    axes.locator_params(axis="x", integer=True)


def _write_title(axes: Axes, run_dir: Path, curves: Curves) -> None:
    parts = [run_dir.resolve().name]
    config = run_dir / RUN_FILE
    if config.exists():
        model = RunConfig.load(config).megatronish.model
        parts.append(f"{model.preset or 'custom'}, {short_count(parameter_counts(model).total)} parameters")
    if curves.tokens:
        parts.append(f"{short_count(curves.tokens)} tokens")
    axes.set_title("   ·   ".join(parts), loc="left", fontsize=13, fontweight="bold")


def _write_evaluation(axes: Axes, run_dir: Path) -> None:
    """The bits per byte that launchers/evaluate.py measured, if it did."""
    try:
        result: dict[str, Any] = json.loads((run_dir / EVALUATION_FILE).read_bytes())
        rows = [(name, float(result[f"{key}bits_per_byte"])) for name, key in _COMPARED]
        step = f" at step {int(result['step']):,}" if result.get("step") is not None else ""
    except FileNotFoundError:
        return
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{run_dir / EVALUATION_FILE} cannot be read ({error!r}): evaluate the run again") from None
    lines = [f"bits per byte{step}", *(f"{name:<8}{bits:8.3f}" for name, bits in rows)]
    axes.text(
        0.985,
        0.62,  # below the legend
        "\n".join(lines),
        transform=axes.transAxes,
        family="monospace",
        fontsize=9,
        horizontalalignment="right",
        verticalalignment="top",
        multialignment="left",
        bbox={"boxstyle": "round,pad=0.5", "facecolor": "white", "edgecolor": "#c3c9d1"},
    )


_COMPARED = (("model", ""), ("gzip -9", "gzip_"), ("xz -9e", "xz_"))


def short_count(number: float) -> str:
    """4,200,000 as 4.2M; three significant digits."""
    for unit, size in (("T", 1e12), ("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= size:
            return f"{number / size:.3g}{unit}"
    return f"{number:.0f}"


def _number(value: object) -> float:
    return float(value) if isinstance(value, (int, float)) else math.nan
