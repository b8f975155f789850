"""Causal attention by the CPU kernel of csrc/cpu/attention.cpp, a backend of ops/attention.py.

torch's SDPA reaches a tenth of the bf16 peak of the CPUs measured (docs/benchmarks.md). The kernel computes in blocks that
stay in the cache, with an online softmax as in FlashAttention-2 (Dao 2023), skips keys above the diagonal, before a window or
in another document, and accumulates in fp32.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatronish.ops.attention_mask import document_ids
from megatronish.ops.extension import EXTENSION

# A block of the kernel; with fewer tokens the padding costs more than SDPA does.
MIN_TOKENS = 64
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def takes(q: Tensor, k: Tensor, dropout_p: float, scale: float | None) -> bool:
    """Whether the kernel computes attention of q [b, s, h, d] over k [b, keys, g, d], and is faster at it than SDPA.

    It works on one key/value head of one row a thread, so that with fewer of these than threads SDPA keeps more cores busy.
    Without AVX2 it is slower than SDPA.
    """
    b, s, _, d = q.shape
    return (scale is None or scale > 0) and takes_shape(q, b, s, k.shape[1], k.shape[2], d, dropout_p)


def takes_shape(
    like: Tensor, batch: int, queries: int, keys: int, kv_heads: int, head_dim: int, dropout_p: float
) -> bool:
    """`takes` for tensors of these sizes, of the dtype and device of `like`."""
    return (
        EXTENSION.cpu
        and _has_vectors()
        and like.device.type == "cpu"
        and like.dtype in _DTYPES
        and MIN_TOKENS <= queries == keys
        and head_dim % 32 == 0
        and dropout_p == 0.0
        and batch * kv_heads >= _threads()
    )


@torch.compiler.assume_constant_result
def _threads() -> int:
    return torch.get_num_threads()


@torch.compiler.assume_constant_result
def _has_vectors() -> bool:
    return torch.backends.cpu.get_cpu_capability().startswith("AVX")


def first_keys(batch: int, seq: int, window: int | None, cu_seqlens: Tensor | None) -> Tensor | None:
    """int32 [batch, seq]: the first key in its row that each query may read; None where that is 0 for all.

    window, cu_seqlens: as in ops/attention.py.
    """
    if cu_seqlens is None and (window is None or window >= seq):
        return None
    position = torch.arange(seq, dtype=torch.int32).expand(batch, seq)
    first = torch.zeros_like(position)
    if window is not None:
        first = (position - (window - 1)).clamp_(min=0)
    if cu_seqlens is not None:
        starts = cu_seqlens[document_ids(cu_seqlens, batch * seq)].view(batch, seq)
        row = seq * torch.arange(batch, dtype=torch.int32).unsqueeze(1)
        first = torch.maximum(first, (starts - row).to(torch.int32))
    return first.contiguous()


class FusedCausalAttention(torch.autograd.Function):
    """Keeps q, k, v, the output and one number a query; the probabilities are computed again in the backward pass."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, first_key: Tensor | None, scale: float) -> Tensor:
        out, log2_sum = torch.ops.megatronish.causal_attention_fwd(q, k, v, first_key, scale)
        ctx.save_for_backward(q, k, v, out, log2_sum, first_key)
        ctx.scale = scale
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, log2_sum, first_key = ctx.saved_tensors
        dq, dk, dv = torch.ops.megatronish.causal_attention_bwd(dout, q, k, v, out, log2_sum, first_key, ctx.scale)
        return dq, dk, dv, None, None


def _register_fakes() -> None:
    """Shapes and dtypes of the results, for torch.compile and the meta device."""

    def causal_attention_fwd(
        q: Tensor, k: Tensor, v: Tensor, first_key: Tensor | None, scale: float
    ) -> tuple[Tensor, Tensor]:
        b, s, h, _ = q.shape
        return q.new_empty(q.shape), q.new_empty((b, h, s), dtype=torch.float32)

    def causal_attention_bwd(dout: Tensor, q: Tensor, k: Tensor, v: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
        return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)

    for fake in (causal_attention_fwd, causal_attention_bwd):
        torch.library.register_fake(f"megatronish::{fake.__name__}", fake)


if EXTENSION.cpu:
    _register_fakes()
