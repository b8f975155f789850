"""Optimizer shards: the optimizer state on disk, in a form that every parallel layout can load.

Each rank writes one safetensors file with its part of the master weights and of each moment, as flat ranges of numbers, and
the extent of each range in the full tensor. A rank of another layout reads the ranges that make up its own part.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from megatronish.checkpoint.staging import StagingBuffers
from megatronish.errors import ConfigError
from megatronish.parallel.layers import TensorShard

FILES = "state-rank-{:05d}.safetensors"
MASTER = "master"  # the kind of the master weights; moments have the optimizer's names


@dataclass(frozen=True)
class Extent:
    """A range of the tensor `name`: entries [start, stop) of the flattened part that `shard` takes from the full tensor.

    shape: that of the part. shard None: the part is the full tensor.
    """

    name: str
    shape: tuple[int, ...]
    shard: TensorShard | None
    start: int
    stop: int

    @property
    def full(self) -> tuple[int, ...]:
        """Shape of the full tensor."""
        return self.shape if self.shard is None else self.shard.full

    @property
    def cut(self) -> tuple[tuple[int, int], ...]:
        """Which rows or columns of the full tensor the part has; () for all."""
        return () if self.shard is None else self.shard.segments

    def to_json(self) -> dict[str, Any]:
        """As a JSON object."""
        return asdict(self)

    @classmethod
    def from_json(cls, raw: dict[str, Any]) -> Extent:
        """The inverse of `to_json`."""
        cut = raw["shard"]
        if cut is not None:
            segments = tuple((first, last) for first, last in cut["segments"])
            cut = TensorShard(**{**cut, "full": tuple(cut["full"]), "segments": segments})
        return cls(raw["name"], tuple(raw["shape"]), cut, raw["start"], raw["stop"])


@dataclass(frozen=True)
class OptimizerShard:
    """A rank's part of the optimizer state. held: per parameter its extent and its 1-D numbers of each kind; scalars: shared."""

    held: Mapping[str, tuple[Extent, Mapping[str, Tensor]]]
    scalars: Mapping[str, float]

    @property
    def bytes(self) -> int:
        """Size of the numbers."""
        return sum(numbers.nbytes for _, kinds in self.held.values() for numbers in kinds.values())

    def on_host(self, copies: StagingBuffers | None) -> OptimizerShard:
        """The shard on the CPU: copied to `copies`, so that later steps do not change it, or, without, as views where possible."""

        def taken(key: str, numbers: Tensor) -> Tensor:
            return numbers.cpu() if copies is None else copies.take(key, numbers)

        held = {
            name: (extent, {kind: taken(f"{kind}/{name}", numbers) for kind, numbers in kinds.items()})
            for name, (extent, kinds) in self.held.items()
        }
        return OptimizerShard(held, self.scalars)

    def write(self, folder: Path, rank: int) -> list[Path]:
        """Write the rank's file, if it has any numbers; the paths that were written."""
        if not self.held:
            return []
        tensors = {f"{kind}/{key}": numbers for key, (_, kinds) in self.held.items() for kind, numbers in kinds.items()}
        folder.mkdir(parents=True, exist_ok=True)
        header = {
            "extents": json.dumps({key: extent.to_json() for key, (extent, _) in self.held.items()}),
            "scalars": json.dumps(dict(self.scalars)),
        }
        path = folder / FILES.format(rank)
        save_file({key: numbers.contiguous() for key, numbers in tensors.items()}, path, header)
        return [path]


class SavedOptimizerShards:
    """The files that `OptimizerShard.write` wrote to a folder, read range by range. Raises ConfigError if one cannot be read."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.scalars: dict[str, float] = {}
        self._files: dict[Path, AbstractContextManager[Any]] = {}
        self._runs: dict[str, list[tuple[Path, str, Extent]]] = {}  # by name of the full tensor
        kinds: set[str] = set()
        for path in sorted(folder.glob(FILES.replace("{:05d}", "*"))):
            try:
                file = safe_open(path, framework="pt")
                header = file.metadata()
                extents = {key: Extent.from_json(raw) for key, raw in json.loads(header["extents"]).items()}
                self.scalars = json.loads(header["scalars"])
            except (OSError, SafetensorError, ValueError, KeyError, TypeError) as error:
                raise ConfigError(f"{path}: cannot be read ({error}); use an older checkpoint.") from None
            self._files[path] = file
            kinds |= {key.split("/")[0] for key in file.keys()}  # noqa: SIM118  no dict
            for key, extent in extents.items():
                self._runs.setdefault(extent.name, []).append((path, key, extent))
        self.moments = sorted(kinds - {MASTER})

    def __bool__(self) -> bool:
        return bool(self._files)

    def close(self) -> None:
        """Unmap the files, so that removing a checkpoint frees its disk space."""
        self._files.clear()

    def __contains__(self, name: str) -> bool:
        return name in self._runs

    def check_complete(self, names: Iterable[str]) -> None:
        """Raise ConfigError, with the first tensor that is incomplete, unless the files have all numbers of these tensors."""
        for name in names:
            runs = [extent for _, _, extent in self._runs.get(name, [])]
            there = sum(extent.stop - extent.start for extent in runs)
            wanted = math.prod(runs[0].full) if runs else 1
            if there != wanted:
                raise ConfigError(
                    f"{self.folder} holds {there} numbers of {name}, not {wanted if runs else 'all'}: a rank's file is "
                    "missing. Use an older checkpoint."
                )

    def read(self, kind: str, wanted: Extent) -> Tensor:
        """The numbers of one kind in the extent `wanted`, 1-D on the CPU."""
        runs = self._runs[wanted.name]
        same_part = [run for run in runs if run[2].cut == wanted.cut]
        if same_part:
            return self._join(kind, same_part, wanted.start, wanted.stop)
        full = torch.empty(0)
        for cut in dict.fromkeys(extent.cut for _, _, extent in runs):
            part_runs = [run for run in runs if run[2].cut == cut]
            extent = part_runs[0][2]
            part = self._join(kind, part_runs, 0, math.prod(extent.shape)).view(extent.shape)
            if extent.shard is None:
                full = part
                break
            if not full.numel():
                full = torch.empty(extent.full, dtype=part.dtype)
            extent.shard.put(full, part)
        part = full if wanted.shard is None else wanted.shard.take(full)
        return part.flatten()[wanted.start : wanted.stop]

    def _join(self, kind: str, runs: list[tuple[Path, str, Extent]], start: int, stop: int) -> Tensor:
        """Entries [start, stop) of one part, from its ranges."""
        pieces = []
        for path, key, extent in sorted(runs, key=lambda run: run[2].start):
            first, last = max(start, extent.start), min(stop, extent.stop)
            if first < last:
                numbers = self._files[path].get_slice(f"{kind}/{key}")  # type: ignore[attr-defined]
                pieces.append(numbers[first - extent.start : last - extent.start])
        return torch.cat(pieces)
