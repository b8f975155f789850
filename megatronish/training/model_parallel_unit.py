"""The groups of the mesh as DeepSpeed asks for them."""

from __future__ import annotations

import torch.distributed as dist

from megatronish.parallel.mesh import ParallelMesh


class ModelParallelUnit:
    """The groups of the mesh under the names that DeepSpeed asks for (`mpu`, after Megatron-LM)."""

    def __init__(self, mesh: ParallelMesh) -> None:
        assert mesh.device_mesh is not None
        self._mesh, self._data, self._model = mesh, mesh.device_mesh.get_group("dp"), mesh.device_mesh.get_group("tp")

    @classmethod
    def of(cls, mesh: ParallelMesh) -> ModelParallelUnit | None:
        """None where no matrix is divided: then DeepSpeed takes all ranks for data-parallel ones."""
        return cls(mesh) if mesh.tp.size > 1 else None

    def get_model_parallel_rank(self) -> int:
        return self._mesh.tp.rank

    def get_model_parallel_world_size(self) -> int:
        return self._mesh.tp.size

    def get_model_parallel_group(self) -> dist.ProcessGroup:
        return self._model

    get_tensor_model_parallel_rank = get_model_parallel_rank
    get_tensor_model_parallel_world_size = get_model_parallel_world_size
    get_tensor_model_parallel_group = get_model_parallel_group

    def get_data_parallel_rank(self) -> int:
        return self._mesh.dp.rank

    def get_data_parallel_world_size(self) -> int:
        return self._mesh.dp.size

    def get_data_parallel_group(self) -> dist.ProcessGroup:
        return self._data
