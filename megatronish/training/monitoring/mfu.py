"""The peak arithmetic rate that MFU is a share of: a data sheet's for known GPUs, measured for CPUs."""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch
import torch.distributed as dist

# Dense tensor-core TFLOP/s for bf16/fp16 with fp32 accumulation, from NVIDIA's data sheets (without sparsity).
GPU_TFLOPS = {
    "H200": 989.0,
    "H100 PCIe": 756.0,
    "H100 NVL": 835.0,
    "H100": 989.0,
    "A100": 312.0,
    "L40S": 362.0,
    "L4": 121.0,
    "A10": 125.0,
    "RTX 4090": 165.2,
    "RTX 4080": 97.5,
    "RTX 4070 Ti SUPER": 88.2,
    "RTX 4070 Ti": 80.2,
    "RTX 4070": 58.3,
    "RTX 3090": 71.0,
    "RTX 3060": 25.5,
    "T4": 65.0,
}
FP32_SHARE = 0.5  # of the above, with TF32 matrices
MATRIX = 768


@dataclass(frozen=True)
class Peak:
    """Peak rate of all ranks together in FLOP/s, and where the number comes from."""

    flops: float
    source: str


def find_peak(device: torch.device, dtype: torch.dtype) -> Peak | None:
    """The peak of all ranks; None for a GPU whose data sheet is not in the table. Every rank calls it."""
    if device.type == "cpu":
        total = torch.tensor(measure_matmul(dtype), dtype=torch.float64)
        dist.all_reduce(total)
        return Peak(total.item(), f"measured {MATRIX}^3 {dtype} matmul on {dist.get_world_size()} CPU ranks")
    name = torch.cuda.get_device_name(device)
    for key in sorted(GPU_TFLOPS, key=len, reverse=True):
        if key.lower() in name.lower():
            rate = GPU_TFLOPS[key] * (FP32_SHARE if dtype == torch.float32 else 1.0) * 1e12
            return Peak(rate * dist.get_world_size(), f"data sheet of {key}, dense, x {dist.get_world_size()}")
    return None


def measure_matmul(dtype: torch.dtype, seconds: float = 0.3) -> float:
    """FLOP/s of the best of a few square matrix products with this rank's threads; all ranks measure at once."""
    a, b = torch.randn(MATRIX, MATRIX).to(dtype), torch.randn(MATRIX, MATRIX).to(dtype)
    dist.barrier()
    best, end = float("inf"), time.perf_counter() + seconds
    while time.perf_counter() < end:
        start = time.perf_counter()
        torch.mm(a, b)
        best = min(best, time.perf_counter() - start)
    return 2.0 * MATRIX**3 / best
