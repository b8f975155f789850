"""The scale study as Markdown tables: predictions and published runs, traffic of layouts, best layouts of clusters."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from megatronish.config.model import ModelConfig
from megatronish.config.presets import resolve_model
from megatronish.planning.communication import step_traffic, traffic_group
from megatronish.planning.hardware import Hardware
from megatronish.planning.layout import AxisName, PlannedLayout
from megatronish.planning.memory_model import USABLE_SHARE
from megatronish.planning.parameters import stage_layers
from megatronish.planning.published import PublishedRun, gpt, llama3, published_runs
from megatronish.planning.search import Candidate, best_layouts
from megatronish.planning.stack import MEGATRONISH
from megatronish.planning.throughput import Estimate, StepParts, bucketed_seconds, estimate

AXES: tuple[AxisName, ...] = ("tp", "sp", "pp", "data")


@dataclass(frozen=True)
class Study:
    """A model of the study and the tokens of one of its optimizer steps."""

    name: str
    model: ModelConfig
    tokens: int

    @property
    def samples(self) -> int:
        """Sequences a step: the power of two that comes nearest to the tokens."""
        samples: int = 2 ** round(math.log2(self.tokens / self.model.seq_length))
        return samples


def studies(tokens: int | None = None) -> list[Study]:
    """The project's own sizes and some published ones. tokens: a step, in place of 4M (16M for the three largest)."""
    presets: Mapping[str, Mapping[str, int]] = {
        "s0_300m": {},
        "s1_730m": {},
        "llama3_2_1b": {"seq_length": 8192},
        "s3_4b": {},
        "s3_7b": {},
        "llama3_8b": {},
    }
    small = [Study(name, resolve_model({"preset": name, **more}), tokens or 2**22) for name, more in presets.items()]
    large = {
        "Llama 3 70B": llama3("70B"),
        "GPT-3 175B": gpt(96, 12288, 96, 51200, 2048, tied=True),
        "Llama 3 405B": llama3("405B"),
    }
    return small + [Study(name, model, tokens or 2**24) for name, model in large.items()]


def published_table() -> str:
    """Every published run and its prediction."""
    rows = []
    for run in published_runs():
        predicted = run.predict()
        reported_mfu = predicted.mfu / (1 + run.error)
        mark = "fit" if run.fitted else ""
        rows.append(
            [
                run.table,
                run.name,
                f"{run.layout.ranks:,}",
                run.layout.describe() + (f" v{run.layout.interleave}" if run.layout.interleave > 1 else ""),
                f"{run.tokens_per_gpu_second:,.0f}",
                f"{predicted.tokens_per_gpu_second:,.0f}",
                f"{reported_mfu:.1%}",
                f"{predicted.mfu:.1%}",
                f"{run.error:+.1%}",
                mark,
            ]
        )
    heads = [
        "source",
        "model",
        "GPUs",
        "layout",
        "reported tok/s/GPU",
        "predicted",
        "MFU reported",
        "predicted",
        "error",
        "",
    ]
    return markdown(heads, rows) + "\n\n" + "\n".join(_summary(published_runs()))


def _summary(runs: Sequence[PublishedRun]) -> list[str]:
    """Mean and largest error of each source, with the fitted runs and without."""
    lines = []
    for table in dict.fromkeys(run.table for run in runs):
        for label, fitted in (("fitted", True), ("not fitted", False)):
            errors = [abs(run.error) for run in runs if run.table == table and run.fitted == fitted]
            if errors:
                lines.append(
                    f"- {table}, {len(errors)} {label}: mean error {sum(errors) / len(errors):.1%}, "
                    f"largest {max(errors):.1%}"
                )
    return lines


def traffic_table(model: ModelConfig, layouts: Sequence[PlannedLayout], hardware: Hardware) -> str:
    """What the busiest stage's rank sends in a step along each axis, how long that takes alone, and what stays visible."""
    rows = []
    for layout in layouts:
        predicted = estimate(model, layout, hardware)
        sent = [_axis_cost(model, layout, axis, hardware) for axis in AXES]
        visible = predicted.parts.tensor + predicted.parts.pipeline_messages + predicted.parts.data
        rows.append(
            [
                layout.describe(),
                *[f"{size / 1e9:,.1f} GB, {seconds:.2f} s" if size else "" for size, seconds in sent],
                f"{visible:.2f} s",
                f"{predicted.seconds:.2f} s",
                f"{predicted.mfu:.1%}",
                f"{predicted.memory.total / 1e9:.0f} GB"
                + ("" if predicted.memory.total <= USABLE_SHARE * hardware.memory_bytes else ": too much"),
            ]
        )
    heads = ["layout", "tp", "sp", "pp", "data", "visible", "step", "MFU", "memory"]
    return markdown(heads, rows)


def _axis_cost(model: ModelConfig, layout: PlannedLayout, axis: AxisName, hardware: Hardware) -> tuple[float, float]:
    """Bytes sent per rank along an axis per step, and their seconds without contention: those of the costliest stage."""
    costs = [(0.0, 0.0)]
    for layers in stage_layers(model, layout.pipeline):
        size = seconds = 0.0
        for entry in step_traffic(model, layout, MEGATRONISH, layers):
            if entry.axis == axis:
                size += entry.sent(traffic_group(entry, layout, hardware.gpus_per_node).size)
                seconds += entry.calls * bucketed_seconds(entry, layout, MEGATRONISH, hardware, layers)[0]
        costs.append((size, seconds))
    return max(costs, key=lambda cost: cost[1])


def best_table(chosen: Sequence[Study], gpus: Sequence[int], hardware: Hardware) -> str:
    """The fastest layout that fits, of every model and cluster."""
    rows = []
    for study in chosen:
        for count in gpus:
            candidate = best_candidate(study, count, hardware)
            cells = ["does not fit"] if candidate is None else _cells(candidate)
            rows.append([study.name, f"{count:,}", *cells])
    heads = ["model", "GPUs", "layout", "tok/s/GPU", "MFU", "step", "memory", "waiting"]
    return markdown(heads, rows)


def best_candidate(study: Study, gpus: int, hardware: Hardware) -> Candidate | None:
    """The fastest layout, or None where nothing fits."""
    found = best_layouts(study.model, gpus, study.samples, hardware)
    return found[0] if found else None


def _cells(candidate: Candidate) -> list[str]:
    predicted = candidate.estimate
    return [
        candidate.layout.describe(),
        f"{predicted.tokens_per_gpu_second:,.0f}",
        f"{predicted.mfu:.1%}",
        f"{predicted.seconds:.3g} s",
        f"{predicted.memory.total / 1e9:.0f} GB",
        waiting(predicted),
    ]


def shares(parts: StepParts) -> dict[str, float]:
    """Shares of a step, by what a GPU does meanwhile."""
    groups = {
        "compute": parts.compute,
        "optimizer": parts.optimizer,
        "recompute": parts.recompute,
        "tensor or sequence": parts.tensor,
        "pipeline": parts.pipeline_bubble + parts.pipeline_messages,
        "data": parts.data,
    }
    return {name: seconds / parts.total for name, seconds in groups.items()}


def waiting(predicted: Estimate) -> str:
    """Shares of a step that are not compute, in percent, where at least one percent."""
    found = {name: share for name, share in shares(predicted.parts).items() if name != "compute" and share >= 0.01}
    return ", ".join(f"{name} {share:.0%}" for name, share in found.items())


def markdown(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table; short rows are filled up."""
    lines = [f"| {' | '.join(heads)} |", "|" + "---|" * len(heads)]
    lines += [f"| {' | '.join([*row, *[''] * (len(heads) - len(row))])} |" for row in rows]
    return "\n".join(lines)
