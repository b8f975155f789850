"""Feed-forward layer: gated (SwiGLU, GeGLU) or plain."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType

import torch.nn.functional as F
from torch import Tensor, nn

from megatronish.config.model import ModelConfig
from megatronish.model.linear import Linear
from megatronish.ops.swiglu import geglu, swiglu


def gelu_tanh(x: Tensor) -> Tensor:
    """The tanh approximation of GELU (Hendrycks and Gimpel 2016)."""
    return F.gelu(x, approximate="tanh")


ACTIVATIONS: Mapping[str, Callable[[Tensor], Tensor]] = MappingProxyType(
    {"swiglu": swiglu, "geglu": geglu, "gelu": F.gelu, "gelu_tanh": gelu_tanh, "relu": F.relu}
)


class MLP(nn.Module):
    """down(activation(up(x))). For a gated activation `up` is packed: the gate in the first half of its rows."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        width = config.ffn_hidden_size
        self.activation = ACTIVATIONS[config.activation]
        self.up = Linear(config.hidden_size, 2 * width if config.is_gated else width, bias=config.mlp_bias)
        self.down = Linear(width, config.hidden_size, bias=config.mlp_bias)

    def forward(self, x: Tensor) -> Tensor:
        """x [b, s, hidden] -> [b, s, hidden]."""
        return self.down(self.activation(self.up(x)))
