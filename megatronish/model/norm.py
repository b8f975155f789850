"""Normalisation over the last dim: RMSNorm and LayerNorm, each preceded by an optional residual addition."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megatronish.config.model import ModelConfig
from megatronish.ops.dispatch import OpsBackend
from megatronish.ops.rms_norm import add_rms_norm
from megatronish.parallel.layers import TensorParallel, all_reduce_gradient


class Norm(nn.Module):
    """Base class: adds a branch to the residual stream, then normalises the sum."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.empty(size))

    def forward(self, x: Tensor, branch: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """x [..., size] -> h, norm(h) with h = x + branch (h = x where branch is None)."""
        raise NotImplementedError


class RMSNorm(Norm):
    """x / sqrt(mean(x^2) + eps) * scale (Zhang and Sennrich 2019); scale is weight, or 1 + weight where zero_centered."""

    def __init__(self, size: int, eps: float, backend: OpsBackend, zero_centered: bool = False) -> None:
        super().__init__(size, eps)
        self.backend = backend
        self.zero_centered = zero_centered

    @property
    def scale(self) -> Tensor:
        """[size], in fp32 where adding 1 would round the weight's own dtype."""
        if not self.zero_centered:
            return self.weight
        return 1.0 + (self.weight if self.weight.dtype == torch.float64 else self.weight.float())

    def forward(self, x: Tensor, branch: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """See Norm."""
        normed, h = add_rms_norm(x, branch, self.scale, self.eps, backend=self.backend)
        return h, normed


class LayerNorm(Norm):
    """(x - mean) / sqrt(variance + eps) * weight + bias (Ba et al. 2016); the bias is optional."""

    def __init__(self, size: int, eps: float, bias: bool) -> None:
        super().__init__(size, eps)
        self.bias = nn.Parameter(torch.empty(size)) if bias else None

    def forward(self, x: Tensor, branch: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """See Norm."""
        h = x if branch is None else x + branch
        return h, F.layer_norm(h, self.weight.shape, self.weight, self.bias, self.eps)


def build_norm(
    config: ModelConfig, size: int, backend: OpsBackend, tp: TensorParallel, *, of_heads: bool = False
) -> Norm:
    """The norm selected by `config`, over `size` channels.

    of_heads: the norm of attention heads, which are sharded under tensor parallelism; the residual stream is sharded under
    sequence parallelism only. Where its input is sharded, the norm's gradient is partial and is all-reduced.
    """
    norm: Norm
    if config.norm == "rmsnorm":
        norm = RMSNorm(size, config.norm_eps, backend, config.norm_zero_centered)
    else:
        norm = LayerNorm(size, config.norm_eps, config.norm_bias)
    if tp.sequence or (of_heads and tp.size > 1):
        for parameter in norm.parameters():
            all_reduce_gradient(parameter, tp)
    return norm
