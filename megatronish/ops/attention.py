"""Causal grouped-query attention with one entry point: SDPA or our kernel on CPUs, flash-attn, or the explicit reference."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from megatronish.ops import attention_cpu, reference
from megatronish.ops.attention_mask import attention_mask
from megatronish.ops.dispatch import AttentionBackend


def needs_mask(queries: int, keys: int, window: int | None, cu_seqlens: Tensor | None) -> bool:
    """Whether SDPA needs an explicit mask: not for plain causal attention, nor for one query that reads every key."""
    if cu_seqlens is not None or (window is not None and window < keys):
        return True
    return queries != keys and queries != 1


def uses_flash(backend: AttentionBackend, like: Tensor, head_dim: int) -> bool:
    """Whether `backend` computes attention of tensors like this one (its dtype and device) by flash-attn."""
    if backend.startswith("flash") and backend.endswith("_or_sdpa"):
        return like.is_cuda and like.dtype in (torch.float16, torch.bfloat16) and head_dim <= 256
    return backend.startswith("flash")


def makes_no_mask(
    backend: AttentionBackend,
    like: Tensor,
    batch: int,
    queries: int,
    keys: int,
    kv_heads: int,
    head_dim: int,
    dropout_p: float,
) -> bool:
    """Whether `attention` of these sizes, in the dtype and on the device of `like`, needs no mask."""
    if uses_flash(backend, like, head_dim):
        return True
    sizes = (batch, queries, keys, kv_heads, head_dim)
    return backend.endswith("_or_sdpa") and attention_cpu.takes_shape(like, *sizes, dropout_p)


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    backend: AttentionBackend,
    window: int | None = None,
    cu_seqlens: Tensor | None = None,
    max_seqlen: int | None = None,
    dropout_p: float = 0.0,
    scale: float | None = None,
    mask: Tensor | None = None,
) -> Tensor:
    """Causal attention of q [b, queries, h, d] over k, v [b, keys, kv_heads, d]; returns [b, queries, h, d].

    The last query is aligned with the last key (queries <= keys, as with a key/value cache). window: a query reads itself
    and window - 1 earlier keys. cu_seqlens: int32 [documents + 1] over the flattened b * queries tokens, including the end
    of every row; attention stays inside a document; max_seqlen is the longest one (used by flash-attn, b * queries by
    default). scale: 1 / sqrt(d) by default. mask: `attention_mask` of the same arguments, computed once for several layers;
    computed here where needed and not given ("sdpa" and "reference" accept any mask). "sdpa" is torch's; backends that end
    in "_or_sdpa" use our kernel for CPU tensors that it computes faster and at least as accurately (ops/attention_cpu.py).
    Raises ValueError if the shapes do not match, or if flash-attn is forced for tensors that it does not support.
    """
    _check_shapes(q, k, v)
    if uses_flash(backend, q, q.shape[3]):
        return _flash(q, k, v, window, cu_seqlens, max_seqlen, dropout_p, scale, version_3=backend.startswith("flash3"))
    if backend == "reference":
        return reference.attention(
            q, k, v, window=window, cu_seqlens=cu_seqlens, dropout_p=dropout_p, scale=scale, mask=mask
        )
    queries, keys = q.shape[1], k.shape[1]
    if backend != "sdpa" and attention_cpu.takes(q, k, dropout_p, scale):
        first_key = attention_cpu.first_keys(q.shape[0], queries, window, cu_seqlens)
        scale = 1.0 / math.sqrt(q.shape[3]) if scale is None else scale
        result: Tensor = attention_cpu.FusedCausalAttention.apply(q, k, v, first_key, scale)
        return result
    if mask is None and needs_mask(queries, keys, window, cu_seqlens):
        mask = attention_mask(q.shape[0], queries, keys, window=window, cu_seqlens=cu_seqlens, device=q.device)
    out = F.scaled_dot_product_attention(
        q.transpose(1, 2),
        k.transpose(1, 2),
        v.transpose(1, 2),
        attn_mask=mask,
        dropout_p=dropout_p,
        is_causal=mask is None and queries > 1,
        scale=scale,
        enable_gqa=q.shape[2] != k.shape[2],
    )
    return out.transpose(1, 2)


def _check_shapes(q: Tensor, k: Tensor, v: Tensor) -> None:
    if k.shape != v.shape or q.shape[0] != k.shape[0] or q.shape[3] != k.shape[3]:
        raise ValueError(
            f"attention: q {tuple(q.shape)}, k {tuple(k.shape)} and v {tuple(v.shape)} must be [batch, queries, heads, "
            "head_dim] and twice [batch, keys, kv_heads, head_dim]"
        )
    if q.shape[2] % k.shape[2] != 0 or q.shape[1] > k.shape[1]:
        raise ValueError(
            f"attention: q {tuple(q.shape)} needs a multiple of k's {k.shape[2]} heads and at most its {k.shape[1]} tokens"
        )


def _flash(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    window: int | None,
    cu_seqlens: Tensor | None,
    max_seqlen: int | None,
    dropout_p: float,
    scale: float | None,
    *,
    version_3: bool,
) -> Tensor:
    """flash-attn 2 or 3 (Dao 2023; Shah et al. 2024). Its causal mask is aligned at the last key, as ours."""
    if not q.is_cuda or q.dtype not in (torch.float16, torch.bfloat16):
        raise ValueError(
            f"attention backend 'flash' takes fp16 and bf16 tensors on a GPU, got {q.dtype} on {q.device}: train in bf16, "
            "or set attention to 'auto' or 'sdpa'"
        )
    options: dict[str, object] = {
        "softmax_scale": 1.0 / math.sqrt(q.shape[3]) if scale is None else scale,
        "causal": True,
        "window_size": (-1, -1) if window is None else (window - 1, 0),
    }
    if version_3:
        if dropout_p > 0:
            raise ValueError("flash-attn 3 has no dropout: set attention_dropout to 0, or attention to 'sdpa'")
        from flash_attn_interface import flash_attn_func, flash_attn_varlen_func
    else:
        options["dropout_p"] = dropout_p
        from flash_attn import flash_attn_func, flash_attn_varlen_func
    if cu_seqlens is None:
        out = flash_attn_func(q, k, v, **options)
    else:
        longest = q.shape[0] * q.shape[1] if max_seqlen is None else max_seqlen
        flat = (x.flatten(0, 1) for x in (q, k, v))
        out = flash_attn_varlen_func(*flat, cu_seqlens, cu_seqlens, longest, longest, **options)
    if isinstance(out, tuple):  # the first releases of version 3 also give the log-sum-exp
        out = out[0]
    return out.view(q.shape)
