"""Staging buffers in host memory, reused from one checkpoint to the next.

New memory costs a page fault per 4 KB, which takes ten times as long as the copy itself (tools/bench/checkpoint.py). For
tensors on a GPU the buffers are page-locked, so that copies run at the speed of the bus.
"""

from __future__ import annotations

import torch
from torch import Tensor


class StagingBuffers:
    """Buffers by name. A copy overwrites the previous one of the same name, whose file must be written by then."""

    def __init__(self) -> None:
        self._buffers: dict[str, Tensor] = {}
        self._devices: set[torch.device] = set()

    def take(self, name: str, tensor: Tensor) -> Tensor:
        """A copy of `tensor` on the CPU, which is complete after `wait`."""
        buffer = self._buffers.get(name)
        if buffer is None or buffer.shape != tensor.shape or buffer.dtype != tensor.dtype:
            pinned = tensor.device.type == "cuda"
            buffer = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu", pin_memory=pinned)
            self._buffers[name] = buffer
        buffer.copy_(tensor.detach(), non_blocking=tensor.device.type == "cuda")
        if tensor.device.type == "cuda":
            self._devices.add(tensor.device)
        return buffer

    @property
    def bytes(self) -> int:
        """Size of the buffers."""
        return sum(buffer.nbytes for buffer in self._buffers.values())

    def wait(self) -> None:
        """Wait until every copy is complete."""
        for device in self._devices:
            torch.cuda.synchronize(device)
        self._devices.clear()
