"""Copies of tensors in host memory that is kept from one checkpoint to the next.

Fresh memory costs the kernel a page fault each 4 KB, ten times what the copy itself takes (tools/bench/checkpoint.py); on a
GPU the kept memory is page-locked, and copies to it run at the speed of the bus.
"""

from __future__ import annotations

import torch
from torch import Tensor


class StagingBuffers:
    """Buffers by name. A tensor of the same name takes the place of the one before, whose file must be written by then."""

    def __init__(self) -> None:
        self._buffers: dict[str, Tensor] = {}
        self._devices: set[torch.device] = set()

    def take(self, name: str, tensor: Tensor) -> Tensor:
        """A copy of `tensor` on the CPU, which is whole after `wait`."""
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
        """Of memory that is kept."""
        return sum(buffer.nbytes for buffer in self._buffers.values())

    def wait(self) -> None:
        """Return when every copy is whole."""
        for device in self._devices:
            torch.cuda.synchronize(device)
        self._devices.clear()
