"""The same steps twice: by a plain loop in one process, and by the engine on the ranks of a layout."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils.hooks import RemovableHandle

from megatronish.config.run import RunConfig
from megatronish.model.linear import Linear
from megatronish.model.transformer import IGNORED_LABEL, Head, Transformer
from megatronish.ops.dtypes import DTYPES
from megatronish.training.optimizers import parameter_groups
from megatronish.training.schedules import learning_rate_multiplier
from megatronish.verify.layouts import ACCUMULATION, SAMPLES, ParallelLayout
from megatronish.verify.tracked_memory import RankBytes, expected_bytes, slack

if TYPE_CHECKING:
    from megatronish.training.engine import Engine

STATE = "state"  # folder of the engine's state within that of a leg
Batch = dict[str, Any]
Batches = Callable[[int], list[Batch]]  # the micro batches of a step


@dataclass(frozen=True)
class Trace:
    """Loss and gradient norm of each step, the weights after the last, and the bytes that the rank held: counted, by formula,
    and the difference allowed between them."""

    losses: list[float]
    norms: list[float]
    weights: dict[str, Tensor]
    held: RankBytes | None = None
    formula: RankBytes | None = None
    slack: RankBytes | None = None

    def after(self, step: int) -> Trace:
        """The trace without its first `step` steps."""
        return replace(self, losses=self.losses[step:], norms=self.norms[step:])


@dataclass(frozen=True)
class Leg:
    """Steps [first, stop) of a run. load: folder of the engine's state to begin from; save: folder for its state at the end."""

    first: int
    stop: int
    load: Path | None = None
    save: Path | None = None


def make_batch(config: RunConfig, step: int, samples: range) -> Batch:
    """The numbered samples of a step: random tokens in documents of uneven length, with a third of the labels ignored."""
    model = config.megatronish.model
    length = model.seq_length
    tokens, labels, positions, bounds = [], [], [], [0]
    for sample in samples:
        draw = torch.Generator().manual_seed(step * SAMPLES + sample)
        row = torch.randint(0, model.vocab_size, (length + 1,), generator=draw)
        cut = int(torch.randint(1, length, (), generator=draw)) if length > 1 else length
        kept = torch.rand(length, generator=draw) < 2 / 3
        tokens.append(row[:-1])
        labels.append(row[1:].where(kept, IGNORED_LABEL))
        positions.append(torch.cat([torch.arange(cut), torch.arange(length - cut)]))
        start = bounds[-1]
        bounds += [start + cut, start + length] if cut < length else [start + length]
    return {
        "tokens": torch.stack(tokens),
        "labels": torch.stack(labels),
        "positions": torch.stack(positions).to(torch.int32),
        "cu_seqlens": torch.tensor(bounds, dtype=torch.int32),
        "max_seqlen": length,
    }


class _SplitProduct(torch.autograd.Function):
    """x weight^T, where each sum, of the product and of both gradients, is taken in several parts and each part is rounded, as
    on ranks that share features, the vocabulary or tokens."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, parts: int) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.parts = parts
        return _in_parts(x, weight.t(), parts)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        x, weight = ctx.saved_tensors
        rows = grad.flatten(0, -2)
        return _in_parts(grad, weight, ctx.parts), _in_parts(rows.t(), x.flatten(0, -2), ctx.parts), None


def _in_parts(a: Tensor, b: Tensor, parts: int) -> Tensor:
    """a [..., n] times b [n, m], with the sum over n in `parts` parts."""
    width = -(-b.shape[0] // parts)
    pieces = zip(a.split(width, -1), b.split(width, 0), strict=True)
    return sum((left @ right for left, right in pieces), torch.zeros((), dtype=a.dtype, device=a.device))


class _SplitLinear(Linear):
    parts = 2

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = _SplitProduct.apply(x, self.weight, self.parts)
        return y if self.bias is None else y + self.bias


class _SplitHead(Head):
    parts = 2

    def forward(self, hidden: Tensor, *_: Any) -> Tensor:
        logits: Tensor = _SplitProduct.apply(hidden, self.weight, self.parts)
        return logits


def plain_run(config: RunConfig, batches: Batches, *, parts: int = 1, perturb: int | None = None) -> Trace:
    """One process without DeepSpeed: mean loss over the tokens of a step, global clipping, the run's optimizer and schedule.

    batches: the micro batches of a step, of all data-parallel ranks. In bf16 the optimizer keeps an fp32 master copy that
    starts from the bf16 weights; the trace has these master weights. Two ways to measure what rounding alone does: `parts` sums
    every product in that many parts; perturb, a seed, changes the initial master weights by up to 2^-9 of each (half a unit
    in the last place of bf16).
    """
    from megatronish.training.engine import build_optimizer

    ours, clip = config.megatronish, config.deepspeed.gradient_clipping
    model, master = _model_and_master(config, parts, perturb)
    optimizer = build_optimizer(parameter_groups(master, config.deepspeed.optimizer), config, torch.device("cpu"))
    pairs = list(zip(model.parameters(), master.parameters(), strict=True))
    losses, norms = [], []
    for step in range(ours.train.steps):
        for low, high in pairs:
            low.data.copy_(high.data)
            high.grad = torch.zeros_like(high)
        total, micro_batches = 0.0, batches(step)
        tokens = sum(int((batch["labels"] != IGNORED_LABEL).sum()) for batch in micro_batches)
        for batch in micro_batches:
            loss, _ = model.loss(**batch)
            model.zero_grad()
            # Scaled before, as by the engine: at the start all labels' logits have nearly the same gradient, which bf16
            # rounds to one side, so a scale that comes after moves the norm by up to 2e-3.
            (loss / tokens).backward()
            for low, high in pairs:
                assert low.grad is not None and high.grad is not None
                high.grad += low.grad.float()
            total += loss.item()
        losses.append(total / tokens)
        norm = torch.nn.utils.get_total_norm([high.grad for _, high in pairs if high.grad is not None])
        norms.append(norm.item())
        if clip:
            torch.nn.utils.clip_grads_with_norm_(master.parameters(), clip, norm)
        multiplier = learning_rate_multiplier(step, ours.train.steps, ours.schedule)
        for group in optimizer.param_groups:
            group["lr"] = group["base_lr"] * multiplier
        optimizer.step()
    return Trace(
        losses,
        norms,
        {name: p.detach() for name, p in master.named_parameters()},
    )


def _model_and_master(config: RunConfig, parts: int, perturb: int | None) -> tuple[Transformer, Transformer]:
    """The model in the run's dtype, with products in `parts`, and its fp32 master copy."""
    ours, dtype = config.megatronish, DTYPES[config.deepspeed.dtype]
    # "linear" is DeepSpeed's fused head and loss.
    head = "auto" if ours.kernels.cross_entropy == "linear" else ours.kernels.cross_entropy
    kernels = ours.kernels.model_copy(update={"cross_entropy": head})
    model = Transformer(ours.model, kernels, seed=ours.train.seed).to(dtype)
    master = Transformer(ours.model, kernels, seed=None)
    master.load_state_dict(model.state_dict())
    if perturb is not None:
        draw = torch.Generator().manual_seed(perturb)
        with torch.no_grad():
            for p in master.parameters():
                p.mul_(1 + 2**-9 * (2 * torch.rand(p.shape, generator=draw) - 1))
    for module in model.modules() if parts > 1 else ():
        for plain, split in ((Linear, _SplitLinear), (Head, _SplitHead)):
            if isinstance(module, plain):
                module.__class__ = split
                cast(_SplitLinear, module).parts = parts
    return model, master


class GradientCount:
    """Records the largest number of gradient bytes that a rank holds between micro batches, as a context manager.

    In a pipeline the count is taken after each gradient, too: the first stages run all forward passes before any gradient.
    Elsewhere DeepSpeed holds gradients at that moment that it is about to reduce.
    """

    def __init__(self, engine: Engine) -> None:
        self.most = 0
        self._engine = engine
        self._hooks: list[RemovableHandle] = []

    def __enter__(self) -> None:
        self._hooks.append(self._engine.module.register_forward_pre_hook(lambda *_: self._count()))
        for p in self._engine.module.parameters() if self._engine.mesh.pp.size > 1 else ():
            self._hooks.append(p.register_post_accumulate_grad_hook(lambda _: self._count()))

    def __exit__(self, *error: object) -> None:
        for hook in self._hooks:
            hook.remove()

    def _count(self) -> None:
        self.most = max(self.most, self._engine.local_optimizer_state().gradient_bytes())


def engine_run(
    config: RunConfig, data_size: int, batches: Callable[[int, int], list[Batch]], leg: Leg | None = None,
    *, count_bytes: bool = False,
) -> Trace:  # fmt: skip
    """The same steps, or those of a leg, through the engine on this rank; the process group exists.

    batches: the micro batches of (step, data-parallel rank); count_bytes: count what the rank holds, too. Weights are on the
    first rank only.
    """
    from megatronish.parallel.mesh import build_mesh
    from megatronish.training.engine import device, start_engine
    from megatronish.training.setup.construction import build_model
    from megatronish.training.step import to_device

    ours = config.megatronish
    leg = leg or Leg(0, ours.train.steps)
    plan = config.batch_plan(data_size)
    mesh = build_mesh(ours.parallel, device().type)
    engine = start_engine(build_model(config, plan, mesh), config, plan, mesh)
    if leg.load is not None:
        engine.load(leg.load, STATE)
    gradients = GradientCount(engine)
    losses, norms = [], []
    for step in range(leg.first, leg.stop):
        on_device = [to_device(batch, engine.device) for batch in batches(step, mesh.dp.rank)]
        with gradients if count_bytes and step + 1 == leg.stop else nullcontext():
            result = engine.train_step(on_device, learning_rate_multiplier(step, ours.train.steps, ours.schedule))
        mesh.data.sum_(result.loss_sum)
        losses.append((result.loss_sum / result.tokens).item())
        assert result.grad_norm is not None
        norms.append(float(result.grad_norm))
    if leg.save is not None:
        engine.save(leg.save, STATE)
    trace = Trace(losses, norms, {name: value.float().cpu().clone() for name, value in engine.weights().items()})
    if not count_bytes:
        return trace
    held = RankBytes(engine.weight_bytes(), gradients.most, engine.local_optimizer_state().optimizer_bytes())
    return replace(trace, held=held, formula=expected_bytes(config, mesh), slack=slack(config, mesh))


def layout_trace(rank: int, config: RunConfig, layout: ParallelLayout, leg: Leg | None) -> Trace:
    """`engine_run` of a layout over the samples of `make_batch`, with its bytes."""
    plan = config.batch_plan(layout.data)

    def batches(step: int, data_rank: int) -> list[Batch]:
        firsts = [(index * plan.data_size + data_rank) * plan.micro for index in range(plan.accumulation)]
        return [make_batch(config, step, range(first, first + plan.micro)) for first in firsts]

    return engine_run(config, layout.data, batches, leg, count_bytes=True)


def plain_trace(config: RunConfig, parts: int = 1) -> Trace:
    """`plain_run` over the samples of `make_batch`, with more micro batches where `parts` is a multiple of 2 or 4."""
    micro = SAMPLES // ACCUMULATION
    micro //= math.gcd(micro, parts)
    return plain_run(
        config,
        lambda step: [make_batch(config, step, range(first, first + micro)) for first in range(0, SAMPLES, micro)],
        parts=parts,
    )
