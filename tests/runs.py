"""Small runs for tests: a data set of bytes, a tiny model, a configuration, and the plain loop that an engine must equal."""

from __future__ import annotations

import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatronish.config.base import merge
from megatronish.config.run import RunConfig
from megatronish.data.loader import MicroBatchLoader
from megatronish.data.samples.dataset import open_dataset
from megatronish.data.samples.packing import PackedDataset
from megatronish.data.samples.sampler import MicroBatchSampler
from megatronish.data.samples.splits import split_documents
from megatronish.model.transformer import Transformer
from megatronish.parallel.mesh import build_mesh
from megatronish.preprocessing.preprocess import PreprocessOptions, preprocess
from megatronish.training.optimizers import build_torch_optimizer, parameter_groups
from megatronish.training.schedules import learning_rate_multiplier

WORDS = ["attention", "is", "all", "you", "need", "def", "return", "the", "layer", "norm", "of", "x", "(y)", "+", "\n"]
MODEL = {
    "vocab_size": 257,
    "num_layers": 2,
    "hidden_size": 32,
    "num_attention_heads": 4,
    "num_kv_heads": 2,
    "ffn_hidden_size": 48,
    "seq_length": 32,
    "tie_embeddings": True,
}


def make_dataset(folder: Path, documents: int = 60, seed: int = 0) -> str:
    """A byte-tokenised data set of random words in documents of uneven length; returns its prefix."""
    draw = random.Random(seed)
    texts = [" ".join(draw.choices(WORDS, k=draw.randint(3, 40))) for _ in range(documents)]
    source = folder / "text.txt"
    source.write_text("\f".join(texts), encoding="utf-8")
    options = PreprocessOptions(
        inputs=(str(source),),
        output_prefix=str(folder / "set"),
        tokenizer_model="bytes",
        append_eod=True,
        doc_separator="\f",
    )
    return preprocess(options, lambda line: None)[0].prefix


def small_run(data: str, save_dir: Path | str, changes: dict[str, Any] | None = None) -> RunConfig:
    """A run of 10 steps: micro batch 2, accumulation 2, clipping active, document mask (uneven micro batches)."""
    raw: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 2,
        "gradient_accumulation_steps": 2,
        "gradient_clipping": 0.5,
        "zero_optimization": {"stage": 1},
        "optimizer": {"type": "AdamW", "params": {"lr": 3e-3, "weight_decay": 0.1}},
        "megatronish": {
            "model": MODEL,
            "data": {"path": data, "document_mask": True, "validation_fraction": 0.1, "num_workers": 0},
            "schedule": {"type": "cosine", "warmup_steps": 3},
            "train": {"steps": 10, "save_dir": str(save_dir), "log_interval": 1, "eval_interval": 0},
            "log": {"tensorboard": False},
        },
    }
    return RunConfig.from_dict(merge(raw, changes or {}), "test")


@dataclass(frozen=True)
class Trace:
    """What a run did at each step."""

    losses: list[float]
    norms: list[float]
    weights: dict[str, Tensor]


def rank_loader(config: RunConfig, rank: int, data_size: int, consumed: int = 0) -> MicroBatchLoader:
    """The micro batches of one rank, as the training loop reads them."""
    ours, plan = config.megatronish, config.batch_plan(data_size)
    reader = open_dataset(ours.data.path).reader
    ids = split_documents(reader.num_documents, ours.data.validation_fraction).train
    packed = PackedDataset(reader, ids, ours.model.seq_length, ours.train.seed)
    sampler = MicroBatchSampler(consumed, plan.samples, plan.micro, rank, data_size)
    return MicroBatchLoader(packed, sampler, document_mask=ours.data.document_mask, prefetch=0)


def plain_loop(
    config: RunConfig, data_size: int, dtype: torch.dtype = torch.float32, perturb: int | None = None
) -> Trace:
    """One process, no DeepSpeed: the mean loss over all tokens of a step, global clipping, the run's optimizer.

    The samples are those of `data_size` ranks. In bf16 the optimizer keeps an fp32 master copy that starts from the bf16
    weights, as DeepSpeed's does; perturb: seed of a relative change of up to 2^-9 (half a bf16 step) of the initial
    master, to see how far rounding alone leads.
    """
    ours, clip = config.megatronish, config.deepspeed.gradient_clipping
    master = Transformer(ours.model, ours.kernels, seed=ours.train.seed).to(dtype).float()
    if perturb is not None:
        draw = torch.Generator().manual_seed(perturb)
        with torch.no_grad():
            for p in master.parameters():
                p.mul_(1 + 2**-9 * (2 * torch.rand(p.shape, generator=draw) - 1))
    model = Transformer(ours.model, ours.kernels, seed=ours.train.seed).to(dtype)
    optimizer = build_torch_optimizer(parameter_groups(master, config.deepspeed.optimizer), config.deepspeed.optimizer)
    loaders = [rank_loader(config, rank, data_size) for rank in range(data_size)]
    losses, norms = [], []
    for step in range(ours.train.steps):
        with torch.no_grad():
            for low, high in zip(model.parameters(), master.parameters(), strict=True):
                low.copy_(high)
                high.grad = torch.zeros_like(high)
        batches = [next(loader) for loader in loaders for _ in range(config.batch_plan(data_size).accumulation)]
        tokens = sum(int((batch["labels"] != -100).sum()) for batch in batches)
        total = 0.0
        for batch in batches:
            loss, _ = model.loss(**batch)
            model.zero_grad()
            (loss / tokens).backward()
            for low, high in zip(model.parameters(), master.parameters(), strict=True):
                high.grad += low.grad.float()
            total += loss.item()
        losses.append(total / tokens)
        norm = torch.nn.utils.get_total_norm([p.grad for p in master.parameters()])
        norms.append(norm.item())
        if clip:
            torch.nn.utils.clip_grads_with_norm_(master.parameters(), clip, norm)
        share = learning_rate_multiplier(step, ours.train.steps, ours.schedule)
        for group in optimizer.param_groups:
            group["lr"] = group["base_lr"] * share
        optimizer.step()
    return Trace(losses, norms, {name: p.detach().clone() for name, p in master.named_parameters()})


def engine_loop(rank: int, config: RunConfig, data_size: int) -> Trace:
    """The same steps through the engine, on rank `rank` of a layout with `data_size` data-parallel ranks (the process group exists)."""
    from megatronish.training.engine import start_engine
    from megatronish.training.loop import to_device
    from megatronish.training.setup.construction import build_model

    ours, plan = config.megatronish, config.batch_plan(data_size)
    mesh = build_mesh(ours.parallel, "cpu")
    engine = start_engine(build_model(config, plan, mesh), config, plan, mesh)
    loader = rank_loader(config, mesh.dp.rank, data_size)
    losses, norms = [], []
    for step in range(ours.train.steps):
        batches = [to_device(next(loader), engine.device) for _ in range(plan.accumulation)]
        result = engine.train_step(batches, learning_rate_multiplier(step, ours.train.steps, ours.schedule))
        mesh.data.sum_(result.loss_sum)
        losses.append((result.loss_sum / result.tokens).item())
        norms.append(float(result.grad_norm))
    return Trace(losses, norms, {name: value.cpu().clone() for name, value in engine.weights().items()})
