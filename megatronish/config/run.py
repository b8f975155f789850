"""RunConfig: one file describes a run; everything that must agree across sections is checked here."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import Field, ValidationError

from megatronish.config.base import Frozen, explain, merge
from megatronish.config.data import DataConfig
from megatronish.config.deepspeed_json import DeepSpeedConfig, load_json
from megatronish.config.model import KernelConfig, ModelConfig
from megatronish.config.parallel import ParallelConfig
from megatronish.config.presets import resolve_model
from megatronish.config.training import LogConfig, ScheduleConfig, TrainConfig
from megatronish.errors import ConfigError

BLOCK = "megatronish"


class MegatronishConfig(Frozen):
    """The "megatronish" block of a ds_configs file."""

    model: ModelConfig = Field(..., description="the transformer: a preset, fields, or a preset with fields changed")
    kernels: KernelConfig = Field(KernelConfig(), description="which implementation each operator uses")
    parallel: ParallelConfig = Field(ParallelConfig(), description="tensor, pipeline and sequence parallel sizes")
    data: DataConfig = Field(DataConfig(), description="the dataset")
    schedule: ScheduleConfig = Field(ScheduleConfig(), description="learning rate schedule")
    train: TrainConfig = Field(..., description="run length, checkpoints, validation")
    log: LogConfig = Field(LogConfig(), description="where metrics go")


@dataclass(frozen=True)
class BatchPlan:
    """Samples of one optimizer step: global = micro * accumulation * data_size."""

    micro: int
    accumulation: int
    data_size: int

    @property
    def samples(self) -> int:
        """Samples per optimizer step over all ranks."""
        return self.micro * self.accumulation * self.data_size


@dataclass(frozen=True)
class RunConfig:
    """A full run description: DeepSpeed's keys and ours, checked."""

    deepspeed: DeepSpeedConfig
    megatronish: MegatronishConfig
    source: str

    def __post_init__(self) -> None:
        ours, stage = self.megatronish, self.deepspeed.zero_optimization.stage
        parallel = ours.parallel
        if parallel.pipeline > 1 and stage >= 2:
            raise ConfigError(
                f"{self.source}: parallel.pipeline is {parallel.pipeline} with zero_optimization.stage {stage}: "
                "the pipeline engine allows ZeRO <= 1. Add --zero_optimization.stage 1, or --parallel.pipeline 1."
            )
        if parallel.sequence > 1:
            self._check_sequence_parallel()
        if parallel.pipeline > 1:
            self._check_pipeline()
        try:
            parallel.check_divides(ours.model)
        except ConfigError as error:
            raise ConfigError(f"{self.source}: {error}") from None
        if not ours.data.pack and (parallel.pipeline > 1 or parallel.sequence > 1 or parallel.tensor_sequence):
            raise ConfigError(
                f"{self.source}: data.pack false gives micro batches of different lengths, which pipeline stages and ranks "
                "that divide a sequence do not take in this version. Set data.pack to true, or use parallel.tensor or ZeRO "
                "alone."
            )
        if parallel.tensor > 1:
            self._check_tensor_parallel()
        elif parallel.tensor_sequence:
            raise ConfigError(
                f"{self.source}: parallel.tensor_sequence divides the sequence over tensor-parallel ranks, and "
                "parallel.tensor is 1. Raise --parallel.tensor, or leave tensor_sequence out."
            )

    def _check_tensor_parallel(self) -> None:
        """Refuse what cannot be done with divided matrices, or would silently be done wrongly."""
        ds, ours, tensor = self.deepspeed, self.megatronish, self.megatronish.parallel.tensor
        stage, where = ds.zero_optimization.stage, f"{self.source}: parallel.tensor {tensor} with"
        if stage == 3:
            raise ConfigError(f"{where} zero_optimization.stage 3: use --zero_optimization.stage 2, or tensor 1.")
        if stage == 0 and ds.dtype != "fp32":
            raise ConfigError(
                f"{where} {ds.dtype} and zero_optimization.stage 0: DeepSpeed would clip by a wrong gradient norm. "
                "Use --zero_optimization.stage 1."
            )
        if ds.dtype == "fp16":
            raise ConfigError(f"{where} fp16 is not part of this version: use bf16, or tensor 1.")
        if ds.zero_optimization.offloads_optimizer:
            raise ConfigError(f"{where} offload_optimizer is not part of this version: remove the section.")
        if ds.optimizer.type == "Muon":
            raise ConfigError(f"{where} Muon, which needs full matrices: use AdamW or Lion, or tensor 1.")
        if ours.train.compile:
            raise ConfigError(f"{where} train.compile is not part of this version: leave one of them out.")

    def _check_sequence_parallel(self) -> None:
        """Refuse combinations that are not implemented."""
        ours, ranks = self.megatronish, self.megatronish.parallel.sequence
        where = f"{self.source}: parallel.sequence {ranks} with"
        if ours.parallel.tensor > 1 or ours.parallel.pipeline > 1:
            raise ConfigError(
                f"{where} tensor {ours.parallel.tensor} and pipeline {ours.parallel.pipeline} is not part of this "
                "version: set sequence, or both others, to 1."
            )
        if ours.train.compile:
            raise ConfigError(f"{where} train.compile is not part of this version: leave one of them out.")
        if self.deepspeed.optimizer.type == "Muon":
            raise ConfigError(f"{where} Muon is not part of this version: use AdamW or Lion, or sequence 1.")

    def _check_pipeline(self) -> None:
        """Refuse what DeepSpeed's pipeline engine cannot do, or would silently do wrongly."""
        ds, stages = self.deepspeed, self.megatronish.parallel.pipeline
        where = f"{self.source}: parallel.pipeline {stages} with"
        if ds.zero_optimization.stage == 0:
            raise ConfigError(
                f"{where} zero_optimization.stage 0: DeepSpeed would clip by the gradient norm of one stage. "
                "Use --zero_optimization.stage 1."
            )
        if ds.zero_optimization.offloads_optimizer:
            raise ConfigError(f"{where} offload_optimizer is not part of this version: remove the section.")
        if ds.dtype == "fp16":
            raise ConfigError(f"{where} fp16 is not part of this version: use bf16, or pipeline 1.")
        if ds.optimizer.type == "Muon":
            raise ConfigError(f"{where} Muon is not part of this version: use AdamW or Lion, or pipeline 1.")

    def batch_plan(self, data_size: int) -> BatchPlan:
        """Fill in the batch arithmetic for `data_size` data-parallel ranks.

        Raises ConfigError with the equation and two fixes when train_batch_size != micro * accumulation * dp.
        """
        ds = self.deepspeed
        total, micro, steps = ds.train_batch_size, ds.train_micro_batch_size_per_gpu, ds.gradient_accumulation_steps
        if total is None:
            assert micro is not None  # DeepSpeedConfig refuses a run with neither
            return BatchPlan(micro, steps or 1, data_size)
        if micro is None:
            micro, rest = divmod(total, (steps or 1) * data_size)
            equation = f"{total} / (gradient_accumulation_steps {steps or 1} * dp {data_size})"
        elif steps is None:
            steps, rest = divmod(total, micro * data_size)
            equation = f"{total} / (train_micro_batch_size_per_gpu {micro} * dp {data_size})"
        else:
            rest = total - micro * steps * data_size
            equation = f"{micro} * {steps} * dp {data_size} = {micro * steps * data_size}"
        plan = BatchPlan(micro, steps or 1, data_size)
        if rest or not plan.samples:
            micro = max(micro, 1)
            near = max(1, round(total / (micro * data_size)))
            also = "" if ds.train_micro_batch_size_per_gpu else f"train_micro_batch_size_per_gpu to {micro} and "
            raise ConfigError(
                f"{self.source}: train_batch_size {total} != train_micro_batch_size_per_gpu * "
                f"gradient_accumulation_steps * data-parallel ranks ({equation}). Either set train_batch_size to "
                f"{micro * (steps or near) * data_size}, or remove it and set {also}"
                f"gradient_accumulation_steps to {near}."
            )
        return plan

    def to_json(self) -> dict[str, Any]:
        """The resolved run as one ds_configs object that reproduces it."""
        ours = self.megatronish.model_dump(mode="json")
        return {**self.deepspeed.model_dump(mode="json", by_alias=True, exclude_none=True), BLOCK: ours}

    @classmethod
    def from_dict(cls, raw: dict[str, Any], source: str) -> RunConfig:
        """Check a full ds_configs object. Raises ConfigError; `source` names where it came from."""
        raw = {key: value for key, value in raw.items() if key != "$schema"}
        if BLOCK not in raw:
            raise ConfigError(
                f'{source}: no "{BLOCK}" block. Add "{BLOCK}": {{"model": {{"preset": "tiny"}}, '
                '"train": {"steps": 100, "save_dir": "runs/x"}}.'
            )
        ours = raw.pop(BLOCK)
        if misplaced := [key for key in raw if key in MegatronishConfig.model_fields]:
            raise ConfigError(f'{source}: "{misplaced[0]}" is next to "{BLOCK}"; move it inside that block.')
        try:
            engine = DeepSpeedConfig.model_validate(raw)
        except ValidationError as error:
            raise explain(error, DeepSpeedConfig, source) from None
        if not isinstance(ours, dict):
            raise ConfigError(f'{source}: "{BLOCK}" is {ours!r}, expected an object.')
        if isinstance(ours.get("model"), dict):
            try:
                ours = {**ours, "model": resolve_model(ours["model"])}
            except ValidationError as error:
                raise explain(error, ModelConfig, source, f"{BLOCK}.model") from None
            except ValueError as error:
                raise ConfigError(f"{source}: {BLOCK}.model: {error}") from None
        try:
            block = MegatronishConfig.model_validate(ours)
        except ValidationError as error:
            raise explain(error, MegatronishConfig, source, BLOCK) from None
        return cls(engine, block, source)

    @classmethod
    def load(cls, path: str | Path, overrides: dict[str, Any] | None = None) -> RunConfig:
        """Read a ds_configs file and apply `overrides` (a nested dict of the same shape).

        A preset, or a Hugging Face folder, among the overrides replaces the entire model of the file, whose fields
        belong to another shape.
        """
        raw = load_json(path)
        source = str(path)
        model = (overrides or {}).get(BLOCK, {}).get("model")
        if isinstance(model, dict) and ("preset" in model or "from_hf" in model) and isinstance(raw.get(BLOCK), dict):
            raw[BLOCK].pop("model", None)
        if overrides:
            source += " with the command line's overrides"
        return cls.from_dict(merge(raw, overrides or {}), source)

    def save(self, path: Path) -> None:
        """Write the resolved run, ready to be given to --deepspeed_config again."""
        path.write_text(json.dumps(self.to_json(), indent=2) + "\n", encoding="utf-8")
