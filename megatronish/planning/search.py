"""Which layouts of a run fit a cluster, fastest first."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from megatronish.config.model import ModelConfig
from megatronish.errors import ConfigError
from megatronish.planning.hardware import Hardware
from megatronish.planning.layout import PlannedLayout
from megatronish.planning.memory_model import USABLE_SHARE, rank_memory
from megatronish.planning.parameters import StageLayers, stage_layers
from megatronish.planning.stack import MEGATRONISH, Stack
from megatronish.planning.throughput import Estimate, estimate

_POWERS = (1, 2, 4, 8, 16, 32, 64)


@dataclass(frozen=True)
class Candidate:
    """A layout that fits, and what it does."""

    layout: PlannedLayout
    estimate: Estimate


def best_layouts(
    model: ModelConfig, gpus: int, samples: int, hardware: Hardware, stack: Stack = MEGATRONISH, keep: int = 1
) -> list[Candidate]:
    """The `keep` fastest layouts of `gpus` GPUs for `samples` sequences a step that fit the memory; [] where none does.

    Axes are powers of two, tensor and sequence at most a node wide; of equally fast ones the simpler comes first.
    Raises ConfigError for a number of GPUs or samples below 1.
    """
    if gpus < 1 or samples < 1:
        raise ConfigError(f"{gpus} GPUs and {samples} samples per step: both must be at least 1.")
    found: list[Candidate] = []
    for pipeline in _POWERS:
        if pipeline > min(gpus, model.num_layers):
            break
        stages = stage_layers(model, pipeline)
        for layout in _layouts(model, gpus, samples, pipeline, hardware.gpus_per_node):
            if _fits(model, layout, stages, hardware):
                found.append(Candidate(layout, estimate(model, layout, hardware, stack, stages)))
        found = sorted(found, key=lambda candidate: candidate.estimate.seconds)[:keep]  # stable: simpler layouts first
    return found


def _layouts(model: ModelConfig, gpus: int, samples: int, pipeline: int, gpus_per_node: int) -> Iterator[PlannedLayout]:
    """Every layout with that many stages which the engine takes and whose batch comes out even."""
    widths = [width for width in _POWERS if width <= gpus_per_node]
    shapes = [(width, 1, divides) for width in widths for divides in (False, True) if width > 1 or not divides]
    shapes += [(1, width, False) for width in widths[1:]]
    for tensor, sequence, tensor_sequence in shapes:
        data, rest = divmod(gpus, tensor * sequence * pipeline)
        if rest or data == 0 or samples % data:
            continue
        shape = PlannedLayout(tensor, sequence, data, pipeline, tensor_sequence)
        for zero in range(4):
            candidate = replace(shape, zero=zero)
            try:
                candidate.check(model)
            except ConfigError:
                continue
            for micro in _POWERS:
                if samples // data % micro:
                    break
                batch = replace(candidate, micro_batch=micro, accumulation=samples // data // micro)
                yield batch
                yield replace(batch, recompute="selective")
                yield replace(batch, recompute="full")


def _fits(model: ModelConfig, layout: PlannedLayout, stages: list[StageLayers], hardware: Hardware) -> bool:
    limit = USABLE_SHARE * hardware.memory_bytes
    return all(rank_memory(model, layout, layers, stage).total <= limit for stage, layers in enumerate(stages))
