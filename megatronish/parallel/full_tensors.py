"""Full tensors, gathered from the ranks that hold their shards."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megatronish.parallel.layers import TensorShard, shard_of
from megatronish.parallel.mesh import ParallelMesh


@dataclass(frozen=True)
class Part:
    """A rank's shard of the full tensor `name`; shard None: all of it."""

    name: str
    tensor: Tensor
    shard: TensorShard | None

    @property
    def is_copy(self) -> bool:
        """Whether all tensor-parallel ranks hold the same data."""
        return self.shard is None or self.shard.replicated


def parts_of(module: nn.Module) -> list[Part]:
    """The parameters of `module` as shards of full tensors; names are those of the single process."""
    parts = []
    for name, parameter in module.named_parameters():
        shard = shard_of(parameter)
        parts.append(Part(name if shard is None else shard.full_name(name), parameter, shard))
    return parts


def gather_full_tensors(parts: Iterable[Part], mesh: ParallelMesh) -> dict[str, Tensor]:
    """The full tensors by name, on the CPU of rank 0; other ranks return an empty dict. A collective call.

    Shards are sent one at a time, so only rank 0 needs memory for more than one.
    """
    mine = [part for part in parts if mesh.data.rank == 0 and (mesh.tp.rank == 0 or not part.is_copy)]
    listed = [(part.name, tuple(part.tensor.shape), part.tensor.dtype, part.shard) for part in mine]
    if mesh.device_mesh is None:
        return _assemble([(name, shard, part.tensor) for (name, _, _, shard), part in zip(listed, mine, strict=True)])
    rank, device = dist.get_rank(), mine[0].tensor.device if mine else None
    everything: list[list[tuple[str, tuple[int, ...], torch.dtype, TensorShard | None]]] | None = None
    if rank == 0:
        everything = [[] for _ in range(dist.get_world_size())]
    dist.gather_object(listed, everything, dst=0)
    if everything is None:
        for part in mine:
            dist.send(part.tensor.detach().contiguous(), 0)
        return {}
    full = _assemble([(part.name, part.shard, part.tensor) for part in mine])
    for source, items in enumerate(everything):
        for name, shape, dtype, shard in items if source else ():
            received = torch.empty(shape, dtype=dtype, device=device)
            dist.recv(received, source)
            _put(full, name, shard, received)
    return full


def _assemble(parts: list[tuple[str, TensorShard | None, Tensor]]) -> dict[str, Tensor]:
    full: dict[str, Tensor] = {}
    for name, shard, tensor in parts:
        _put(full, name, shard, tensor)
    return full


def _put(full: dict[str, Tensor], name: str, shard: TensorShard | None, tensor: Tensor) -> None:
    tensor = tensor.detach().cpu()
    if shard is None:
        full[name] = tensor.clone()
        return
    if name not in full:
        full[name] = torch.empty(shard.full, dtype=tensor.dtype)
    shard.put(full[name], tensor)
