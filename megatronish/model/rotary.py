"""Rotary frequencies, their scalings for longer contexts, and the cos/sin tables."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from megatronish.config.model import ModelConfig, RopeScaling


def rotary_frequencies(config: ModelConfig) -> tuple[Tensor, float]:
    """Angle per position of each rotated pair, float64 [rotary_dim / 2], and the factor on cos and sin."""
    dim, theta, scaling = config.rotary_dim, config.rope_theta, config.rope_scaling
    if scaling is None:
        return _plain_frequencies(dim, theta), 1.0
    if scaling.type == "linear":
        return _plain_frequencies(dim, theta) / scaling.factor, 1.0
    if scaling.type == "ntk":
        # The base grows so that the slowest pair turns exactly `factor` times slower and the fastest as before.
        return _plain_frequencies(dim, theta * scaling.factor ** (dim / (dim - 2))), 1.0
    if scaling.type == "llama3":
        return _llama3_frequencies(_plain_frequencies(dim, theta), scaling), 1.0
    return _yarn_frequencies(dim, theta, scaling)


def _plain_frequencies(dim: int, theta: float) -> Tensor:
    exponents = torch.arange(0, dim, 2, dtype=torch.float64, device="cpu") / dim
    return torch.pow(torch.tensor(theta, dtype=torch.float64, device="cpu"), -exponents)


def _llama3_frequencies(frequencies: Tensor, scaling: RopeScaling) -> Tensor:
    """Llama 3.1: slow pairs are divided by the factor, fast ones kept, those between blended by their rotations."""
    assert scaling.original_seq_length is not None, "checked by RopeScaling"
    rotations = scaling.original_seq_length * frequencies / (2 * math.pi)  # turns within the original context
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    kept = ((rotations - low) / (high - low)).clamp(0.0, 1.0)
    return frequencies * (kept + (1 - kept) / scaling.factor)


def _yarn_frequencies(dim: int, theta: float, scaling: RopeScaling) -> tuple[Tensor, float]:
    """YaRN (Peng et al. 2023), equations 19-23: a ramp over the pair's index, and a temperature on the scores."""
    assert scaling.original_seq_length is not None, "checked by RopeScaling"
    length = scaling.original_seq_length

    def pair_of(rotations: float) -> float:
        """Index of the pair that completes `rotations` turns within the original context."""
        return dim * math.log(length / (rotations * 2 * math.pi)) / (2 * math.log(theta))

    low = max(math.floor(pair_of(scaling.beta_fast)), 0)
    high = min(math.ceil(pair_of(scaling.beta_slow)), dim - 1)
    ramp = (torch.arange(dim // 2, dtype=torch.float64, device="cpu") - low) / max(high - low, 0.001)
    divided = ramp.clamp(0.0, 1.0)
    frequencies = _plain_frequencies(dim, theta)
    attention_factor = scaling.attention_factor
    if attention_factor is None:
        attention_factor = 0.1 * math.log(scaling.factor) + 1.0
    return frequencies * (1 - divided + divided / scaling.factor), attention_factor


class RotaryTables:
    """cos and sin of every position, fp32, one copy per device, built at first use.

    Neither a module nor a buffer: `model.to(torch.bfloat16)` must not round the angles, and a model built on the meta
    device or under a partitioning context must not get tables there.
    """

    def __init__(self, config: ModelConfig) -> None:
        self._config = config
        self._tables: dict[torch.device, tuple[Tensor, Tensor]] = {}

    def get(self, device: torch.device, length: int) -> tuple[Tensor, Tensor]:
        """cos, sin [at least `length` and the training context, rotary_dim / 2] on `device`."""
        tables = self._tables.get(device)
        if tables is None or tables[0].shape[0] < length:
            # Beyond the training context the tables double, so that a growing cache rarely rebuilds them.
            rows = self._config.seq_length
            while rows < length:
                rows *= 2
            tables = self._build(rows, device)
            self._tables[device] = tables
        return tables

    def _build(self, rows: int, device: torch.device) -> tuple[Tensor, Tensor]:
        frequencies, factor = rotary_frequencies(self._config)
        angles = torch.outer(torch.arange(rows, dtype=torch.float64, device="cpu"), frequencies)
        cos, sin = angles.cos() * factor, angles.sin() * factor
        return cos.to(device, torch.float32), sin.to(device, torch.float32)
