"""The local optimizer state of a rank, and where DeepSpeed stores it.

DeepSpeed's optimizers concatenate parameters in flat fp32 tensors, of which a rank holds a part (ZeRO 1-3) or all (ZeRO 0);
torch's optimizer updates the flat tensors. This module finds the numbers of each parameter in them, to write or to replace
them. AdamW's and Lion's moments have the layout of the weights; Muon's do not (`can_move`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from megatronish.checkpoint.optimizer_shards import MASTER, Extent, OptimizerShard, SavedOptimizerShards
from megatronish.config.run import RunConfig
from megatronish.parallel.layers import shard_of
from megatronish.parallel.mesh import ParallelMesh

SCALER = (
    "cur_scale",
    "cur_iter",
    "last_overflow_iter",
    "cur_hysteresis",
)  # the state of the loss scaler, without its settings


@dataclass(frozen=True)
class FlatSlice:
    """Numbers [at, at + length of extent) of `flat`, a tensor that torch's optimizer updates, are those of `extent`."""

    extent: Extent
    flat: Tensor
    at: int

    def of(self, tensor: Tensor) -> Tensor:
        """A view of the numbers in `tensor`, the flat one or a moment of it."""
        return tensor.detach().view(-1)[self.at : self.at + self.extent.stop - self.extent.start]


def can_move(config: RunConfig) -> bool:
    """Whether this run's optimizer state can be written in a form that other layouts can read."""
    zero = config.deepspeed.zero_optimization
    sections = (zero.offload_optimizer, zero.offload_param)
    on_disk = any(section is not None and section.device == "nvme" for section in sections)
    return config.deepspeed.optimizer.type != "Muon" and not on_disk


class LocalOptimizerState:
    """The optimizer state of one rank.

    model: this rank's part, whose parameters `optimizer`, DeepSpeed's or torch's own, updates.
    """

    def __init__(self, model: nn.Module, optimizer: Any, mesh: ParallelMesh) -> None:
        self._mesh = mesh
        self._model = model
        self._optimizer = optimizer
        self._torch: torch.optim.Optimizer = getattr(optimizer, "optimizer", optimizer)
        self._is_zero3 = hasattr(optimizer, "fp32_partitioned_groups_flat")
        self._is_unfused = hasattr(optimizer, "fp32_groups")
        # ZeRO 1 and 2: None for a parameter that is entirely on another rank.
        self._is_partitioned = any(hasattr(p, "_hp_mapping") for p in model.parameters())

    def shard(self) -> OptimizerShard:
        """What this rank holds and writes: views of the tensors, without replicas. Every rank calls it."""
        held, scalars = {}, self.scaler_numbers()
        for name, place in self._slices():
            state = self._torch.state[place.flat]
            kinds = {key: place.of(value) for key, value in state.items() if _is_moment(value, place.flat)}
            scalars |= {key: float(value) for key, value in state.items() if key not in kinds}
            held[name] = (place.extent, {MASTER: place.of(place.flat), **kinds})
        own = {name: item for name, item in held.items() if self._is_first_copy(item[0])} if self._is_writer() else {}
        return OptimizerShard(own, scalars)

    @torch.no_grad()
    def load(self, saved: SavedOptimizerShards) -> None:
        """Load shards that were written under this layout or another. Every rank calls it."""
        for flat in self._flat_tensors():
            state: dict[str, Any] = {kind: torch.zeros_like(flat) for kind in saved.moments}
            if "step" in saved.scalars:
                state["step"] = torch.tensor(saved.scalars["step"], dtype=torch.float32, device=flat.device)
            self._torch.state[flat] = state
        for _, place in self._slices():
            extent = place.extent
            if extent.name not in saved:  # a head that is tied to the embedding was not written
                extent = Extent("embedding.weight", extent.shape, extent.shard, extent.start, extent.stop)
            place.of(place.flat).copy_(saved.read(MASTER, extent))
            for kind in saved.moments:
                place.of(self._torch.state[place.flat][kind]).copy_(saved.read(kind, extent))
        self.set_scaler(saved.scalars)
        self._update_weights()

    def set_scaler(self, numbers: Mapping[str, float]) -> None:
        """Set the state of fp16's loss scaler to what `scaler_numbers` returned; other numbers are ignored."""
        scaler = self._scaler()
        for key in self.scaler_numbers().keys() & numbers.keys():
            setattr(scaler, key, type(getattr(scaler, key))(numbers[key]))

    def optimizer_bytes(self) -> int:
        """Bytes of the moments, and of the master weights where they are not the model's own."""
        own = {id(p) for p in self._model.parameters()}
        masters = [flat for flat in self._flat_tensors() if id(flat) not in own]
        states = [value for flat in self._flat_tensors() for value in self._torch.state[flat].values()]
        return _bytes([*masters, *(value for value in states if isinstance(value, Tensor) and value.ndim)])

    def gradient_bytes(self) -> int:
        """Bytes of the present gradients, those of autograd and those in DeepSpeed's buffers."""
        found = [p.grad for p in self._model.parameters() if p.grad is not None]
        for name in (
            "averaged_gradients",
            "all_grad_tensors",
            "fp32_groups_gradients_flat",
            "grad_partitions_flat_buffer",
        ):
            kept = getattr(self._optimizer, name, None)
            lists = kept.values() if isinstance(kept, dict) else [kept] if isinstance(kept, Tensor | list) else []
            for some in lists:
                found += [item for item in ([some] if isinstance(some, Tensor) else some or []) if item is not None]
        return _bytes(found)

    def _is_writer(self) -> bool:
        """Whether this rank's numbers are not replicas of another data-parallel rank's."""
        return self._is_zero3 or self._is_partitioned or self._mesh.data.rank == 0

    def _is_first_copy(self, extent: Extent) -> bool:
        return self._mesh.tp.rank == 0 or not (extent.shard is None or extent.shard.replicated)

    def _slices(self) -> Iterator[tuple[str, FlatSlice]]:
        """Where each parameter of this rank is stored, by its local name."""
        masters = self._unfused_masters() if self._is_unfused else {}
        named: Iterator[tuple[str, Any]] = self._model.named_parameters()  # Any: DeepSpeed adds attributes
        for name, p in named:
            if not p.requires_grad:
                continue
            if self._is_zero3:
                group, at, length = self._optimizer.grad_position[self._optimizer.get_param_id(p)]
                start = length * self._mesh.data.rank  # the last rank's part is padded
                flat, stop = self._optimizer.fp32_partitioned_groups_flat[group], min(start + length, p.ds_numel)
            elif self._is_partitioned:
                mapping = p._hp_mapping
                if mapping is None:
                    continue
                flat, at = (
                    self._torch.param_groups[mapping.param_group_index]["params"][0],
                    mapping.hp_fragment_address.start,
                )
                start = mapping.lp_fragment_address.start
                stop = start + mapping.lp_fragment_address.numel
            else:
                flat, at, start, stop = masters.get(p, p), 0, 0, p.numel()
            if start < stop:
                yield name, FlatSlice(_extent(name, p, start, stop), flat, at)

    def _unfused_masters(self) -> dict[Tensor, Tensor]:
        groups = zip(self._optimizer.fp16_groups, self._optimizer.fp32_groups, strict=True)
        return {low: high for lows, highs in groups for low, high in zip(lows, highs, strict=True)}

    def _flat_tensors(self) -> list[Tensor]:
        if self._is_zero3:
            return list(self._optimizer.fp32_partitioned_groups_flat)
        return [flat for group in self._torch.param_groups for flat in group["params"]]

    def _scaler(self) -> Any:
        """The object with the loss scale of fp16."""
        own = getattr(self._optimizer, "loss_scale_config", None)
        return own if self._is_unfused else getattr(self._optimizer, "loss_scaler", None)

    def scaler_numbers(self) -> dict[str, float]:
        """State of the loss scaler of fp16."""
        found = vars(self._scaler()) if self._scaler() is not None else {}
        return {key: float(found[key]) for key in SCALER if isinstance(found.get(key), int | float)}

    def _update_weights(self) -> None:
        """Copy the master weights to the weights of the forward pass."""
        if self._is_zero3:
            self._optimizer.checkpoint_event_prologue()
            for group in range(len(self._optimizer.fp32_partitioned_groups_flat)):
                self._optimizer._reassign_or_swap_out_partitioned_parameters(group)
            self._optimizer.checkpoint_event_epilogue()
        elif self._is_partitioned:
            self._optimizer.update_lp_params()
        elif self._is_unfused:
            for low, high in self._unfused_masters().items():
                low.detach().copy_(high)


def _bytes(tensors: list[Tensor]) -> int:
    """Memory of contiguous tensors; overlaps are counted once."""
    runs = sorted((tensor.data_ptr(), tensor.numel() * tensor.element_size()) for tensor in tensors)
    total, end = 0, 0
    for start, length in runs:
        total += max(0, start + length - max(start, end))
        end = max(end, start + length)
    return total


def _is_moment(value: Any, flat: Tensor) -> bool:
    return isinstance(value, Tensor) and value.shape == flat.shape


def _extent(name: str, parameter: Tensor, start: int, stop: int) -> Extent:
    shard = shard_of(parameter)
    shape = tuple(getattr(parameter, "ds_shape", parameter.shape))
    return Extent(name if shard is None else shard.full_name(name), shape, shard, start, stop)
