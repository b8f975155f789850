"""The model-parallel interfaces of DeepSpeed: its `mpu`, and a pipeline stage of the Transformer as a PipelineModule."""

from __future__ import annotations

import os
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from deepspeed.pipe import PipelineModule
from deepspeed.runtime.pipe.topology import PipeModelDataParallelTopology

from megatronish.model.transformer import Transformer
from megatronish.parallel.mesh import ParallelMesh
from megatronish.training.step import Batch, nan_unless_finite


def first_and_last(batches: list[Batch]) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """The micro batches for DeepSpeed, which loads them on the first and last stage; `Stage` reads the other inputs itself."""
    return iter([(batch["tokens"], batch["labels"]) for batch in batches])


def model_parallel_unit(mesh: ParallelMesh) -> SimpleNamespace | None:
    """The process groups of the mesh as DeepSpeed's `mpu` (after Megatron-LM), None without tensor parallelism.

    DeepSpeed takes all ranks as data-parallel ones where it gets none.
    """
    if mesh.tp.size == 1:
        return None
    assert mesh.device_mesh is not None
    getters: dict[str, Any] = {}
    for name, axis, group in (
        ("data", mesh.dp, mesh.device_mesh.get_group("dp")),
        ("model", mesh.tp, mesh.device_mesh.get_group("tp")),
        ("tensor_model", mesh.tp, mesh.device_mesh.get_group("tp")),
    ):
        for what, value in (("rank", axis.rank), ("world_size", axis.size), ("group", group)):
            getters[f"get_{name}_parallel_{what}"] = lambda value=value: value
    return SimpleNamespace(**getters)


class Stage(PipelineModule):
    """A stage of the pipeline: hidden states in, hidden states or the scaled loss out."""

    def __init__(self, model: Transformer, mesh: ParallelMesh) -> None:
        self._given = (model, mesh)  # used by `_build`, which the base's constructor calls
        topology = PipeModelDataParallelTopology(mesh.pp.size, mesh.tp.size, mesh.dp.size)
        super().__init__(layers=[None] * mesh.pp.size, topology=topology)

    def _partition_layers(self, method: str = "") -> None:
        self.parts = list(range(self.num_stages + 1))
        self._set_bounds(self.stage_id, self.stage_id + 1)

    def _build(self) -> None:
        self.model, self.mesh = self._given
        for p in self.parameters():
            p.ds_pipe_replicated = False

    def _index_tied_modules(self) -> dict[str, Any]:
        """The embedding of the first stage and the head of the last where they share a weight; DeepSpeed sums the gradients."""
        tied: dict[str, Any] = {}
        if not self.model.config.tie_embeddings:
            return tied
        for data in range(self.mesh.dp.size):
            for tensor in range(self.mesh.tp.size):
                ends = [self._topo.get_rank(pipe=stage, data=data, model=tensor) for stage in (0, self.num_stages - 1)]
                group = dist.new_group(ends)
                if self.global_rank in ends:
                    module: Any = self.model.head if self.model.embedding is None else self.model.embedding
                    tied["embedding"] = {"ranks": ends, "group": group, "weight_attr": ["weight"], "module": module}
                    module.weight.ds_pipe_replicated = self.global_rank != ends[0]  # norms count it once
        return tied

    def get_tied_weights_and_groups(self) -> list[tuple[torch.Tensor, dist.ProcessGroup]]:
        return [(tied["module"].weight, tied["group"]) for tied in self.tied_comms.values()]

    def begin(self, batches: list[Batch], scale: torch.Tensor) -> None:
        """Set the micro batches that follow; their losses are multiplied by `scale` for the backward pass."""
        self._waiting, self._scale = iter(batches), scale
        self.loss_sum = torch.zeros((), device=scale.device)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Run the next micro batch: all stages take them in the same order."""
        batch = next(self._waiting)
        labels, rest = batch["labels"], {key: value for key, value in batch.items() if key != "labels"}
        hidden = self.model.run_stage(x, **rest)
        if self.model.head is None:
            return hidden
        loss = self.model.hidden_loss(hidden, labels)
        self.loss_sum += loss.detach()
        return loss * (self._scale + nan_unless_finite(loss))

    def _file(self, folder: str) -> str:
        return os.path.join(folder, f"stage_{self.stage_id:02d}-tensor_{self.mesh.tp.rank:02d}.pt")

    def save_state_dict(self, save_dir: str, checkpoint_engine: Any, exclude_frozen_params: bool = False) -> None:
        if self.mesh.dp.rank == 0:
            checkpoint_engine.makedirs(save_dir, exist_ok=True)
            checkpoint_engine.save(self.model.state_dict(), self._file(save_dir))

    def load_state_dir(self, load_dir: str, checkpoint_engine: Any, strict: bool = True) -> None:
        self.model.load_state_dict(checkpoint_engine.load(self._file(load_dir), map_location="cpu"), strict=strict)


def is_tied_copy(parameter: torch.Tensor) -> bool:
    """Whether another pipeline stage holds the same parameter and counts it."""
    return bool(getattr(parameter, "ds_pipe_replicated", False))
