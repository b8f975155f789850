"""Linear layer whose parameters are left unset: model/init.py draws them, whatever the order of construction."""

from __future__ import annotations

from torch import Tensor, nn

from megatronish.ops.linear import linear


class Linear(nn.Linear):
    """x [..., in_features] -> x weight^T + bias [..., out_features]."""

    def reset_parameters(self) -> None:
        """Leave the parameters as allocated."""

    def forward(self, x: Tensor) -> Tensor:
        """See ops/linear.py."""
        return linear(x, self.weight, self.bias)
