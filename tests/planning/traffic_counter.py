"""Counts what the ranks of a real training step send: every collective that reaches torch's dispatcher, with its bytes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from megatronish.config.run import RunConfig
from tests.runs import rank_loader

# Operator -> kind of collective, and which tensor argument is the full payload: in place, or given and times the ranks.
_KINDS = {
    "c10d::allreduce_": ("all_reduce", 1),
    "c10d::_allgather_base_": ("all_gather", 1),  # its first tensor is the result
    "c10d::_reduce_scatter_base_": ("reduce_scatter", None),  # its second tensor is the input
    "c10d::broadcast_": ("broadcast", 1),
    "c10d::send": ("point_to_point", 1),
    "c10d::recv_": ("received", 1),
    "_c10d_functional::all_reduce": ("all_reduce", 1),
    "_c10d_functional::all_gather_into_tensor": ("all_gather", "ranks"),
    "_c10d_functional::reduce_scatter_tensor": ("reduce_scatter", 1),
    "_c10d_functional::all_to_all_single": ("all_to_all", 1),
}
_LOCAL = {"_c10d_functional::wait_tensor"}
SCALAR_BYTES = 8  # losses, token counts, norms and flags: not traffic that a plan has to know


class TrafficCounter(TorchDispatchMode):
    """While active: (ranks of the group, kind) -> bytes of the payloads, each as `planning.communication.Traffic` has it."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes: Counter[tuple[tuple[int, ...], str]] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.name()
        if name.startswith(("c10d::", "_c10d_functional::")) and name.split(".")[0] not in _LOCAL:
            self._count(name.split(".")[0], args)
        return func(*args, **(kwargs or {}))

    def _count(self, name: str, args: Sequence[Any]) -> None:
        kind, size = _KINDS[name]  # an operator not listed is a failure: its bytes would be lost
        tensors = _tensors(args)
        group = _group(args)
        ranks = tuple(dist.get_process_group_ranks(group))
        payload = tensors[0 if size is not None else 1].nbytes * (len(ranks) if size == "ranks" else 1)
        if payload > SCALAR_BYTES and len(ranks) > 1:
            self.bytes[ranks, kind] += payload


def _tensors(args: Sequence[Any]) -> list[Tensor]:
    found: list[Tensor] = []
    for argument in args:
        if isinstance(argument, Tensor):
            found.append(argument)
        elif isinstance(argument, (list, tuple)):
            found += _tensors(argument)
    return found


def _group(args: Sequence[Any]) -> dist.ProcessGroup:
    for argument in args:
        if isinstance(argument, torch.ScriptObject) and "ProcessGroup" in str(argument._type()):
            return dist.ProcessGroup.unbox(argument)
    (name,) = [argument for argument in args[1:] if isinstance(argument, str) and argument not in ("sum", "max")]
    return torch.distributed.distributed_c10d._resolve_process_group(name)


def count_step(rank: int, config: RunConfig, data_size: int) -> dict[tuple[str, str], int]:
    """(axis, kind) -> bytes of the second optimizer step of a run, on this rank; the first step makes buffers and plans.

    "data" is dp and sp together. Messages are counted where they are sent.
    """
    from megatronish.parallel.mesh import build_mesh
    from megatronish.training.engine import start_engine
    from megatronish.training.setup.construction import build_model
    from megatronish.training.step import to_device

    ours, plan = config.megatronish, config.batch_plan(data_size)
    mesh = build_mesh(ours.parallel, "cpu")
    engine = start_engine(build_model(config, plan, mesh), config, plan, mesh)
    loader = rank_loader(config, mesh.dp.rank, data_size)
    counter = TrafficCounter()
    for step in range(2):
        batches = [to_device(next(loader), engine.device) for _ in range(plan.accumulation)]
        if step == 0:
            engine.train_step(batches, 1.0)
            continue
        with counter:
            engine.train_step(batches, 1.0)
    axes = {"tp": mesh.tp, "pp": mesh.pp, "sp": mesh.sp, "data": mesh.data}
    names = {
        tuple(dist.get_process_group_ranks(axis.group)): name for name, axis in axes.items() if axis.group is not None
    }
    found: Counter[tuple[str, str]] = Counter()
    for (ranks, kind), size in counter.bytes.items():
        if kind != "received":
            found[_axis(ranks, kind, names), kind] += size
    return dict(found)


def _axis(ranks: tuple[int, ...], kind: str, names: dict[tuple[int, ...], str]) -> str:
    """The axis whose group this is. Stages also talk in pairs, and send over the group of all ranks."""
    if kind == "all_to_all":
        return "sp"
    if kind == "point_to_point":
        return "pp"
    if ranks in names:
        return names[ranks]
    assert any(set(ranks) <= set(group) for group, name in names.items() if name == "pp"), (ranks, kind, names)
    return "pp"
