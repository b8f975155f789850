"""The summary that the first rank prints before a run's first step."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from megatronish.launch.process import Rank
from megatronish.model.accounting import flops_per_token, parameter_counts
from megatronish.training.monitoring.metrics import clock
from megatronish.training.monitoring.mfu import Peak
from megatronish.training.setup.preparation import Prepared

CPU_EFFICIENCY = 0.4  # of the measured matmul rate, for the first estimate of a step's time
SLOW_STEP_SECONDS = 60.0


def announce(run: Prepared, rank: Rank, device: torch.device, peak: Peak | None) -> None:
    """Print what is trained, on what data and hardware, in aligned lines; run.json holds the full configuration."""
    print("\n".join(f"{label:<11} {text}" for label, text in summary(run, rank, device, peak)), flush=True)


def summary(run: Prepared, rank: Rank, device: torch.device, peak: Peak | None) -> Iterator[tuple[str, str]]:
    """Pairs of label and text; a text without a label continues the one before."""
    plan, ours, ds = run.plan, run.config.megatronish, run.config.deepspeed
    model, train, parallel = ours.model, ours.train, ours.parallel
    yield (
        "model",
        (
            f"{model.preset or 'custom'}, {parameter_counts(model).total:,} parameters, "
            f"{flops_per_token(model).train / 1e9:.3g} GFLOPs per token"
            + (f", weights of {run.imported.folder}" if run.imported else "")
        ),
    )
    data, *more = run.data.describe(train.steps * plan.samples)
    yield "data", data.removeprefix("data").lstrip(": ")
    yield from (("", line) for line in more)
    yield (
        "batch",
        (
            f"{run.data.train.num_inputs(0, plan.samples):,} tokens per step: micro batch {plan.micro} x accumulation "
            f"{plan.accumulation} x {plan.data_size} data-parallel ranks x {model.seq_length:,} tokens"
        ),
    )
    yield (
        "schedule",
        (
            f"{train.steps:,} steps, {ours.schedule.type} after {ours.schedule.warmup_steps:,} steps of warmup; {ds.optimizer.type}, "
            f"learning rate {ds.optimizer.params.lr:g}, "
            + (f"clip {clip:g}" if (clip := ds.gradient_clipping) else "no clipping")
        ),
    )
    sizes = {"data": plan.data_size, **{name: getattr(parallel, name) for name in ("tensor", "sequence", "pipeline")}}
    yield (
        "parallel",
        (
            f"{', '.join(f'{name} {size}' for name, size in sizes.items())}; ZeRO stage {ds.zero_optimization.stage}"
            + ("; activations divided along the sequence" if parallel.tensor_sequence else "")
        ),
    )
    cpu = f"no GPU found: {rank.world_size} CPU rank(s) x {torch.get_num_threads()} thread(s)"
    yield "device", cpu if device.type == "cpu" else f"{rank.world_size} x {torch.cuda.get_device_name(device)}"
    if peak:
        yield "", f"MFU is of {peak.flops / 1e12:.4g} TFLOP/s: {peak.source}"
    yield "precision", ds.dtype
    yield "checkpoints", f"{run.run_dir}, every {train.save_interval:,} steps"
    if run.resume_from:
        yield "", f"resuming {run.resume_from} at step {run.state.step}" + (f": {run.moved}" if run.moved else "")
    yield from (("note", text) for text in notes(run, device, peak))


def notes(run: Prepared, device: torch.device, peak: Peak | None) -> Iterator[str]:
    """Where the run differs from what was asked for, or probably from what was meant."""
    ours, plan = run.config.megatronish, run.plan
    flops = run.data.train.num_inputs(0, plan.samples) * flops_per_token(ours.model).train
    seconds = flops / (peak.flops * CPU_EFFICIENCY) if peak and device.type == "cpu" else 0.0
    if seconds > SLOW_STEP_SECONDS:
        yield f"a step may take about {clock(seconds)}. Try --model.preset tiny."
    asked = run.config.batch_plan(plan.data_size)
    if asked != plan:
        yield (
            f"micro batch {asked.micro} -> {plan.micro}, accumulation {asked.accumulation} -> {plan.accumulation} "
            "to fit this machine's memory: the same samples and the same mean loss per step"
        )
    if ours.schedule.warmup_steps >= ours.train.steps:
        yield "schedule.warmup_steps covers the entire run: the learning rate stays below its peak"
    before = run.state.samples / run.state.step if run.state.step else plan.samples
    if before != plan.samples:
        yield (
            f"a step had {before:g} samples so far and has {plan.samples} from now on; give --train_batch_size {before:.0f} "
            "to keep the former size"
        )
