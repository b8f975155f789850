"""How long an optimizer step takes under a layout, and where the time goes."""

from __future__ import annotations

from dataclasses import dataclass, fields

from megatronish.config.model import ModelConfig
from megatronish.model.accounting import flops_per_token
from megatronish.planning.communication import Traffic, collective_seconds, step_traffic, traffic_group
from megatronish.planning.compute import StageTime, stage_time
from megatronish.planning.hardware import Hardware
from megatronish.planning.layout import PlannedLayout
from megatronish.planning.memory_model import GRADIENT_BYTES, RankMemory, rank_memory
from megatronish.planning.parameters import StageLayers, rank_parameters, stage_layers
from megatronish.planning.stack import MEGATRONISH, Stack

BUCKET_ELEMENTS = 50_000_000  # of gradients or weights that travel together
_SUM_BYTES = 2 + 4 + 4  # memory traffic of adding a bf16 gradient to an fp32 sum, an element
_STEP_BYTES = 4 + 4 * 4 + 3 * 4 + 2  # gradient norm; read gradient, weight, moments; write them, and the bf16 weight


@dataclass(frozen=True)
class StepParts:
    """Seconds of a step. compute: products, attention and kernels, forward and backward, averaged over the stages."""

    compute: float
    recompute: float
    tensor: float
    pipeline_messages: float
    pipeline_bubble: float
    data: float
    optimizer: float

    @property
    def total(self) -> float:
        """The step."""
        return sum(getattr(self, part.name) for part in fields(self))


@dataclass(frozen=True)
class Estimate:
    """A step of a model under a layout. memory: of the stage that needs most."""

    parts: StepParts
    tokens: int
    ranks: int
    flops_per_token: float
    peak_flops: float
    memory: RankMemory

    @property
    def seconds(self) -> float:
        """A step."""
        return self.parts.total

    @property
    def tokens_per_gpu_second(self) -> float:
        """Throughput of a GPU."""
        return self.tokens / self.seconds / self.ranks

    @property
    def mfu(self) -> float:
        """Share of the peak that the model's own operations are, exactly the causal ones (model.accounting)."""
        return self.tokens_per_gpu_second * self.flops_per_token / self.peak_flops


def estimate(
    model: ModelConfig,
    layout: PlannedLayout,
    hardware: Hardware,
    stack: Stack = MEGATRONISH,
    stages: list[StageLayers] | None = None,
) -> Estimate:
    """Time and memory of a step in bf16, on sequences of model.seq_length tokens.

    stages: the layers of each pipeline stage (default: `stage_layers`, which is what the trainer does).
    """
    stages = stages or stage_layers(model, layout.pipeline)
    times = [stage_time(model, layout, stack, hardware, layers) for layers in stages]
    slowest = max(range(len(stages)), key=lambda stage: times[stage].total)
    micro, mean = layout.accumulation, sum(time.total for time in times) / len(times)
    message = _message_seconds(model, layout, stack, hardware)
    # All stages fill and drain once; between, the slowest sets the pace.
    total = (
        micro * times[slowest].total + (sum(time.total for time in times) - times[slowest].total) / layout.interleave
    )
    messages = 2 * message * (micro * layout.interleave * (not stack.hides_messages) + layout.pipeline - 1)
    data = max(_data_seconds(model, layout, stack, hardware, *pair) for pair in zip(stages, times, strict=True))
    average = [sum(getattr(time, part.name) for time in times) / len(times) for part in fields(StageTime)]
    forward, backward, recompute, tensor_forward, tensor_backward = average
    parts = StepParts(
        compute=micro * (forward + backward),
        recompute=micro * recompute,
        tensor=micro * (tensor_forward + tensor_backward),
        pipeline_messages=messages if layout.pipeline > 1 else 0.0,
        pipeline_bubble=total - micro * mean,
        data=data,
        optimizer=max(_optimizer_seconds(model, layout, hardware, layers) for layers in stages),
    )
    memories = [rank_memory(model, layout, layers, stage) for stage, layers in enumerate(stages)]
    return Estimate(
        parts=parts,
        tokens=layout.samples * model.seq_length,
        ranks=layout.ranks,
        flops_per_token=flops_per_token(model).train,
        peak_flops=hardware.peak_flops,
        memory=max(memories, key=lambda memory: memory.total),
    )


def _message_seconds(model: ModelConfig, layout: PlannedLayout, stack: Stack, hardware: Hardware) -> float:
    if layout.pipeline == 1:
        return 0.0
    parts = layout.tensor if layout.tensor_sequence or stack.divides_messages else 1
    payload = layout.micro_batch * model.seq_length * model.hidden_size * 2 / parts
    return collective_seconds("point_to_point", payload, layout.group("pp", hardware.gpus_per_node), hardware)


def _data_seconds(
    model: ModelConfig, layout: PlannedLayout, stack: Stack, hardware: Hardware, layers: StageLayers, time: StageTime
) -> float:
    """Communication over the ranks that ZeRO divides states over, and of a tied embedding, less what computation hides."""
    visible = 0.0
    forward, backward = time.forward + time.tensor_forward, time.backward + time.recompute + time.tensor_backward
    for entry in step_traffic(model, layout, stack, layers):
        if entry.axis == "data":
            seconds, buckets = bucketed_seconds(entry, layout, stack, hardware, layers)
            if layout.zero == 3:
                # Gathering runs one layer ahead; in the backward pass it shares the links with the reduction.
                window = forward if entry.phase == "forward" else backward / 2
            elif entry.phase == "reduce":
                window = backward if stack.hides_data and _reduces_early(layout, stack) else 0.0
            else:
                window = forward if stack.hides_gather else 0.0
            # The first or the last bucket overlaps with nothing.
            visible += entry.calls * (max(seconds - window, seconds / buckets) if window else seconds)
        elif entry.axis == "pp" and entry.phase == "reduce":
            visible += entry.calls * bucketed_seconds(entry, layout, stack, hardware, layers)[0]
    return visible


def _reduces_early(layout: PlannedLayout, stack: Stack) -> bool:
    return layout.pipeline == 1 or stack.reduces_in_pipeline_gaps


def bucketed_seconds(
    entry: Traffic, layout: PlannedLayout, stack: Stack, hardware: Hardware, layers: StageLayers
) -> tuple[float, int]:
    """Seconds of one call of `entry` without contention, and the number of collectives that it is split into.

    Gradients are sent in buckets of tensors, and so are weights that are gathered while something computes: under
    ZeRO-3 a block at a time at most. DeepSpeed gathers updated weights at once; activations are never cut.
    """
    elements = entry.payload / (stack.gradient_bytes if entry.phase == "reduce" else 2)
    buckets = 1
    if entry.axis == "data" and (entry.phase != "update" or stack.hides_gather):
        matrices = 4 * layers.blocks + layers.first + layers.last
        buckets = max(1, min(round(elements / BUCKET_ELEMENTS), matrices))
    if layout.zero == 3 and entry.kind == "all_gather":
        buckets = max(buckets, layers.blocks)
    group = traffic_group(entry, layout, hardware.gpus_per_node)
    return buckets * collective_seconds(entry.kind, entry.payload / buckets, group, hardware), buckets


def _optimizer_seconds(model: ModelConfig, layout: PlannedLayout, hardware: Hardware, layers: StageLayers) -> float:
    """Adding up gradients, and the step on the states that the rank owns."""
    count = rank_parameters(model, layout.tensor, layers).total
    summed = count / (layout.shards if layout.zero >= 2 else 1)
    owned = count / (layout.shards if layout.zero >= 1 else 1)
    assert GRADIENT_BYTES == 4, "the traffic of sums is counted for fp32"
    return (layout.accumulation * summed * _SUM_BYTES + owned * _STEP_BYTES) / hardware.stream_rate
