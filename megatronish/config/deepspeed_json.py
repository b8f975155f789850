"""DeepSpeed's own keys, typed, and the strict reading of a ds_configs file.

DeepSpeed ignores top-level keys it does not know and fills missing ones with defaults that change the result
(`gradient_clipping` becomes 1.0). Here every key is known by name and type, or the file is refused.
Source of names and types: deepspeed 0.19.8 `runtime/config.py`, `runtime/zero/config.py`; a test compares them.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from megatronish.config.base import Frozen
from megatronish.errors import ConfigError

OURS = {  # DeepSpeed keys that are set elsewhere in the run description
    "scheduler": 'the schedule lives in "megatronish": {"schedule": {"type": "cosine", ...}}',
    "tensorboard": 'write "megatronish": {"log": {"tensorboard": true}}',
    "wandb": 'write "megatronish": {"log": {"wandb": "online"}}',
    "csv_monitor": "metrics.jsonl is always written",
    "tensor_parallel": 'write "megatronish": {"parallel": {"tensor": N}}',
    "sequence_parallel_size": 'write "megatronish": {"parallel": {"sequence": N}}',
    "activation_checkpointing": 'write "megatronish": {"train": {"activation_checkpointing": "full"}}',
    "compile": 'write "megatronish": {"train": {"compile": true}}',
}


class Bf16Config(Frozen):
    """bfloat16 weights and gradients; ZeRO keeps the fp32 master copy."""

    enabled: bool = Field(False, description="train in bfloat16")
    immediate_grad_update: bool | None = Field(None, description="accumulate fp32 gradients as they are made (ZeRO 0)")
    check_grad_overflow: bool | None = Field(None, description="check bf16 gradients for inf and nan")


class Fp16Config(Frozen):
    """float16 with loss scaling."""

    enabled: bool = Field(False, description="train in float16")
    loss_scale: float = Field(0, ge=0, description="fixed loss scale; 0 = dynamic")
    initial_scale_power: int = Field(16, ge=0, le=32, description="the dynamic scale starts at 2 to this power")
    loss_scale_window: int = Field(1000, ge=1, description="good steps before the scale doubles")
    hysteresis: int = Field(2, ge=1, description="overflows before the scale halves")
    consecutive_hysteresis: bool = Field(False, description="refill the hysteresis after every good step")
    min_loss_scale: float = Field(1, gt=0, description="the scale never falls below this")


class OffloadOptimizer(Frozen):
    """Optimizer states and their update outside the GPU."""

    device: Literal["none", "cpu", "nvme"] = Field(..., description="where optimizer states are stored")
    pin_memory: bool = Field(True, description="page-locked host memory: faster copies, not swappable")
    nvme_path: str | None = Field(None, description="folder on the NVMe disk, for device nvme")
    buffer_count: int = Field(4, ge=1, description="NVMe buffers")
    fast_init: bool = Field(False, description="fast NVMe initialisation")
    ratio: float = Field(1.0, ge=0, le=1, description="share of the update done on the CPU (ZeRO-3)")


class OffloadParam(Frozen):
    """Parameters outside the GPU (ZeRO-3)."""

    device: Literal["none", "cpu", "nvme"] = Field(..., description="where parameters live")
    pin_memory: bool = Field(True, description="page-locked host memory")
    nvme_path: str | None = Field(None, description="folder on the NVMe disk, for device nvme")
    buffer_count: int = Field(5, ge=1, description="NVMe buffers")
    buffer_size: int = Field(100_000_000, ge=1, description="elements of an NVMe buffer")
    max_in_cpu: int = Field(1_000_000_000, ge=0, description="elements kept in host memory with NVMe offload")


class ZeroConfig(Frozen):
    """The ZeRO optimizer: what is partitioned over the data-parallel ranks, and in what pieces."""

    stage: int = Field(
        ..., ge=0, le=3, description="0 nothing, 1 optimizer states, 2 also gradients, 3 also parameters"
    )
    overlap_comm: bool | None = Field(None, description="reduce gradients while backward still runs")
    contiguous_gradients: bool = Field(True, description="copy gradients into one buffer as they are made")
    reduce_scatter: bool = Field(True, description="reduce-scatter gradients instead of all-reduce")
    reduce_bucket_size: int = Field(500_000_000, ge=1, description="elements reduced at a time")
    allgather_partitions: bool = Field(True, description="collect updated parameters by all-gather, not broadcast")
    allgather_bucket_size: int = Field(500_000_000, ge=1, description="elements gathered at a time")
    use_multi_rank_bucket_allreduce: bool = Field(True, description="one bucket may hold gradients of several ranks")
    round_robin_gradients: bool = Field(False, description="spread gradient copies over ranks (ZeRO-2 offload)")
    sub_group_size: int = Field(1_000_000_000, ge=1, description="elements updated at a time (ZeRO-3)")
    prefetch_bucket_size: int = Field(
        50_000_000, ge=0, alias="stage3_prefetch_bucket_size", description="elements fetched ahead (ZeRO-3)"
    )
    param_persistence_threshold: int = Field(
        100_000,
        ge=0,
        alias="stage3_param_persistence_threshold",
        description="smaller tensors are not sharded (ZeRO-3)",
    )
    max_live_parameters: int = Field(
        1_000_000_000, ge=0, alias="stage3_max_live_parameters", description="gathered elements a GPU may hold (ZeRO-3)"
    )
    max_reuse_distance: int = Field(
        1_000_000_000, ge=0, alias="stage3_max_reuse_distance", description="keep if reused within (ZeRO-3)"
    )
    gather_16bit_weights_on_model_save: bool = Field(
        True,
        alias="stage3_gather_16bit_weights_on_model_save",
        description="gather full weights when saving (ZeRO-3); generation reads them",
    )
    offload_optimizer: OffloadOptimizer | None = Field(None, description="optimizer states outside the GPU")
    offload_param: OffloadParam | None = Field(None, description="parameters outside the GPU (ZeRO-3)")

    @model_validator(mode="after")
    def _combinations(self) -> ZeroConfig:
        if self.offloads_optimizer and self.stage == 0:
            raise ConfigError('offload_optimizer needs ZeRO >= 1: set "stage" to 1, 2 or 3.')
        if self.offload_param and self.offload_param.device != "none" and self.stage != 3:
            raise ConfigError(
                f'offload_param needs ZeRO-3, "stage" is {self.stage}: set it to 3 or remove the section.'
            )
        for name, section in (("offload_optimizer", self.offload_optimizer), ("offload_param", self.offload_param)):
            if section and section.device == "nvme":
                if not section.nvme_path:
                    raise ConfigError(f'{name} to nvme needs "nvme_path", a folder on the NVMe disk.')
                if self.stage != 3:
                    raise ConfigError(f'{name} to nvme needs ZeRO-3, "stage" is {self.stage}.')
        return self

    @property
    def offloads_optimizer(self) -> bool:
        """Whether the optimizer runs on the CPU."""
        return self.offload_optimizer is not None and self.offload_optimizer.device != "none"


class OptimizerParams(Frozen):
    """Settings of the optimizer; which of them an optimizer takes is checked by its type."""

    lr: float = Field(..., gt=0, description="peak learning rate (of Muon's matrices, for Muon)")
    betas: tuple[float, float] | None = Field(None, description="decay of the moments (AdamW 0.9 0.95, Lion 0.9 0.99)")
    eps: float | None = Field(None, gt=0, description="AdamW's denominator term")
    weight_decay: float = Field(0.0, ge=0, description="decoupled decay of matrices; norms and biases never decay")
    momentum: float | None = Field(None, ge=0, lt=1, description="Muon's momentum")
    adam_lr: float | None = Field(None, gt=0, description="Muon only: rate of the parameters AdamW trains")

    @field_validator("betas", mode="before")
    @classmethod
    def _list_is_tuple(cls, value: Any) -> Any:
        return tuple(value) if isinstance(value, list) else value


class OptimizerConfig(Frozen):
    """Which optimizer, as DeepSpeed writes it."""

    type: Literal["AdamW", "Lion", "Muon"] = Field(..., description="the optimizer")
    params: OptimizerParams = Field(..., description="its settings")

    @field_validator("type", mode="before")
    @classmethod
    def _any_case(cls, value: Any) -> Any:
        known = {"adamw": "AdamW", "lion": "Lion", "muon": "Muon"}
        if isinstance(value, str) and value.lower() == "adam":
            raise ConfigError('"Adam" mixes weight decay into the gradient; write "AdamW".')
        return known.get(value.lower(), value) if isinstance(value, str) else value

    @model_validator(mode="after")
    def _own_settings(self) -> OptimizerConfig:
        takes = {"AdamW": {"betas", "eps"}, "Lion": {"betas"}, "Muon": {"betas", "eps", "momentum", "adam_lr"}}
        for name in ("betas", "eps", "momentum", "adam_lr"):
            if getattr(self.params, name) is not None and name not in takes[self.type]:
                raise ConfigError(f"optimizer.params.{name} is not a setting of {self.type}; remove it.")
        return self


class DeepSpeedConfig(Frozen):
    """The DeepSpeed half of a run description."""

    train_batch_size: int | None = Field(None, ge=1, description="samples per optimizer step, over all ranks")
    train_micro_batch_size_per_gpu: int | None = Field(None, ge=1, description="samples per rank and micro batch")
    gradient_accumulation_steps: int | None = Field(None, ge=1, description="micro batches per rank and optimizer step")
    gradient_clipping: float = Field(..., ge=0, description="largest gradient norm; 0 = never clip")
    bf16: Bf16Config = Field(Bf16Config(), description="bfloat16 training")
    fp16: Fp16Config = Field(Fp16Config(), description="float16 training")
    zero_optimization: ZeroConfig = Field(..., description="ZeRO")
    optimizer: OptimizerConfig = Field(..., description="the optimizer")
    prescale_gradients: bool = Field(False, description="divide gradients before reducing them")
    gradient_predivide_factor: float = Field(1.0, gt=0, description="the divisor of prescale_gradients")
    communication_data_type: Literal["fp32", "fp16", "bf16"] | None = Field(
        None, description="dtype gradients are reduced in; null: the training dtype"
    )
    data_types: dict[str, Any] | None = Field(None, description="DeepSpeed's data_types section, e.g. grad_accum_dtype")
    steps_per_print: int | None = Field(None, ge=1, description="steps between DeepSpeed's own log lines; null: none")
    wall_clock_breakdown: bool = Field(False, description="DeepSpeed times forward, backward and step")
    memory_breakdown: bool = Field(False, description="DeepSpeed logs memory around each phase")
    dump_state: bool = Field(False, description="DeepSpeed prints its resolved configuration")
    flops_profiler: dict[str, Any] | None = Field(None, description="DeepSpeed's flops profiler section")
    comms_logger: dict[str, Any] | None = Field(None, description="DeepSpeed's communication logger section")
    aio: dict[str, Any] | None = Field(None, description="DeepSpeed's asynchronous I/O section (NVMe offload)")
    pipeline: dict[str, Any] | None = Field(None, description="DeepSpeed's pipeline section")
    checkpoint: dict[str, Any] | None = Field(None, description="DeepSpeed's checkpoint section")

    @model_validator(mode="before")
    @classmethod
    def _set_elsewhere(cls, raw: Any) -> Any:
        if isinstance(raw, dict):
            for key, where in OURS.items():
                if key in raw:
                    raise ConfigError(f'"{key}" is not read from here: {where}.')
            if "gradient_clipping" not in raw:
                raise ConfigError(
                    '"gradient_clipping" is not set, and DeepSpeed would silently clip at 1.0. '
                    'Write "gradient_clipping": 1.0 (or 0.0 for none).'
                )
        return raw

    @model_validator(mode="after")
    def _precision_and_optimizer(self) -> DeepSpeedConfig:
        if self.bf16.enabled and self.fp16.enabled:
            raise ConfigError("bf16 and fp16 are both enabled; enable one (bf16 on Ampere GPUs and later, and CPUs).")
        if self.optimizer.type == "Muon":
            if self.zero_optimization.stage == 3:
                raise ConfigError("Muon needs full matrices, ZeRO-3 shards them: use ZeRO <= 2 or AdamW.")
            if self.gradient_clipping:
                raise ConfigError(
                    f'"gradient_clipping" is {self.gradient_clipping} with Muon: under ZeRO the gradients already are '
                    "Muon's orthogonal updates, whose norm has no meaning. Write 0.0."
                )
        for key in {"writer", "use_node_local_storage", "load_universal"} & (self.checkpoint or {}).keys():
            raise ConfigError(
                f'"checkpoint" has "{key}": checkpoints are not written by DeepSpeed (--train.async_save writes them during '
                "training), and all ranks write into one folder. Remove it."
            )
        if self.train_micro_batch_size_per_gpu is None and self.train_batch_size is None:
            raise ConfigError('write "train_micro_batch_size_per_gpu" (and "gradient_accumulation_steps").')
        return self

    @property
    def dtype(self) -> Literal["bf16", "fp16", "fp32"]:
        """Name of the training dtype."""
        return "bf16" if self.bf16.enabled else "fp16" if self.fp16.enabled else "fp32"


def load_json(path: str | Path) -> dict[str, Any]:
    """Read a ds_configs file strictly.

    Raises ConfigError with line and column for broken JSON, and for a missing file, a repeated key or a non-object.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        near = sorted(str(p) for p in path.parent.glob("*.json")) if path.parent.is_dir() else []
        raise ConfigError(f"{path}: no such file." + (f" There are: {', '.join(near)}." if near else "")) from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read: {error}.") from None

    def no_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for key, value in pairs:
            if key in found:
                raise ConfigError(f'{path}: the key "{key}" occurs twice in one section; keep one.')
            found[key] = value
        return found

    try:
        raw = json.loads(text, object_pairs_hook=no_repeats)
    except json.JSONDecodeError as error:
        row = text.split("\n")[error.lineno - 1]
        raise ConfigError(
            f"{path}: broken JSON at line {error.lineno}, column {error.colno}: {error.msg}.\n  {row}\n  "
            + " " * (error.colno - 1)
            + "^"
        ) from None
    if not isinstance(raw, dict):
        raise ConfigError(f"{path}: holds a {type(raw).__name__}, expected one JSON object.")
    raw.pop("$schema", None)
    return raw
