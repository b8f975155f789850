"""Initial weights that depend on nothing but the seed and each parameter's name and shape.

Every parameter is drawn by a generator of its own, on the CPU, in fp32 and in full: the order of construction, the
precision, the device and the parallel layout cannot change it. A tensor-parallel rank draws the full tensor and keeps
its slice.
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

    Norm weights are 1 (0 where norm_zero_centered), biases 0, all else normal with std init_std; the projections that write to the residual stream
    (attention.out, mlp.down) are divided by sqrt(2 * num_layers) when init_scale_residual is set (Radford et al. 2019).
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

    draw: gives a parameter's initial value by its name and full shape, for a model that does not start from random
    weights (then `seed` is unused).

    gather: for parameters that are partitioned over ranks, a context manager that makes a list of them whole and
    writes changes back on leaving it (`deepspeed.zero.GatheredParameters` with modifier_rank=0, for instance).
    Raises ValueError for a parameter on the meta device, which has no memory to be set.
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
