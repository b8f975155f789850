"""Feed-forward layer: gated (SwiGLU, GeGLU) or plain."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch.nn.functional as F
from torch import Tensor, nn

from megatronish.config.model import ModelConfig
from megatronish.model.sharded_layers import build_column, build_row
from megatronish.ops.dispatch import OpsBackend
from megatronish.ops.swiglu import geglu, swiglu
from megatronish.parallel.layers import TensorParallel


def gelu_tanh(x: Tensor) -> Tensor:
    """The tanh approximation of GELU (Hendrycks and Gimpel 2016)."""
    return F.gelu(x, approximate="tanh")


def activation_function(name: str, backend: OpsBackend) -> Callable[[Tensor], Tensor]:
    """The function of ModelConfig.activation; the gated ones halve the last dim."""
    functions: dict[str, Callable[[Tensor], Tensor]] = {
        "swiglu": partial(swiglu, backend=backend),
        "geglu": geglu,
        "geglu_tanh": partial(geglu, form="tanh"),
        "gelu": F.gelu,
        "gelu_tanh": gelu_tanh,
        "relu": F.relu,
    }
    return functions[name]


class MLP(nn.Module):
    """down(activation(up(x))). For a gated activation `up` is packed: the gate in the first half of its rows."""

    def __init__(self, config: ModelConfig, backend: OpsBackend, tp: TensorParallel) -> None:
        super().__init__()
        width = config.ffn_hidden_size
        self.activation = activation_function(config.activation, backend)
        parts = (width, width) if config.is_gated else (width,)
        self.up = build_column(config.hidden_size, parts, config.mlp_bias, tp)
        self.down = build_row(width, config.hidden_size, config.mlp_bias, tp)

    def forward(self, x: Tensor) -> Tensor:
        """x [b, s, hidden] -> [b, s, hidden]."""
        y: Tensor = self.down(self.activation(self.up(x)))
        return y
