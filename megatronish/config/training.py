"""How long a run trains, how its learning rate moves, what it writes and when."""

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

    steps: int = Field(..., ge=1, description="optimizer steps of the whole run")
    seed: int = Field(1234, ge=0, description="seed of the initial weights, dropout and data order")
    save_dir: str = Field(..., min_length=1, description="folder of the run: checkpoints, logs, resolved configuration")
    save_interval: int = Field(500, ge=1, description="steps between checkpoints; the last step is always saved")
    keep_last: int = Field(
        2, ge=1, description="newest good checkpoints to keep; the best by validation is kept besides"
    )
    keep_every: int = Field(0, ge=0, description="checkpoints at multiples of so many steps are kept for good; 0: none")
    async_save: bool = Field(
        True, description="write checkpoints beside training, which then waits only for a copy in host memory"
    )
    on_save_error: Literal["continue", "stop"] = Field(
        "continue", description="a checkpoint that cannot be written: train on and try at the next one, or stop"
    )
    resume: str = Field("auto", description='"auto" (newest checkpoint in save_dir, if any), "never", or a checkpoint')
    eval_interval: int = Field(250, ge=0, description="steps between validations; 0 never validates")
    eval_tokens: int | None = Field(None, ge=1, description="held-out tokens per validation; null reads them all")
    hang_timeout: float = Field(
        300.0,
        ge=0.0,
        description="seconds without a heartbeat of a rank, or without progress of any, after which all ranks end; 0: never",
    )
    start_timeout: float = Field(600.0, gt=0.0, description="seconds to wait for all ranks to come")
    log_interval: int = Field(10, ge=1, description="steps between lines of metrics.jsonl and the live line")
    activation_checkpointing: Literal["none", "selective", "full"] = Field(
        "none", description="recompute in backward: nothing, all but matrix products and attention, or whole blocks"
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
