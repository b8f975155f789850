"""Small runs for tests: a data set of bytes, a tiny model, a configuration, and the plain loop that an engine must equal."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

from megatronish.config.base import merge
from megatronish.config.run import RunConfig
from megatronish.data.loader import MicroBatchLoader
from megatronish.data.samples.dataset import open_dataset
from megatronish.data.samples.packing import PackedDataset
from megatronish.data.samples.sampler import MicroBatchSampler
from megatronish.data.samples.splits import split_documents
from megatronish.preprocessing.preprocess import PreprocessOptions, preprocess
from megatronish.verify.runs import Batch, Trace, engine_run, plain_run

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


def rank_loader(config: RunConfig, rank: int, data_size: int, consumed: int = 0) -> MicroBatchLoader:
    """The micro batches of one rank, as the training loop reads them."""
    ours, plan = config.megatronish, config.batch_plan(data_size)
    reader = open_dataset(ours.data.path).reader
    ids = split_documents(reader.num_documents, ours.data.validation_fraction).train
    packed = PackedDataset(reader, ids, ours.model.seq_length, ours.train.seed)
    sampler = MicroBatchSampler(consumed, plan.samples, plan.micro, rank, data_size)
    return MicroBatchLoader(packed, sampler, document_mask=ours.data.document_mask, prefetch=0)


def loader_batches(config: RunConfig, data_size: int) -> Callable[[int, int], list[Batch]]:
    """The micro batches of (step, data-parallel rank), steps in order, as the training loop reads them."""
    loaders: dict[int, MicroBatchLoader] = {}

    def batches(step: int, rank: int) -> list[Batch]:
        if rank not in loaders:
            loaders[rank] = rank_loader(config, rank, data_size)
        return [next(loaders[rank]) for _ in range(config.batch_plan(data_size).accumulation)]

    return batches


def plain_loop(config: RunConfig, data_size: int, *, parts: int = 1, perturb: int | None = None) -> Trace:
    """`plain_run` over the samples of `data_size` ranks."""
    batches = loader_batches(config, data_size)
    return plain_run(
        config,
        lambda step: [batch for rank in range(data_size) for batch in batches(step, rank)],
        parts=parts,
        perturb=perturb,
    )


def engine_loop(rank: int, config: RunConfig, data_size: int) -> Trace:
    """The same steps through the engine, on rank `rank` of a layout with `data_size` data-parallel ranks."""
    return engine_run(config, data_size, loader_batches(config, data_size))
