"""Clusters as the planner sees them: a few rates from data sheets, and one fitted share of the peak.

Sources. Peaks, memory and links: NVIDIA's data sheets of the A100 80GB SXM and H100 SXM, and of the DGX systems around them
(8 GPUs on NVSwitch, one InfiniBand adapter a GPU: HDR 200 Gb/s, NDR 400 Gb/s). What a GPU gets through NVLink: the rate that
NCCL itself plans with, 20.0 GB/s on each of the 12 links of an A100 and 20.6 GB/s on each of the 18 of an H100
(NVIDIA/nccl, src/graph/topo.h). Fused attention: FlashAttention-2 reaches 50 to 73% of an A100's peak (Dao 2023), the
forward pass of FlashAttention-3 up to 75% of an H100's (Shah et al. 2024); 60% and 50%, for causal attention forward and
backward, are round figures below these. So is the 85% of the memory's rate.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType

MEMORY_SHARE = 0.85  # of the memory's rate that a streaming kernel reaches


@dataclass(frozen=True)
class Hardware:
    """A cluster of equal nodes. Rates are per GPU and direction.

    peak_flops: dense bf16 FLOP/s. attention_share: of it, that fused causal attention reaches. matmul_share: that matrix
    products reach in a full training step. It is the one fitted number of a GPU, and so holds what the planner leaves
    out: launches, the host, lower clocks under load, processors that NCCL takes. node_rate: bytes/s through NVLink;
    network_rate: bytes/s through the GPU's own adapter.
    """

    name: str
    peak_flops: float
    memory_bytes: float
    memory_rate: float
    node_rate: float
    network_rate: float
    matmul_share: float
    attention_share: float
    gpus_per_node: int = 8
    memory_share: float = MEMORY_SHARE

    @property
    def matmul_rate(self) -> float:
        """FLOP/s of a large matrix product."""
        return self.peak_flops * self.matmul_share

    @property
    def attention_rate(self) -> float:
        """FLOP/s of fused attention."""
        return self.peak_flops * self.attention_share

    @property
    def stream_rate(self) -> float:
        """Bytes/s that a kernel which only moves data reaches."""
        return self.memory_rate * self.memory_share


# matmul_share: the least squares fit of the logarithm of throughput over the four runs of each GPU in `published.py` that
# have no pipeline (`fit_matmul_share`, which a test repeats). All other runs are left to test it.
H100 = Hardware(
    "H100 SXM, NDR InfiniBand",
    peak_flops=989.4e12,
    memory_bytes=80e9,
    memory_rate=3.35e12,
    node_rate=18 * 20.6e9,
    network_rate=50e9,
    matmul_share=0.47,
    attention_share=0.5,
)
# torchtitan's benchmark machines: 96 GB of HBM2e at 2.4 TB/s, held to 500 W of 700 W; their real peak is not known.
H100_HBM2E = replace(H100, name="H100 HBM2e 500 W, 400 Gb/s", memory_bytes=96e9, memory_rate=2.4e12)
A100 = Hardware(
    "A100 80GB SXM, HDR InfiniBand",
    peak_flops=312e12,
    memory_bytes=80e9,
    memory_rate=2.039e12,
    node_rate=12 * 20.0e9,
    network_rate=25e9,
    matmul_share=0.685,
    attention_share=0.6,
)
HARDWARE: Mapping[str, Hardware] = MappingProxyType({"h100": H100, "h100_hbm2e": H100_HBM2E, "a100": A100})
