"""Initial weights that depend only on the seed and on each parameter's name and shape.

Each parameter is drawn by its own generator, on the CPU, in fp32 and as a full tensor, so the order of construction, the
precision, the device and the parallel layout do not change it. A tensor-parallel rank draws the full tensor and keeps its
slice.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial

import torch
from torch import Tensor, nn

from megatronish.config.model import ModelConfig
from megatronish.parallel.layers import shard_of

Draw = Callable[[str, Sequence[int]], Tensor]
Gather = Callable[[list[nn.Parameter]], AbstractContextManager[object]]


def initial_weight(name: str, shape: Sequence[int], config: ModelConfig, seed: int) -> Tensor:
    """The initial value of the parameter `name` of full shape `shape`: fp32 on the CPU.

    Norm weights are 1 (0 where norm_zero_centered), biases 0, all others normal with std init_std. With init_scale_residual
    the std of the projections that write to the residual stream (attention.out, mlp.down) is divided by
    sqrt(2 * num_layers) (Radford et al. 2019).
    """
    kind = name.rsplit(".", 1)[-1]
    if kind == "bias":
        return torch.zeros(*shape, device="cpu", dtype=torch.float32)
    if len(shape) == 1:
        return torch.full(tuple(shape), float(not config.norm_zero_centered), device="cpu", dtype=torch.float32)
    std = config.init_std
    if config.init_scale_residual and name.endswith((".attention.out.weight", ".mlp.down.weight")):
        std /= math.sqrt(2 * config.num_layers)
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    generator = torch.Generator(device="cpu").manual_seed(int.from_bytes(digest[:8], "little") >> 1)
    weight = torch.empty(*shape, device="cpu", dtype=torch.float32)
    return weight.normal_(0.0, std, generator=generator)


@torch.no_grad()
def init_weights(
    module: nn.Module, config: ModelConfig, seed: int, *, gather: Gather | None = None, draw: Draw | None = None
) -> None:
    """Set every parameter of `module` (named as in Transformer) to its initial value.

    draw: returns a parameter's initial value for its name and full shape, for a model that does not start from random
    weights (then `seed` is unused).

    gather: for parameters that are partitioned over ranks, a context manager that gathers a list of them and writes
    changes back on exit (`deepspeed.zero.GatheredParameters` with modifier_rank=0, for instance).
    Raises ValueError for a parameter on the meta device, which has no storage.
    """
    draw = draw or partial(initial_weight, config=config, seed=seed)
    for name, parameter in module.named_parameters():
        if parameter.is_meta:
            raise ValueError(f"{name} is on the meta device: call module.to_empty(device=...) before init_weights")
        with nullcontext() if gather is None else gather([parameter]):
            shard = shard_of(parameter)
            if shard is None:
                parameter.copy_(draw(name, parameter.shape))
            else:
                parameter.copy_(shard.take(draw(shard.full_name(name), shard.full)))
