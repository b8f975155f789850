"""Run length, learning rate schedule, checkpoints, validation and logs."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from megatronish.config.base import Frozen


class ScheduleConfig(Frozen):
    """The learning rate as a share of `optimizer.params.lr`, by step."""

    type: Literal["cosine", "linear", "constant", "wsd"] = Field(
        "cosine", description="shape of the decay; wsd = warmup, stable, then a linear decay at the end"
    )
    warmup_steps: int = Field(0, ge=0, description="steps of linear warmup from 0")
    min_ratio: float = Field(0.1, ge=0.0, le=1.0, description="share of the peak learning rate at the end of the decay")
    decay_fraction: float = Field(0.2, gt=0.0, le=1.0, description="wsd only: share of the run spent decaying")


class TrainConfig(Frozen):
    """Run length, checkpoints, validation and memory."""

    steps: int = Field(..., ge=1, description="optimizer steps of the run")
    seed: int = Field(1234, ge=0, description="seed of the initial weights, dropout and data order")
    save_dir: str = Field(..., min_length=1, description="folder of the run: checkpoints, logs, resolved configuration")
    save_interval: int = Field(500, ge=1, description="steps between checkpoints; the last step is always saved")
    keep_last: int = Field(2, ge=1, description="newest good checkpoints to keep; the best by validation is kept too")
    keep_every: int = Field(0, ge=0, description="checkpoints at multiples of N steps are kept permanently; 0: none")
    async_save: bool = Field(
        True, description="write checkpoints while training continues, which waits only for the copy to host memory"
    )
    on_save_error: Literal["continue", "stop"] = Field(
        "continue", description="if a checkpoint cannot be written: continue and try at the next one, or stop"
    )
    resume: str = Field("auto", description='"auto" (newest checkpoint in save_dir, if any), "never", or a checkpoint')
    eval_interval: int = Field(250, ge=0, description="steps between validations; 0 never validates")
    eval_tokens: int | None = Field(None, ge=1, description="held-out tokens per validation; null reads them all")
    hang_timeout: float = Field(
        300.0,
        ge=0.0,
        description="seconds without a heartbeat of a rank, or without progress of any, after which all ranks stop; 0: never",
    )
    start_timeout: float = Field(600.0, gt=0.0, description="seconds to wait for all ranks to join")
    time_limit: float | None = Field(
        None, gt=0.0, description="hours after which the run has saved and exits with status 76"
    )
    max_skipped_steps: int = Field(
        5, ge=1, description="consecutive steps skipped for a non-finite loss or gradient after which the run stops"
    )
    on_spike: Literal["ignore", "warn", "rollback"] = Field(
        "warn",
        description="response to a sudden rise of the loss; rollback: resume from a checkpoint and skip that data",
    )
    spike_threshold: float = Field(
        10.0, gt=0.0, description="a spike: the loss is N robust standard deviations above the median"
    )
    spike_window: int = Field(128, ge=8, description="steps over which the median and the deviation are taken")
    spike_steps: int = Field(2, ge=1, description="steps up to a spike whose samples are left out after a rollback")
    max_rollbacks: int = Field(3, ge=0, description="rollbacks per run; later spikes only warn")
    log_interval: int = Field(10, ge=1, description="steps between lines of metrics.jsonl and the live line")
    activation_checkpointing: Literal["none", "selective", "full"] = Field(
        "none", description="recompute in backward: nothing, all but matrix products and attention, or full blocks"
    )
    memory_budget: float | None = Field(
        None,
        gt=0.0,
        description="GiB that a forward pass of a rank may keep for backward; beyond it counts as out of memory",
    )
    compile: bool = Field(False, description="torch.compile every block")
    compile_mode: Literal["default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs"] = Field(
        "default", description="torch.compile mode of the blocks"
    )


class LogConfig(Frozen):
    """Where metrics go besides the terminal and metrics.jsonl."""

    tensorboard: bool = Field(True, description="write TensorBoard events under save_dir/tensorboard")
    wandb: Literal["off", "online", "offline"] = Field("off", description="Weights & Biases mode")
    wandb_project: str = Field("megatronish", min_length=1, description="Weights & Biases project")
