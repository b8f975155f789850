"""How the ranks of a run are divided: pipeline, data, sequence and tensor parallel axes.

Rank = ((pp * DP + dp) * SP + sp) * TP + tp: tensor-parallel ranks are neighbours, as in DeepSpeed's topology, so that the
axis with the most traffic stays within a node.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from megatronish.config.parallel import ParallelConfig

AXES = ("pp", "dp", "sp", "tp")


@dataclass(frozen=True)
class Axis:
    """One axis of the mesh as this rank sees it; `group` holds the ranks along it, None where there is only this one."""

    size: int = 1
    rank: int = 0
    group: ProcessGroup | None = None

    def sum_(self, tensor: Tensor) -> Tensor:
        """`tensor` summed over the axis, in place."""
        if self.group is not None:
            dist.all_reduce(tensor, group=self.group)
        return tensor


@dataclass(frozen=True)
class ParallelMesh:
    """The axes of a run. The default is that of a single process.

    data: dp and sp together, the ranks that ZeRO divides states over: a sequence-parallel rank is to the optimizer one
    more data-parallel rank, with a part of a sample.
    """

    pp: Axis = field(default_factory=Axis)
    dp: Axis = field(default_factory=Axis)
    sp: Axis = field(default_factory=Axis)
    tp: Axis = field(default_factory=Axis)
    data: Axis = field(default_factory=Axis)
    device_mesh: DeviceMesh | None = None

    @property
    def random_stream(self) -> int:
        """A number that differs between ranks that must draw different random numbers outside tensor-parallel layers."""
        return (self.pp.rank * self.dp.size + self.dp.rank) * self.sp.size + self.sp.rank


def build_mesh(config: ParallelConfig, device_type: str) -> ParallelMesh:
    """The mesh of this rank; the default process group exists, every rank calls it.

    device_type: "cpu" or "cuda". Raises ConfigError when the sizes do not divide the number of ranks.
    """
    if dist.get_world_size() == 1:
        config.data_size(1)
        return ParallelMesh()
    sizes = (config.pipeline, config.data_size(dist.get_world_size()), config.sequence, config.tensor)
    mesh = init_device_mesh(device_type, sizes, mesh_dim_names=AXES)
    axes = {name: _axis(mesh, name) for name in AXES}
    data = axes["dp"] if config.sequence == 1 else _axis(mesh["dp", "sp"]._flatten("data"), None)
    return ParallelMesh(**axes, data=data, device_mesh=mesh)


def _axis(mesh: DeviceMesh, name: str | None) -> Axis:
    size = mesh.size() if name is None else mesh.size(AXES.index(name))
    group = mesh.get_group(name) if size > 1 else None
    return Axis(size, mesh.get_local_rank(name), group)
