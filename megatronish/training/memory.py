"""Making a run fit the memory of the machine without changing what it computes."""

from __future__ import annotations

from dataclasses import replace

import psutil

from megatronish.config.model import ModelConfig
from megatronish.config.run import BatchPlan

ITEM_BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}
CPU_SHARE = 0.4  # of host memory, for the activations of all ranks


def activation_bytes_per_token(model: ModelConfig, dtype: str, checkpointing: str) -> int:
    """Rough bytes of activations kept for backward per token of a micro batch, logits included.

    Counts the inputs of each matrix product, norm and activation of a block (Korthikanti et al. 2022, table 1, without
    attention scores, which fused attention does not keep), or one block input under full checkpointing.
    """
    size = ITEM_BYTES[dtype]
    block = 8 * model.hidden_size + 4 * model.ffn_hidden_size
    kept = {"none": block, "selective": block // 2, "full": model.hidden_size}[checkpointing]
    logits = model.vocab_size * (size + 2 * 4)
    return model.num_layers * kept * size + block * size + logits


def fit_micro_batch(plan: BatchPlan, bytes_per_sample: int, budget_bytes: float) -> BatchPlan:
    """The same samples a step in micro batches small enough for the budget: a smaller micro, more accumulation."""
    micro = plan.micro
    while micro > 1 and micro * bytes_per_sample > budget_bytes:
        micro = max(part for part in range(1, micro) if plan.micro % part == 0)
    return replace(plan, micro=micro, accumulation=plan.accumulation * (plan.micro // micro))


def fit_to_host(plan: BatchPlan, model: ModelConfig, dtype: str, checkpointing: str, local_ranks: int) -> BatchPlan:
    """`fit_micro_batch` for CPU ranks: depends on the machine's memory alone, so that a resumed run gets the same plan."""
    budget = CPU_SHARE * psutil.virtual_memory().total / local_ranks
    return fit_micro_batch(plan, activation_bytes_per_token(model, dtype, checkpointing) * model.seq_length, budget)
