"""One way to divide a run over GPUs, and where the ranks of each axis sit."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from megatronish.config.model import ModelConfig
from megatronish.config.parallel import ParallelConfig
from megatronish.config.run import RunConfig
from megatronish.errors import ConfigError

AxisName = Literal["tp", "sp", "dp", "data", "pp"]
Recompute = Literal["none", "selective", "full"]


@dataclass(frozen=True)
class Group:
    """The ranks that communicate along an axis: `size` of them, `local` on each node."""

    size: int
    local: int

    @property
    def nodes(self) -> int:
        """Nodes that the group reaches over."""
        return -(-self.size // self.local)


@dataclass(frozen=True)
class PlannedLayout:
    """Sizes of the axes, how states are divided, and the batch of one optimizer step.

    tensor, sequence, data, pipeline: as in `parallel.mesh`, tensor innermost. tensor_sequence: Megatron sequence
    parallelism. zero: ZeRO stage over data x sequence. micro_batch: samples per rank and pass; accumulation: micro
    batches a step. interleave: parts of the model that a pipeline rank holds (Narayanan et al. 2021; 1: plain 1F1B).
    """

    tensor: int = 1
    sequence: int = 1
    data: int = 1
    pipeline: int = 1
    tensor_sequence: bool = False
    zero: int = 1
    micro_batch: int = 1
    accumulation: int = 1
    recompute: Recompute = "none"
    interleave: int = 1

    @classmethod
    def of_run(cls, config: RunConfig, ranks: int) -> PlannedLayout:
        """The layout of a run on `ranks` GPUs. Raises ConfigError when its sizes do not divide them."""
        ours, parallel = config.megatronish, config.megatronish.parallel
        plan = config.batch_plan(parallel.data_size(ranks))
        return cls(
            tensor=parallel.tensor,
            sequence=parallel.sequence,
            data=plan.data_size,
            pipeline=parallel.pipeline,
            tensor_sequence=parallel.tensor_sequence,
            zero=config.deepspeed.zero_optimization.stage,
            micro_batch=plan.micro,
            accumulation=plan.accumulation,
            recompute=ours.train.activation_checkpointing,
        )

    @property
    def ranks(self) -> int:
        """GPUs."""
        return self.tensor * self.sequence * self.data * self.pipeline

    @property
    def samples(self) -> int:
        """Samples an optimizer step."""
        return self.micro_batch * self.accumulation * self.data

    @property
    def shards(self) -> int:
        """Ranks that ZeRO divides states over."""
        return self.data * self.sequence

    def group(self, axis: AxisName, gpus_per_node: int) -> Group:
        """The group along an axis ("data": dp and sp together), with ranks numbered as in `parallel.mesh`."""
        sizes = {
            "tp": (1, self.tensor),
            "sp": (self.tensor, self.sequence),
            "dp": (self.tensor * self.sequence, self.data),
            "data": (self.tensor, self.shards),
            "pp": (self.tensor * self.shards, self.pipeline),
        }
        stride, size = sizes[axis]
        return Group(size, min(size, max(1, gpus_per_node // stride)))

    def check(self, model: ModelConfig) -> None:
        """Raise ConfigError for what the engine refuses: sizes that do not divide, and ZeRO stages beyond an axis."""
        parallel = ParallelConfig(
            tensor=self.tensor,
            pipeline=self.pipeline,
            sequence=self.sequence,
            tensor_sequence=self.tensor_sequence and self.tensor > 1,
        )
        parallel.check_divides(model)
        limit = 1 if self.pipeline > 1 else 2 if self.tensor > 1 else 3
        if not 0 <= self.zero <= limit:
            raise ConfigError(
                f"ZeRO {self.zero} with tensor {self.tensor} and pipeline {self.pipeline}: at most {limit} is possible."
            )
        if self.sequence > 1 and self.tensor * self.pipeline > 1:
            raise ConfigError(
                f"sequence {self.sequence} with tensor {self.tensor} and pipeline {self.pipeline}: set sequence, or both "
                "others, to 1."
            )
        if self.zero == 0 and self.tensor * self.pipeline > 1:
            raise ConfigError(f"ZeRO 0 with tensor {self.tensor} and pipeline {self.pipeline}: use ZeRO 1.")

    def describe(self) -> str:
        """The layout in a few signs: the axes above 1, ZeRO, micro batch x accumulation, recomputation."""
        axes = [("tp", self.tensor), ("sp", self.sequence), ("pp", self.pipeline), ("dp", self.data)]
        words = [f"{name}{size}" for name, size in axes if size > 1] or ["one GPU"]
        if self.tensor_sequence and self.tensor > 1:
            words[0] += "s"
        words += [f"zero{self.zero}", f"{self.micro_batch}x{self.accumulation}"]
        if self.recompute != "none":
            words.append(self.recompute)
        return " ".join(words)
