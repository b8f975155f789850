"""Feed-forward layer: gated (SwiGLU, GeGLU) or plain."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch.nn.functional as F
from torch import Tensor, nn

from megatronish.config.model import ModelConfig
from megatronish.model.linear import Linear
from megatronish.ops.dispatch import OpsBackend
from megatronish.ops.swiglu import geglu, swiglu


def gelu_tanh(x: Tensor) -> Tensor:
    """The tanh approximation of GELU (Hendrycks and Gimpel 2016)."""
    return F.gelu(x, approximate="tanh")


def activation_function(name: str, backend: OpsBackend) -> Callable[[Tensor], Tensor]:
    """The function of ModelConfig.activation; the gated ones halve the last dim."""
    functions: dict[str, Callable[[Tensor], Tensor]] = {
        "swiglu": partial(swiglu, backend=backend),
        "geglu": partial(geglu, backend=backend),
        "gelu": F.gelu,
        "gelu_tanh": gelu_tanh,
        "relu": F.relu,
    }
    return functions[name]


class MLP(nn.Module):
    """down(activation(up(x))). For a gated activation `up` is packed: the gate in the first half of its rows."""

    def __init__(self, config: ModelConfig, backend: OpsBackend) -> None:
        super().__init__()
        width = config.ffn_hidden_size
        self.activation = activation_function(config.activation, backend)
        self.up = Linear(config.hidden_size, 2 * width if config.is_gated else width, bias=config.mlp_bias)
        self.down = Linear(width, config.hidden_size, bias=config.mlp_bias)

    def forward(self, x: Tensor) -> Tensor:
        """x [b, s, hidden] -> [b, s, hidden]."""
        return self.down(self.activation(self.up(x)))
