"""The same steps twice: by a plain loop in one process, and by the engine on the ranks of a layout."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import tempfile
import time
import traceback
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
from megatronish.errors import UserError
from megatronish.launch.process import free_port, has_gpu
from megatronish.model.linear import Linear
from megatronish.model.transformer import IGNORED_LABEL, Head, Transformer
from megatronish.training.optimizers import build_torch_optimizer, parameter_groups
from megatronish.verify.layouts import ACCUMULATION, SAMPLES, Layout
from megatronish.verify.tracked_memory import RankBytes, expected_bytes, slack

if TYPE_CHECKING:
    from megatronish.training.engine import Engine

TIMEOUT_SECONDS = 300.0
STATE = "state"  # folder of the engine's state within that of a leg
Batch = dict[str, Any]


@dataclass(frozen=True)
class Trace:
    """What a run did: loss and gradient norm of each step, the weights after the last, and what a rank held of it (counted,
    by formula, and how far above that it may be)."""

    losses: list[float]
    norms: list[float]
    weights: dict[str, Tensor]
    held: RankBytes | None = None
    formula: RankBytes | None = None
    slack: RankBytes | None = None

    def after(self, step: int) -> Trace:
        """Without the first `step` steps."""
        return replace(self, losses=self.losses[step:], norms=self.norms[step:])


@dataclass(frozen=True)
class Leg:
    """Steps [first, stop) of a run, from the engine's state in `load` and then into that in `save`, where they are given."""

    first: int
    stop: int
    load: Path | None = None
    save: Path | None = None


def make_batch(config: RunConfig, step: int, samples: range) -> Batch:
    """The numbered samples of a step: random tokens in documents of uneven length, a third of the labels left out."""
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
    """x weight^T with every sum, of the product and of both its gradients, taken in several parts, each of them rounded: so
    do ranks that share features, vocabulary or tokens."""

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
    """a [..., n] b [n, m], the sum over n in as many parts."""
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


def plain_run(config: RunConfig, *, parts: int = 1) -> Trace:
    """One process without DeepSpeed: mean loss over the tokens of a step, global clipping, the run's optimizer.

    In bf16 the optimizer keeps an fp32 master copy that starts from the bf16 weights. parts, 2 or 4: products are summed in
    as many parts and gradients over as many times more micro batches: the same arithmetic with other roundings.
    """
    ours, clip = config.megatronish, config.deepspeed.gradient_clipping
    dtype = torch.bfloat16 if config.deepspeed.dtype == "bf16" else torch.float32
    with_logits = (
        ours.kernels.cross_entropy if ours.kernels.cross_entropy != "linear" else "auto"
    )  # that is DeepSpeed's
    kernels = ours.kernels.model_copy(update={"cross_entropy": with_logits})
    model = Transformer(ours.model, kernels, seed=ours.train.seed).to(dtype)
    master = Transformer(ours.model, kernels, seed=None)
    master.load_state_dict(model.state_dict())
    for module in model.modules() if parts > 1 else ():
        for plain, split in ((Linear, _SplitLinear), (Head, _SplitHead)):
            if isinstance(module, plain):
                module.__class__ = split
                cast(_SplitLinear, module).parts = parts
    optimizer = build_torch_optimizer(parameter_groups(master, config.deepspeed.optimizer), config.deepspeed.optimizer)
    micro = SAMPLES // ACCUMULATION // parts
    pairs = list(zip(model.parameters(), master.parameters(), strict=True))
    losses, norms = [], []
    for step in range(ours.train.steps):
        for low, high in pairs:
            low.data.copy_(high.data)
            high.grad = torch.zeros_like(high)
        total = 0.0
        tokens = int((make_batch(config, step, range(SAMPLES))["labels"] != IGNORED_LABEL).sum())
        for first in range(0, SAMPLES, micro):
            loss, _ = model.loss(**make_batch(config, step, range(first, first + micro)))
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
        optimizer.step()
    weights = {name: p.detach().to(dtype).float() for name, p in master.named_parameters()}
    return Trace(losses, norms, weights)


class GradientCount:
    """The most bytes of gradients that a rank holds between micro batches while this is entered.

    A pipeline's first stages run all micro batches forward before the first gradient, so there every gradient is a time to
    count; elsewhere DeepSpeed still holds those that it is about to reduce then.
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


def layout_trace(config: RunConfig, layout: Layout, leg: Leg | None = None) -> Trace:
    """The same steps, or those of a leg, through the engine on this rank of the layout. The process group exists.

    Weights are on the first rank only.
    """
    from megatronish.parallel.mesh import build_mesh
    from megatronish.training.engine import device, start_engine
    from megatronish.training.loop import to_device
    from megatronish.training.setup.construction import build_model

    leg = leg or Leg(0, config.megatronish.train.steps)
    plan = config.batch_plan(layout.data)
    mesh = build_mesh(config.megatronish.parallel, device().type)
    engine = start_engine(build_model(config, plan, mesh), config, plan, mesh)
    if leg.load is not None:
        engine.load(leg.load, STATE)
    gradients = GradientCount(engine)
    losses, norms = [], []
    for step in range(leg.first, leg.stop):
        batches = []
        for index in range(plan.accumulation):
            first = (index * plan.data_size + mesh.dp.rank) * plan.micro
            batches.append(to_device(make_batch(config, step, range(first, first + plan.micro)), engine.device))
        with gradients if step + 1 == leg.stop else nullcontext():
            result = engine.train_step(batches, 1.0)
        mesh.data.sum_(result.loss_sum)
        losses.append((result.loss_sum / result.tokens).item())
        assert result.grad_norm is not None
        norms.append(float(result.grad_norm))
    if leg.save is not None:
        engine.save(leg.save, STATE)
    held = RankBytes(engine.weight_bytes(), gradients.most, engine.local_optimizer_state().optimizer_bytes())
    weights = {name: value.float().cpu() for name, value in engine.weights().items()}
    return Trace(losses, norms, weights, held, expected_bytes(config, mesh), slack(config, mesh))


def run_ranks(world: int, function: Callable[..., Any], *arguments: Any) -> list[Any]:
    """`function(*arguments)` on each of `world` processes of this machine that share a process group; results by rank.

    Forked where there is no GPU, which saves importing torch again. Raises UserError with the first rank's traceback when
    one fails, or when they take longer than TIMEOUT_SECONDS.
    """
    context: Any = multiprocessing.get_context("spawn" if has_gpu() else "fork")
    port = free_port()
    with tempfile.TemporaryDirectory() as folder:
        ranks = [
            context.Process(target=_rank_main, args=(rank, world, port, folder, function, arguments), daemon=True)
            for rank in range(world)
        ]
        for process in ranks:
            process.start()
        deadline = time.monotonic() + TIMEOUT_SECONDS
        while any(process.is_alive() for process in ranks):
            if any(process.exitcode for process in ranks) or time.monotonic() > deadline:
                break
            time.sleep(0.02)
        hung = [rank for rank, process in enumerate(ranks) if process.is_alive()]
        ended = {rank: -process.exitcode for rank, process in enumerate(ranks) if (process.exitcode or 0) < 0}
        for process in ranks:
            process.kill()
            process.join()
        errors = sorted(Path(folder).glob("*.error"))
        if errors:
            raise UserError(f"rank {errors[0].stem} failed:\n{errors[0].read_text()}")
        if ended:
            told = ", ".join(f"rank {rank} by signal {number}" for rank, number in ended.items())
            raise UserError(f"processes were ended: {told}. Signal 9 may be this machine's want of memory.")
        if hung:
            raise UserError(
                f"ranks {hung} still ran after {TIMEOUT_SECONDS:.0f} s; the others had ended or waited too."
            )
        return [pickle.loads((Path(folder) / f"{rank}.result").read_bytes()) for rank in range(world)]


def _rank_main(
    rank: int, world: int, port: int, folder: str, function: Callable[..., Any], arguments: tuple[Any, ...]
) -> None:
    """One rank: its result, or its traceback, goes into a file."""
    os.environ.update(
        RANK=str(rank), WORLD_SIZE=str(world), LOCAL_RANK=str(rank), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port)
    )
    log = os.open(Path(folder) / f"{rank}.log", os.O_CREAT | os.O_WRONLY)
    os.dup2(log, 1)  # DeepSpeed's remarks on memory and missing libraries are no part of the table
    os.dup2(log, 2)
    try:
        from megatronish.training.engine import start_process_group, stop_process_group

        torch.set_num_threads(1)
        start_process_group(timeout_minutes=TIMEOUT_SECONDS / 60)
        result = function(*arguments)
        (Path(folder) / f"{rank}.result").write_bytes(pickle.dumps(result))
        stop_process_group()
    except BaseException:
        (Path(folder) / f"{rank}.error").write_text(traceback.format_exc())
        os._exit(1)
