"""Optimizers and their parameter groups.

AdamW is torch's fused one: its step counts resume bit for bit, which DeepSpeed's running beta^t does not. Lion is ours
because DeepSpeed has a CPU kernel for it only under offload, compiled at first use. Muon comes from DeepSpeed
(training/engine.py), which orthogonalises full matrices while ZeRO partitions them.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from megatronish.config.deepspeed_json import OptimizerConfig

DEFAULT_BETAS = {"AdamW": (0.9, 0.95), "Lion": (0.9, 0.99), "Muon": (0.9, 0.95)}
ADAM_EPS = 1e-8
MUON_MOMENTUM = 0.95


class Lion(torch.optim.Optimizer):
    """Lion: the sign of interpolated momentum (Chen et al. 2023, algorithm 2), with decoupled weight decay.

    params: tensors or groups; lr > 0; betas (b1, b2): b1 weighs the momentum in the update, b2 in its decay.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float,
        betas: tuple[float, float] = DEFAULT_BETAS["Lion"],
        weight_decay: float = 0.0,
    ) -> None:
        if lr <= 0 or not all(0 <= beta < 1 for beta in betas):
            raise ValueError(f"Lion: lr {lr} must be > 0 and betas {betas} in [0, 1).")
        super().__init__(params, {"lr": lr, "betas": betas, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """One update of every parameter that has a gradient; returns the closure's loss, if one is given."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            if not params:
                continue
            grads = [p.grad for p in params]
            for p in params:
                if "exp_avg" not in self.state[p]:
                    self.state[p]["exp_avg"] = torch.zeros_like(p)
            moments = [self.state[p]["exp_avg"] for p in params]
            beta1, beta2 = group["betas"]
            updates = torch._foreach_lerp(grads, moments, beta1)  # (1 - b1) g + b1 m
            torch._foreach_sign_(updates)
            if group["weight_decay"]:
                torch._foreach_mul_(params, 1 - group["lr"] * group["weight_decay"])
            torch._foreach_add_(params, updates, alpha=-group["lr"])
            torch._foreach_lerp_(moments, grads, 1 - beta2)
        return loss


def parameter_groups(model: nn.Module, config: OptimizerConfig) -> list[dict[str, Any]]:
    """Groups of trainable parameters with their own `base_lr` and weight decay.

    Matrices decay; norms, biases and other vectors do not. For Muon the matrices of the blocks are orthogonalised and
    embeddings, head and vectors are left to AdamW (Jordan et al. 2024).
    """
    params = config.params
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    dims = {name: len(getattr(p, "ds_shape", p.shape)) for name, p in named}  # ZeRO-3 leaves p itself empty
    matrices = [(name, p) for name, p in named if dims[name] >= 2]
    vectors = [p for name, p in named if dims[name] < 2]

    def group(chosen: list[nn.Parameter], lr: float, decay: float, **more: Any) -> dict[str, Any]:
        return {"params": chosen, "lr": lr, "base_lr": lr, "weight_decay": decay, **more}

    if config.type != "Muon":
        groups = [group([p for _, p in matrices], params.lr, params.weight_decay), group(vectors, params.lr, 0.0)]
        return [g for g in groups if g["params"]]
    hidden = [p for name, p in matrices if "blocks." in name]
    outer = [p for name, p in matrices if "blocks." not in name]
    adam_lr = params.adam_lr or params.lr
    momentum = MUON_MOMENTUM if params.momentum is None else params.momentum
    adam: dict[str, Any] = {
        "use_muon": False,
        "betas": params.betas or DEFAULT_BETAS["Muon"],
        "eps": params.eps or ADAM_EPS,
    }
    groups = [
        group(hidden, params.lr, params.weight_decay, use_muon=True, momentum=momentum),
        group(outer, adam_lr, params.weight_decay, **adam),
        group(vectors, adam_lr, 0.0, **adam),
    ]
    for g in groups:
        for p in g["params"]:
            p.use_muon = g["use_muon"]
    return [g for g in groups if g["params"]]


def build_torch_optimizer(groups: list[dict[str, Any]], config: OptimizerConfig) -> torch.optim.Optimizer:
    """AdamW or Lion over `groups`, stepping on the device the parameters are on."""
    betas = config.params.betas or DEFAULT_BETAS[config.type]
    if config.type == "AdamW":
        return torch.optim.AdamW(
            groups, lr=config.params.lr, betas=betas, eps=config.params.eps or ADAM_EPS, fused=True
        )
    assert config.type == "Lion", config.type
    return Lion(groups, lr=config.params.lr, betas=betas)
