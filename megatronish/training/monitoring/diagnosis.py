"""Where a step becomes non-finite: norms of module outputs, weights and gradients on this rank."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from megatronish.model.transformer import IGNORED_LABEL
from megatronish.training.engine import Engine
from megatronish.training.step import Batch, own_part


@dataclass
class Diagnosis:
    """Norms of one rank's modules and parameters, by name.

    losses: sum of token losses of each micro batch; outputs: largest norm of a module's output, NaN where one is non-finite;
    broken: the first module with a non-finite output, and the micro batch (from 0); gradients: this rank's, of the mean loss.
    """

    losses: list[float] = field(default_factory=list)
    outputs: dict[str, float] = field(default_factory=dict)
    broken: tuple[str, int] | None = None
    weights: dict[str, float] = field(default_factory=dict)
    gradients: dict[str, float] = field(default_factory=dict)

    @property
    def broken_gradients(self) -> list[str]:
        """The parameters whose gradients hold inf or NaN."""
        return [name for name, norm in self.gradients.items() if not _is_finite(norm)]


def diagnose_step(engine: Engine, batches: Iterable[Batch], seed: int) -> Diagnosis:
    """`diagnose` a step of the engine with the random numbers of its seed. Every rank calls it.

    Without gradients under ZeRO-3, where parameters are partitioned in the backward pass. A pipeline stage cannot run alone:
    only its weights are measured.
    """
    if engine.mesh.pp.size > 1:
        return Diagnosis(weights=weight_norms(engine.module))
    parts = [own_part(batch, engine.mesh.sp) for batch in batches]
    tokens = sum((batch["labels"] != IGNORED_LABEL).sum() for batch in parts)
    assert isinstance(tokens, Tensor)
    engine.mesh.data.sum_(tokens := tokens.float())
    partitioned = any(hasattr(p, "ds_tensor") for p in engine.module.parameters())
    torch.manual_seed(seed)
    return diagnose(engine.module, parts, 1.0 / tokens, with_gradients=not partitioned)


def diagnose(module: nn.Module, batches: Iterable[Batch], scale: Tensor, with_gradients: bool) -> Diagnosis:
    """Run the micro batches again, forward and, with_gradients, backward, and measure every output and gradient.

    module: a batch in, the sum of its token losses out; scale: what makes the sum a mean. No weight,
    gradient or optimizer state changes. Ranks that share matrices call it together.
    """
    found = Diagnosis(weights=weight_norms(module))
    parameters = {name: p for name, p in module.named_parameters() if p.requires_grad}
    sums = {name: torch.zeros_like(p, dtype=torch.float32) for name, p in parameters.items()} if with_gradients else {}
    for number, batch in enumerate(batches):
        with _output_norms(module) as norms, torch.set_grad_enabled(with_gradients):
            loss = module(batch)
        found.losses.append(float(loss.detach()))
        for name, norm in ((name, float(norm)) for name, norm in norms):  # in order; some modules come twice
            if found.broken is None and not _is_finite(norm):
                found.broken = (short(name), number)
            known = found.outputs.get(short(name), 0.0)
            found.outputs[short(name)] = max(known, norm) if _is_finite(known) and _is_finite(norm) else math.nan
        if with_gradients:
            gradients = torch.autograd.grad(loss * scale, list(parameters.values()), allow_unused=True)
            for name, gradient in zip(parameters, gradients, strict=True):
                if gradient is not None:
                    sums[name] += gradient
    found.gradients = {short(name): float(_norm(total)) for name, total in sums.items()}
    return found


def weight_norms(module: nn.Module) -> dict[str, float]:
    """The norm of each parameter of this rank; under ZeRO-3 of its partition."""
    return {short(name): float(_norm(getattr(p, "ds_tensor", p))) for name, p in module.named_parameters()}


def short(name: str) -> str:
    """The name inside the model; "loss" for the outermost module."""
    return name.removeprefix("model").removeprefix(".") or "loss"


def _norm(tensor: Tensor) -> Tensor:
    """In float64, so that only non-finite elements give a non-finite norm."""
    return torch.linalg.vector_norm(tensor.detach(), dtype=torch.float64)


def _is_finite(norm: float) -> bool:
    return norm - norm == 0.0


@contextmanager
def _output_norms(module: nn.Module) -> Iterator[list[tuple[str, Tensor]]]:
    """Records (name, norm of the output) of every module, in the order in which modules finish."""
    norms: list[tuple[str, Tensor]] = []

    def record(name: str, out: Any) -> None:
        tensors = [item for item in (out if isinstance(out, tuple) else (out,)) if isinstance(item, Tensor)]
        found = [_norm(item) for item in tensors if item.is_floating_point()]
        if found:
            norms.append((name, torch.stack(found).norm()))

    handles = [
        part.register_forward_hook(lambda part, given, out, name=name: record(name, out))
        for name, part in module.named_modules()
    ]
    try:
        yield norms
    finally:
        for handle in handles:
            handle.remove()
