"""Normalisation over the last dim: RMSNorm and LayerNorm, each with the residual sum in front of it."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megatronish.config.model import ModelConfig
from megatronish.ops.dispatch import OpsBackend
from megatronish.ops.rms_norm import add_rms_norm
from megatronish.parallel.layers import TensorParallel, all_reduce_gradient


class Norm(nn.Module):
    """What both norms share: `weight`, `eps`, and how they are called."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.empty(size))

    def forward(self, x: Tensor, residual: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """norm(x + residual) and x + residual, for x [..., size]; without a residual norm(x) and x itself."""
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

    def forward(self, x: Tensor, residual: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """See Norm."""
        return add_rms_norm(x, residual, self.scale, self.eps, backend=self.backend)


class LayerNorm(Norm):
    """(x - mean) / sqrt(variance + eps) * weight + bias (Ba et al. 2016); the bias may be left out."""

    def __init__(self, size: int, eps: float, bias: bool) -> None:
        super().__init__(size, eps)
        self.bias = nn.Parameter(torch.empty(size)) if bias else None

    def forward(self, x: Tensor, residual: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """See Norm."""
        total = x if residual is None else x + residual
        return F.layer_norm(total, self.weight.shape, self.weight, self.bias, self.eps), total


def build_norm(
    config: ModelConfig, size: int, backend: OpsBackend, tp: TensorParallel, *, of_heads: bool = False
) -> Norm:
    """The norm that `config` names, over `size` channels.

    of_heads: it normalises attention heads, which tensor-parallel ranks divide; the residual stream they divide under
    sequence parallelism only. Where they do, each sees a part of the weight's gradient.
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
