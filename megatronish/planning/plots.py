"""The scale study's pictures."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from megatronish.planning.hardware import Hardware
from megatronish.planning.published import published_runs
from megatronish.planning.scaling_report import Study, best_candidate, shares

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLORS = ("#2563a8", "#d1495b", "#e9a23b", "#3a8f6b", "#7a5ca8", "#5f6b7a", "#b0632f", "#1f9bb5", "#c04d9a")


def draw_study(folder: Path, chosen: Sequence[Study], gpus: Sequence[int], hardware: Hardware) -> list[Path]:
    """Draw predicted against published runs, and MFU and step shares of the best layouts. Returns the files written."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    folder.mkdir(parents=True, exist_ok=True)
    written = []
    figure, axes = pyplot.subplots(figsize=(6.4, 5.2), layout="constrained")
    _draw_published(axes)
    written.append(folder / "scaling_published.png")
    figure.savefig(written[-1], dpi=110)
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(12.5, 4.8), layout="constrained")
    _draw_best(left, right, chosen, gpus, hardware)
    written.append(folder / "scaling_best.png")
    figure.savefig(written[-1], dpi=110)
    pyplot.close("all")
    return written


def _draw_published(axes: Axes) -> None:
    runs = published_runs()
    for color, table in zip(COLORS, dict.fromkeys(run.table for run in runs)):
        for fitted, marker in ((True, "s"), (False, "o")):
            some = [run for run in runs if run.table == table and run.fitted == fitted]
            predicted = [100 * run.predict().mfu for run in some]
            reported = [mfu / (1 + run.error) for mfu, run in zip(predicted, some)]
            label = f"{table}{', fitted' if fitted else ''}" if some else None
            axes.scatter(
                reported, predicted, color=color, marker=marker, facecolors="none" if fitted else color, label=label
            )
    ends = [20.0, 60.0]
    axes.plot(ends, ends, color="#444", linewidth=1)
    for share, style in ((0.1, "--"), (0.2, ":")):
        for sign in (-1, 1):
            axes.plot(ends, [end * (1 + sign * share) for end in ends], style, color="#999", linewidth=0.8)
    axes.set(xlabel="MFU reported, %", ylabel="MFU predicted, %", xlim=ends, ylim=ends)
    axes.set_title("Published runs; dashes 10%, dots 20% off")
    axes.legend(fontsize=8)


def _draw_best(left: Axes, right: Axes, chosen: Sequence[Study], gpus: Sequence[int], hardware: Hardware) -> None:
    most = {}
    for color, study in zip(COLORS, chosen):
        found = [(count, best_candidate(study, count, hardware)) for count in gpus]
        points = [(count, candidate) for count, candidate in found if candidate is not None]
        left.plot(
            [p[0] for p in points], [100 * p[1].estimate.mfu for p in points], "o-", color=color, label=study.name
        )
        if points:
            most[f"{study.name}\n{points[-1][0]:,} GPUs"] = shares(points[-1][1].estimate.parts)
    left.set_xscale("log", base=2)
    left.set_xticks(list(gpus), [f"{count:,}" for count in gpus])
    left.set(xlabel=f"GPUs ({hardware.name})", ylabel="MFU of the best layout, %", ylim=(0, 50))
    left.set_title("The same batch on more GPUs")
    left.legend(fontsize=8)
    start = [0.0] * len(most)
    for color, part in zip(
        ("#2563a8", "#3a8f6b", "#8fb4d9", "#d1495b", "#e9a23b", "#5f6b7a"), next(iter(most.values()), {})
    ):
        widths = [100 * parts[part] for parts in most.values()]
        right.barh(list(most), widths, left=start, color=color, label=part)
        start = [a + b for a, b in zip(start, widths)]
    right.invert_yaxis()
    right.set(xlabel="share of a step, %", xlim=(0, 100))
    right.set_title("Shares of a step on the largest cluster")
    right.tick_params(axis="y", labelsize=8)
    right.legend(fontsize=7.5, ncols=6, loc="upper center", bbox_to_anchor=(0.5, -0.12))
