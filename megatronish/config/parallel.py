"""How the ranks of a run are divided."""

from __future__ import annotations

from pydantic import Field

from megatronish.config.base import ConfigError, Frozen


class ParallelConfig(Frozen):
    """Sizes of the parallel axes; the data-parallel size is what the world size leaves over."""

    tensor: int = Field(1, ge=1, description="tensor-parallel size: ranks that share every matrix")
    pipeline: int = Field(1, ge=1, description="pipeline-parallel size: ranks that share the layer list (ZeRO <= 1)")
    sequence: int = Field(1, ge=1, description="Ulysses sequence-parallel size: ranks that share every sample")

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
