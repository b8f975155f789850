"""What the first rank says before a run's first step."""

from __future__ import annotations

import json

import torch

from megatronish.checkpoint.paths import RUN_FILE
from megatronish.config.parallel import ParallelConfig
from megatronish.launch.process import Rank
from megatronish.model.accounting import flops_per_token, parameter_counts
from megatronish.training.monitoring.metrics import clock
from megatronish.training.monitoring.mfu import Peak
from megatronish.training.setup.preparation import Prepared

CPU_EFFICIENCY = 0.4  # of the measured matmul rate, for the first guess of a step's time
SLOW_STEP_SECONDS = 60.0


def announce(run: Prepared, rank: Rank, device: torch.device, peak: Peak | None) -> None:
    """Say once what is about to be trained, on what, and write the resolved configuration."""
    config, plan = run.config, run.plan
    ours, tokens = config.megatronish, run.data.train.num_inputs(0, plan.samples)
    counts, flops = parameter_counts(ours.model), flops_per_token(ours.model).train
    if device.type == "cpu":
        step_seconds = tokens * flops / (peak.flops * CPU_EFFICIENCY) if peak else 0.0
        slow = f"; a step may take about {clock(step_seconds)}" if step_seconds > SLOW_STEP_SECONDS else ""
        print(
            f"No GPU here: training on CPU, {rank.world_size} rank(s) x {torch.get_num_threads()} thread(s){slow}."
            + (" Try --model.preset tiny." if slow else "")
        )
    asked = config.batch_plan(plan.data_size)
    if asked != plan:
        print(
            f"Micro batch {asked.micro} -> {plan.micro}, accumulation {asked.accumulation} -> {plan.accumulation} "
            "to fit this machine's memory: the same samples and the same mean loss a step."
        )
    print(json.dumps(config.to_json(), indent=None, separators=(", ", ": ")))
    config.save(run.run_dir / RUN_FILE)
    stage, kind = config.deepspeed.zero_optimization.stage, config.deepspeed.dtype
    print(
        f"model {ours.model.preset or 'custom'}: {counts.total:,} parameters, {flops / 1e9:.3g} GFLOP a token; "
        f"{kind}, ZeRO-{stage}, {config.deepspeed.optimizer.type}; {tokens:,} tokens a step "
        f"({plan.micro} micro x {plan.accumulation} accumulation x {plan.data_size} ranks x {ours.model.seq_length})"
        + describe(ours.parallel)
    )
    print("\n".join(run.data.describe(ours.train.steps * plan.samples)))
    if ours.schedule.warmup_steps >= ours.train.steps:
        print(f"note: schedule.warmup_steps {ours.schedule.warmup_steps} lasts the whole run: lr stays below its peak")
    if peak:
        print(f"MFU is of {peak.flops / 1e12:.4g} TFLOP/s: {peak.source}")
    if run.imported:
        print(f"beginning with the weights of {run.imported.folder}")
    if run.resume_from:
        print(f"continuing {run.resume_from} at step {run.state.step}" + (f": {run.moved}" if run.moved else ""))
        before = run.state.samples / run.state.step
        if before != plan.samples:
            print(
                f"note: a step was {before:g} samples so far and is {plan.samples} from here on; give --train_batch_size "
                f"{before:.0f} to go on as before"
            )


def describe(parallel: ParallelConfig) -> str:
    """How a sample is divided over ranks, for the announcement; '' when it is not."""
    told = f"; every matrix over {parallel.tensor} tensor-parallel ranks" if parallel.tensor > 1 else ""
    told += ", the sequence too" if parallel.tensor_sequence else ""
    told += f"; every sequence over {parallel.sequence} ranks" if parallel.sequence > 1 else ""
    return told + (f"; layers over {parallel.pipeline} pipeline stages" if parallel.pipeline > 1 else "")
