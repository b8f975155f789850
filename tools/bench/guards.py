"""Measure the cost of the guards in a training step: `torchrun --nproc-per-node 2 tools/bench/guards.py [--seconds 60]`, or plain python for one rank.

Steps without and with guards alternate in one run (off, on, on, off), so that other load slows both equally. On: what the
training loop does for non-finite steps, stops and hangs: NaN propagated into the gradients, the check of the gradient norm, the
all-reduce of loss and stop flags, the spike score, the record of the last batches, the watchdog's thread (with one rank). Off:
the same steps without them. Printed are CPU time and elapsed time per step, the ratio of neighbouring steps, and the time of
each part by itself.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # run from a checkout that is not installed

from megatronish.launch.exit import run_program
from megatronish.launch.process import initialize_process

TURN_STEPS = 1
MODELS = {  # steps of tenths of a second and of seconds on two cores
    "small": {"hidden_size": 256, "num_layers": 4, "num_attention_heads": 4, "ffn_hidden_size": 704, "seq_length": 256},
    "large": {
        "hidden_size": 512,
        "num_layers": 8,
        "num_attention_heads": 8,
        "ffn_hidden_size": 1408,
        "seq_length": 512,
    },
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=60.0, help="duration of the measurement (60)")
    parser.add_argument("--model", choices=MODELS, default="small", help="size of the model (small)")
    parser.add_argument("--stage", type=int, choices=range(4), default=2, help="ZeRO stage (2)")
    parser.add_argument("--micro", type=int, default=4, help="micro batch (4)")
    parser.add_argument("--local_rank", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    rank = initialize_process()
    bench = Bench(arguments.model, arguments.stage, arguments.micro)
    lines = bench.run(arguments.seconds)
    if rank.is_first:
        print("\n".join(lines))
    bench.close()
    return 0


def run_config(model: str, stage: int, micro: int, folder: str) -> Any:
    """A bf16 run of the model; its data are not read."""
    from megatronish.config.run import RunConfig

    raw = {
        "train_micro_batch_size_per_gpu": micro,
        "gradient_clipping": 1.0,
        "bf16": {"enabled": True},
        "zero_optimization": {"stage": stage, "reduce_bucket_size": 5e7, "allgather_bucket_size": 5e7},
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-4}},
        "megatronish": {"model": {"vocab_size": 4096, **MODELS[model]}, "train": {"steps": 10**6, "save_dir": folder}},
    }
    return RunConfig.from_dict(raw, "bench_guards")


class Bench:
    """One rank, which trains the same steps with and without guards."""

    def __init__(self, model: str, stage: int, micro: int) -> None:
        import torch
        import torch.distributed as dist

        from megatronish.launch.rendezvous import join_rendezvous_from_env
        from megatronish.parallel.mesh import build_mesh
        from megatronish.training import engine as engine_module
        from megatronish.training.setup.construction import build_model
        from megatronish.training.step_agreement import StepAgreement
        from megatronish.training.stopping import StopRequests

        self._scratch = tempfile.TemporaryDirectory()
        config = run_config(model, stage, micro, self._scratch.name)
        self.rendezvous = join_rendezvous_from_env(600.0, {})
        engine_module.start_process_group(rendezvous=self.rendezvous)
        mesh = build_mesh(config.megatronish.parallel, engine_module.device().type)
        plan = config.batch_plan(mesh.data.size)
        self.engine = engine_module.start_engine(build_model(config, plan, mesh), config, plan, mesh)
        self.described = f"{model} model, {sum(p.numel() for p in self.engine.module.parameters()):,} parameters held, "
        self.described += (
            f"bf16, ZeRO-{stage}, {dist.get_world_size()} rank(s), {micro} x {MODELS[model]['seq_length']} tokens"
        )
        tokens = torch.randint(4096, (micro, MODELS[model]["seq_length"]), device=self.engine.device)
        self.batches = [{"tokens": tokens, "labels": tokens}]
        self.agreement, self.stops = StepAgreement(self.engine.device, 1), StopRequests(3600.0)
        self.losses = [5.0 + 0.01 * (n % 7) for n in range(128)]
        self.step = 0
        self._module, self._carry = engine_module, engine_module.nan_unless_finite
        self._optimizer: Any = self.engine._engine.optimizer

    def bare(self) -> None:
        """Train one step without guards."""
        self.engine.train_step(self.batches, 1.0)
        self.step += 1

    def guarded(self) -> None:
        """Train one step as the training loop does."""
        from megatronish.training.monitoring.black_box import TrainedStep
        from megatronish.training.monitoring.spikes import spike_score

        result = self.engine.train_step(self.batches, 1.0)
        self.step += 1
        self.agreement.exchange(self.step, result.loss_sum, result.tokens, self.stops.reason)
        self.last = TrainedStep(self.step, self.batches, result.loss_sum, result.grad_norm, self.step)
        for record in self.agreement.completed(wait_for_all=False):
            spike_score(self.losses, record.loss)
            self.losses = [*self.losses, record.loss][-128:]

    def switch(self, on: bool) -> None:
        """Switch the propagation of NaN and the check of gradient norms."""
        self._module.nan_unless_finite = self._carry if on else _nothing  # type: ignore[assignment]
        if hasattr(self._optimizer, "check_grad_overflow"):
            self._optimizer.check_grad_overflow = on

    def run(self, seconds: float) -> list[str]:
        """Time the steps; returns the lines to print. Rank 0 decides on the number of steps."""
        for on in (False, True):
            self.turn(on)
        wall, _ = self.turn(False)
        pairs = self.from_rank_zero(max(4, round(seconds / (2 * TURN_STEPS * wall))))
        times: dict[bool, list[tuple[float, float]]] = {True: [], False: []}
        for turn in range(2 * pairs):
            on = turn % 4 in (1, 2)
            times[on].append(self.turn(on))
        lines = [self.described]
        for name, place in (("elapsed time", 0), ("CPU time", 1)):
            ratios = [on[place] / off[place] for on, off in zip(times[True], times[False], strict=True)]
            low, middle, high = statistics.quantiles(ratios, n=4)
            without, with_ = (statistics.median(each[place] for each in times[key]) * 1e3 for key in (False, True))
            lines.append(
                f"  {name} per step: {without:.2f} ms without guards, {with_:.2f} ms with; ratio of {pairs} neighboring steps: median "
                f"{middle:.4f}, middle half {low:.4f} to {high:.4f}"
            )
        return lines + self.parts(statistics.median(each[0] for each in times[False]))

    def turn(self, on: bool) -> tuple[float, float]:
        """Train a turn; returns elapsed time and CPU time per step in seconds."""
        from megatronish.launch.watchdog import Watchdog

        self.switch(on)
        watchdog = Watchdog(self.rendezvous, 300.0, Path(self._scratch.name), True) if on and self._alone else None
        wall, cpu = time.perf_counter(), time.process_time()
        for _ in range(TURN_STEPS):
            (self.guarded if on else self.bare)()
        found = (time.perf_counter() - wall) / TURN_STEPS, (time.process_time() - cpu) / TURN_STEPS
        if watchdog:
            watchdog.close()
        return found

    def parts(self, step_seconds: float) -> list[str]:
        """Time each part by itself, including the wait for other ranks."""
        import torch

        loss, tokens = torch.tensor(5.0, device=self.engine.device), torch.tensor(100.0, device=self.engine.device)

        def exchange() -> None:
            self.agreement.exchange(1, loss, tokens, self.stops.reason)
            self.agreement.completed(wait_for_all=False)

        from megatronish.training.monitoring.spikes import spike_score

        parts: dict[str, Callable[[], object]] = {
            "all-reduce of loss and stop flags": exchange,
            "spike score over 128 losses": lambda: spike_score(self.losses, 5.0),
            "NaN propagated into the gradients, per micro batch": lambda: self._carry(loss) + tokens,
        }
        lines = []
        for name, part in parts.items():
            each = []
            for _ in range(200):
                start = time.perf_counter()
                part()
                each.append(time.perf_counter() - start)
            typical = statistics.median(each)
            lines.append(f"  {name}: {typical * 1e6:.0f} us, {typical / step_seconds:.3%} of a step")
        return lines

    @property
    def _alone(self) -> bool:
        return self.rendezvous.world_size == 1  # with more, joining the rendezvous in each turn would be timed, too

    def from_rank_zero(self, number: int) -> int:
        """The number of rank 0, on all ranks."""
        import torch.distributed as dist

        numbers = [number]
        dist.broadcast_object_list(numbers, src=0)
        return numbers[0]

    def close(self) -> None:
        """Leave the process group."""
        self._module.stop_process_group()
        self._scratch.cleanup()


def _nothing(loss: Any) -> float:
    return 0.0


if __name__ == "__main__":
    sys.exit(run_program(main))
