"""Metrics of a run: progress bar or plain lines, metrics.jsonl, TensorBoard, Weights & Biases, GPU and host metrics."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any, Protocol, TextIO

import psutil
import torch
from tqdm import tqdm

from megatronish.config.run import RunConfig
from megatronish.errors import ConfigError
from megatronish.files import write_atomic
from megatronish.training.monitoring.mfu import Peak

METRICS_FILE = "metrics.jsonl"


class Sink(Protocol):
    """A destination of metrics."""

    def write(self, step: int, metrics: dict[str, Any]) -> None:
        """Record the metrics of a step."""

    def close(self) -> None:
        """Flush and release it."""


class JsonLines:
    """metrics.jsonl: one object per line, flushed at once. A resumed run first drops lines past the resumed step."""

    def __init__(self, path: Path, resumed_step: int) -> None:
        if path.exists():
            kept = [line for line in path.read_text().splitlines() if _step_of(line) <= resumed_step]
            write_atomic(path, "".join(line + "\n" for line in kept))
        self._file = path.open("a", encoding="utf-8")

    def write(self, step: int, metrics: dict[str, Any]) -> None:
        self._file.write(json.dumps({"step": step, **metrics}) + "\n")
        self._file.flush()

    def close(self) -> None:
        self._file.close()


def _step_of(line: str) -> float:
    """The step of a metrics line; a line cut short by a crash counts as past every step."""
    try:
        return json.loads(line)["step"]
    except (json.JSONDecodeError, KeyError, TypeError):
        return float("inf")


class TensorBoard:
    """TensorBoard events under save_dir/tensorboard."""

    def __init__(self, folder: Path, resumed_step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(folder), purge_step=resumed_step + 1)

    def write(self, step: int, metrics: dict[str, Any]) -> None:
        for name, value in metrics.items():
            if isinstance(value, (int, float)):
                self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        self._writer.close()


class WandB:
    """Weights & Biases, online or offline, one run per save_dir (its id is kept there for resuming)."""

    def __init__(self, config: RunConfig, run_dir: Path) -> None:
        try:
            import wandb
        except ImportError:
            raise ConfigError(
                f"log.wandb is {config.megatronish.log.wandb!r} and wandb is not installed: pip install wandb, "
                "or --log.wandb off."
            ) from None
        log, id_file = config.megatronish.log, run_dir / "wandb_id"
        known = (id_file.read_text().strip() if id_file.exists() else "") or None
        self._run = wandb.init(
            project=log.wandb_project,
            mode="offline" if log.wandb == "offline" else "online",
            dir=str(run_dir),
            name=run_dir.name,
            id=known,
            resume="allow",
            config=config.to_json(),
        )
        id_file.write_text(self._run.id)

    def write(self, step: int, metrics: dict[str, Any]) -> None:
        self._run.log(metrics, step=step)

    def close(self) -> None:
        self._run.finish()


def open_sinks(config: RunConfig, run_dir: Path, resumed_step: int) -> list[Sink]:
    """The sinks that the configuration asks for."""
    sinks: list[Sink] = [JsonLines(run_dir / METRICS_FILE, resumed_step)]
    if config.megatronish.log.tensorboard:
        sinks.append(TensorBoard(run_dir / "tensorboard", resumed_step))
    if config.megatronish.log.wandb != "off":
        sinks.append(WandB(config, run_dir))
    return sinks


class DeviceMetrics:
    """Memory and utilization of this rank's device and host. torch reads a GPU's sensors from NVML (package nvidia-ml-py)."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._process = psutil.Process()
        psutil.cpu_percent()  # the first call only starts the clock

    def started(self) -> float:
        """When this process started, in seconds since the epoch."""
        return self._process.create_time()

    def memory_gib(self) -> float:
        """GPU: peak allocated by torch; CPU: resident memory of this process."""
        if self._device.type == "cuda":
            return torch.cuda.max_memory_allocated(self._device) / 2**30
        return self._process.memory_info().rss / 2**30

    def read(self) -> dict[str, float]:
        """Host CPU %, resident GiB and, on a GPU, its utilization %, used GiB, watts and degrees C."""
        found = {"host/cpu_percent": psutil.cpu_percent(), "host/rss_gib": self._process.memory_info().rss / 2**30}
        if self._device.type == "cuda":
            found["gpu/utilisation_percent"] = torch.cuda.utilization(self._device)
            found["gpu/used_gib"] = torch.cuda.device_memory_used(self._device) / 2**30
            found["gpu/watts"] = torch.cuda.power_draw(self._device) / 1000
            found["gpu/celsius"] = torch.cuda.temperature(self._device)
        return found


class Monitor:
    """Turns finished steps into rates and reports them to the sinks and the user. Lives on the first rank only.

    flops_per_token: training FLOPs of one token; peak: what MFU is a share of, or None; out: a progress bar where it is a
    terminal, else plain lines.
    """

    def __init__(
        self,
        config: RunConfig,
        run_dir: Path,
        start_step: int,
        flops_per_token: float,
        peak: Peak | None,
        device: torch.device,
        out: TextIO | None = None,
    ) -> None:
        self._total, self._config, self._run_dir = config.megatronish.train.steps, config, run_dir
        self._flops_per_token, self._peak = flops_per_token, peak
        self._sinks = open_sinks(config, run_dir, start_step)
        self._devices = DeviceMetrics(device)
        self._out = out or sys.stdout
        self._bar = tqdm(
            total=self._total,
            initial=start_step,
            file=self._out,
            disable=not self._out.isatty(),
            dynamic_ncols=True,
            bar_format="{percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt}{postfix}",
        )
        self._started = False
        self._last_time, self._last_step = time.perf_counter(), start_step
        self._training_seconds, self._done = 0.0, 0

    def message(self, text: str) -> None:
        """Print a line, above the progress bar. Also called by the thread that writes checkpoints."""
        tqdm.write(text, file=self._out)
        self._out.flush()

    def advance(self, step: int) -> None:
        """Move the progress bar to `step` steps done; report how long after the start of the process the first one was."""
        if not self._started:
            self.message(f"first step done {time.time() - self._devices.started():.1f} s after this process started")
            self._started = True
        self._bar.update(step - self._bar.n)

    def step(self, step: int, loss: float, rate: float, grad_norm: float | None, tokens: int, new_tokens: int) -> None:
        """Report `step` steps done; loss: mean of the tokens since the last report; new_tokens: their number."""
        now = time.perf_counter()
        seconds, steps = max(now - self._last_time, 1e-9), step - self._last_step
        self._last_time, self._last_step = now, step
        self._training_seconds += seconds
        self._done += steps
        speed = new_tokens / seconds
        metrics: dict[str, Any] = {
            "loss": loss,
            "lr": rate,
            "grad_norm": grad_norm,
            "tokens": tokens,
            "tokens_per_second": speed,
            "step_seconds": seconds / steps,
            "memory_gib": self._devices.memory_gib(),
        }
        if self._peak:
            metrics["mfu"] = speed * self._flops_per_token / self._peak.flops
        self._emit(step, {**metrics, **self._devices.read()})
        self._show(step, metrics, (self._total - step) * self._training_seconds / self._done)

    def validation(self, step: int, loss: float, tokens: int, seconds: float, is_best: bool) -> None:
        """Report a validation: mean loss in nats per token over `tokens` held-out tokens."""
        self._emit(step, {"validation_loss": loss, "validation_tokens": tokens, "validation_seconds": seconds})
        self.message(
            f"validation at step {step}: loss {loss:.4f} over {tokens:,} tokens{', best so far' if is_best else ''}"
        )

    def rewind(self, step: int) -> None:
        """The run is back at `step` steps done: drop the metrics of later ones (Weights & Biases keeps them)."""
        for sink in self._sinks:
            sink.close()
        self._sinks = open_sinks(self._config, self._run_dir, step)
        self._last_time, self._last_step = time.perf_counter(), step
        self.advance(step)

    def pause_ends(self, seconds: float) -> None:
        """The last `seconds` were not training (validation, saving): leave them out of rates and ETA."""
        self._last_time += seconds

    def close(self) -> None:
        """End the progress bar and close every sink."""
        self._bar.close()
        for sink in self._sinks:
            sink.close()

    def _emit(self, step: int, metrics: dict[str, Any]) -> None:
        for sink in self._sinks:
            sink.write(step, metrics)

    def _show(self, step: int, metrics: dict[str, Any], eta: float) -> None:
        loss = f"loss {metrics['loss']:.4f}"
        speed = [
            f"{metrics['tokens_per_second']:,.0f} tokens/s",
            *([f"MFU {metrics['mfu']:.1%}"] if self._peak else []),
            f"{metrics['memory_gib']:.2f} GiB",
            f"ETA {clock(eta)}",
        ]
        if not self._bar.disable:
            self._bar.set_postfix_str(" | ".join([loss, *speed]))
            return
        norm = [f"grad norm {metrics['grad_norm']:.3f}"] if metrics["grad_norm"] is not None else []
        self.message(" | ".join([f"step {step}/{self._total}", loss, f"lr {metrics['lr']:.2e}", *norm, *speed]))


def clock(seconds: float) -> str:
    """1:02:03 or 2:03."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
