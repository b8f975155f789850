"""Every operator in plain torch, computed in fp32 or wider and rounded once: what the fast ones are held against.

Shapes: b batch, s sequence, h heads, d head_dim, F feed-forward width, V vocabulary, T tokens.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from megatronish.ops.attention_mask import attention_mask


def _widen(x: Tensor) -> Tensor:
    """`x` in fp32; float64 stays as it is."""
    return x if x.dtype == torch.float64 else x.float()


def rms_norm(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight over the last dim."""
    wide = _widen(x)
    y = wide * torch.rsqrt(wide.square().mean(dim=-1, keepdim=True) + eps)
    if weight is not None:
        y = y * _widen(weight)
    return y.to(x.dtype)


def swiglu(gate_up: Tensor) -> Tensor:
    """silu(gate) * up, [..., 2F] -> [..., F]."""
    gate, up = _widen(gate_up).chunk(2, dim=-1)
    return (F.silu(gate) * up).to(gate_up.dtype)


def geglu(gate_up: Tensor, form: str = "none") -> Tensor:
    """gelu(gate) * up with GELU in its erf form ("none") or its tanh approximation ("tanh"), [..., 2F] -> [..., F]."""
    gate, up = _widen(gate_up).chunk(2, dim=-1)
    return (F.gelu(gate, approximate=form) * up).to(gate_up.dtype)


def rope(
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor | None = None,
    *,
    offset: int = 0,
    interleaved: bool = False,
) -> Tensor:
    """Rotate the leading 2 * cos.shape[-1] channels of x [b, s, h, d]; see ops/rope.py."""
    half = cos.shape[-1]
    if positions is None:
        positions = torch.arange(offset, offset + x.shape[1], device=x.device).expand(x.shape[0], -1)
    c, s = cos[positions][:, :, None, :], sin[positions][:, :, None, :]  # [b, s, 1, half]
    rotated, rest = _widen(x[..., : 2 * half]), x[..., 2 * half :]
    a, b = (rotated[..., 0::2], rotated[..., 1::2]) if interleaved else rotated.chunk(2, dim=-1)
    pair = (a * c - b * s, b * c + a * s)
    turned = torch.stack(pair, dim=-1).flatten(-2) if interleaved else torch.cat(pair, dim=-1)
    return torch.cat((turned.to(x.dtype), rest), dim=-1)


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    window: int | None = None,
    cu_seqlens: Tensor | None = None,
    dropout_p: float = 0.0,
    scale: float | None = None,
    mask: Tensor | None = None,
) -> Tensor:
    """softmax(q k^T * scale + mask) v with explicit fp32 probabilities; see ops/attention.py."""
    b, queries, heads, d = q.shape
    keys, groups = k.shape[1], heads // k.shape[2]
    if mask is None:
        mask = attention_mask(b, queries, keys, window=window, cu_seqlens=cu_seqlens, device=q.device)
    q_bhsd = _widen(q).transpose(1, 2)
    k_bhsd = _widen(k).repeat_interleave(groups, dim=2).transpose(1, 2)
    v_bhsd = _widen(v).repeat_interleave(groups, dim=2).transpose(1, 2)
    scores = q_bhsd @ k_bhsd.transpose(-1, -2) * (1.0 / math.sqrt(d) if scale is None else scale)
    probabilities = torch.softmax(scores.masked_fill(~mask, float("-inf")), dim=-1)
    probabilities = F.dropout(probabilities, dropout_p, training=dropout_p > 0)
    return (probabilities @ v_bhsd).transpose(1, 2).to(q.dtype)


def qk_norm_rope(
    qkv: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor | None = None,
    *,
    heads: tuple[int, int, int, int],
    eps: float,
    offset: int = 0,
    interleaved: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """q, k and v of a packed projection, q and k normalised and rotated with one rounding; see ops/qk_norm_rope.py."""
    groups, *counts = heads
    q, k, v = (part.flatten(2, 3) for part in qkv.unflatten(2, (groups, sum(counts))).split(counts, dim=3))
    q, k = (
        rope(rms_norm(_widen(x), weight, eps), cos, sin, positions, offset=offset, interleaved=interleaved).to(x.dtype)
        for x, weight in ((q, q_weight), (k, k_weight))
    )
    return q, k, v


def token_losses(logits: Tensor, labels: Tensor, ignore_index: int = -100) -> Tensor:
    """-log softmax(logits)[label] of every token in fp32 or wider, 0 where the label is ignore_index."""
    flat = F.cross_entropy(_widen(logits).flatten(0, -2), labels.flatten(), ignore_index=ignore_index, reduction="none")
    return flat.view(labels.shape)


def cross_entropy(logits: Tensor, labels: Tensor, ignore_index: int = -100) -> Tensor:
    """The sum of `token_losses`."""
    return token_losses(logits, labels, ignore_index).sum()
