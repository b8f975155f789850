"""How training stacks implement the same layout: which collectives, what they overlap with, which kernels."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Stack:
    """What differs between stacks. Nothing here is fitted.

    shards_gradients: ZeRO 1 and 2 reduce-scatter gradients (else they all-reduce them and keep their part).
    reduces_each_micro_batch: ZeRO-2 does so for every micro batch (else once per step).
    gradient_bytes: of a gradient element on the wire. hides_data: gradient reduction runs under the backward pass;
    hides_gather: so does the gathering of updated weights under the next forward pass. hides_tensor: which collectives of
    tensor parallelism overlap with matrix products: none, those of column-parallel layers in the backward pass, or all, in
    chunks with the product that they feed or follow. divides_messages: stages send each tensor-parallel rank a part.
    hides_messages: stages compute while they send. fused_attention: scores never reach memory.
    reduces_in_pipeline_gaps: with stages, gradients are still reduced under the last backward pass.
    recomputed_products: share of matrix products that selective recomputation repeats.
    """

    name: str
    shards_gradients: bool
    reduces_each_micro_batch: bool
    gradient_bytes: int
    hides_data: bool
    hides_gather: bool
    hides_tensor: Literal["none", "backward", "all"]
    divides_messages: bool
    hides_messages: bool
    reduces_in_pipeline_gaps: bool
    fused_attention: bool = True
    recomputed_products: float = 0.0


# DeepSpeed 0.19.8 as `training.engine` drives it; every count is checked by tests/planning/test_counted_traffic.py.
MEGATRONISH = Stack(
    "megatronish",
    shards_gradients=False,
    reduces_each_micro_batch=True,
    gradient_bytes=2,
    hides_data=True,
    hides_gather=False,
    hides_tensor="backward",
    divides_messages=False,
    hides_messages=False,
    reduces_in_pipeline_gaps=False,
)
# Narayanan et al. 2021: no ZeRO, fp16 gradients, scores in memory, stages send scattered activations (section 4.1).
MEGATRON_2021 = Stack(
    "Megatron-LM 2021",
    shards_gradients=False,
    reduces_each_micro_batch=False,
    gradient_bytes=2,
    hides_data=False,
    hides_gather=False,
    hides_tensor="none",
    divides_messages=True,
    hides_messages=False,
    reduces_in_pipeline_gaps=False,
    fused_attention=False,
)
# Megatron-Core with the switches its README names: --overlap-grad-reduce --overlap-param-gather --tp-comm-overlap.
MEGATRON_CORE = Stack(
    "Megatron-Core 0.8",
    shards_gradients=True,
    reduces_each_micro_batch=False,
    gradient_bytes=4,
    hides_data=True,
    hides_gather=True,
    hides_tensor="all",
    divides_messages=True,
    hides_messages=True,
    reduces_in_pipeline_gaps=True,
)
# FSDP2: gradients reduce-scattered in fp32; every other matrix product recomputed under "selective op".
TORCHTITAN = Stack(
    "torchtitan",
    shards_gradients=True,
    reduces_each_micro_batch=True,
    gradient_bytes=4,
    hides_data=True,
    hides_gather=True,
    hides_tensor="none",
    divides_messages=False,
    hides_messages=False,
    reduces_in_pipeline_gaps=False,
    recomputed_products=0.5,
)
