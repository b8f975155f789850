"""How the ranks of a run are divided."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from megatronish.config.base import Frozen
from megatronish.config.model import ModelConfig
from megatronish.errors import ConfigError


class ParallelConfig(Frozen):
    """Sizes of the parallel axes; the data-parallel size is the world size divided by their product."""

    tensor: int = Field(1, ge=1, description="tensor-parallel size: ranks that share every matrix")
    pipeline: int = Field(1, ge=1, description="pipeline-parallel size: ranks that share the layer list (ZeRO <= 1)")
    sequence: int = Field(1, ge=1, description="Ulysses sequence-parallel size: ranks that share every sample")
    tensor_sequence: bool = Field(
        False, description="tensor-parallel ranks divide norms and dropout by sequence (Megatron sequence parallelism)"
    )

    pipeline_balance: Literal["time", "parameters"] = Field(
        "time", description="pipeline stages get equal shares of: operations per step, or parameters"
    )

    def data_size(self, world_size: int) -> int:
        """The data-parallel size for `world_size` ranks.

        Raises ConfigError when the axes do not divide the world.
        """
        model_ranks = self.tensor * self.pipeline * self.sequence
        if world_size % model_ranks:
            raise ConfigError(
                f"parallel: tensor {self.tensor} x pipeline {self.pipeline} x sequence {self.sequence} = {model_ranks} "
                f"ranks do not divide the world of {world_size}. Start a multiple of {model_ranks} ranks, "
                f"or lower one of --parallel.tensor, --parallel.pipeline, --parallel.sequence."
            )
        return world_size // model_ranks

    def check_divides(self, model: ModelConfig) -> None:
        """Raise ConfigError, naming the sizes, unless the ranks can share a model and its sequences."""
        tensor, heads, kv_heads = self.tensor, model.num_attention_heads, model.resolved_kv_heads
        for name, value, ranks, axis in (
            ("num_attention_heads", heads, tensor, "tensor"),
            ("ffn_hidden_size", model.ffn_hidden_size, tensor, "tensor"),
            ("seq_length", model.seq_length, tensor if self.tensor_sequence else 1, "tensor"),
            ("num_attention_heads", heads, self.sequence, "sequence"),
            ("seq_length", model.seq_length, self.sequence, "sequence"),
        ):
            if value % ranks:
                raise ConfigError(
                    f"model.{name} {value} does not divide over {ranks} {axis}-parallel ranks. "
                    f"Change --parallel.{axis}, or the model."
                )
        for name, ranks in (("tensor", tensor), ("sequence", self.sequence)):
            if kv_heads % ranks and ranks % kv_heads:
                raise ConfigError(
                    f"model.num_kv_heads {kv_heads} and {ranks} {name}-parallel ranks: neither divides the other, so ranks "
                    f"cannot hold equal numbers of key/value heads. Change --parallel.{name}, or the model."
                )
        if model.num_layers < self.pipeline:
            raise ConfigError(
                f"model.num_layers {model.num_layers} is smaller than --parallel.pipeline {self.pipeline}: a stage needs "
                "a block."
            )
        if model.vocab_size < tensor:
            raise ConfigError(f"model.vocab_size {model.vocab_size} is smaller than --parallel.tensor {tensor}.")
