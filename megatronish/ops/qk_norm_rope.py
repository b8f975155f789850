"""QK-norm (Henry et al. 2020; per head as in Qwen3) and RoPE (Su et al. 2021) in one pass over the packed projection."""

from __future__ import annotations

import torch
from torch import Tensor

from megatronish.ops.dispatch import OpsBackend, check_floating
from megatronish.ops.extension import FusedQKNormRope, run
from megatronish.ops.rms_norm import rms_norm
from megatronish.ops.rope import check_rotation, rope

MAX_FUSED_HEAD_DIM = 1024  # kMaxNormedHeadDim of csrc/kernels.h


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
    backend: OpsBackend = "reference",
) -> tuple[Tensor, Tensor, Tensor]:
    """q, k and v [b, s, heads, d] of a packed qkv [b, s, all heads, d]: q and k normalised per head by RMSNorm, then rotated; v unchanged.

    heads: groups, and the q, k and v heads of each group, in this order: (1, h, g, g) is [q; k; v], (g, h / g, 1, 1)
    Megatron's layout. q_weight, k_weight: [d], in qkv's dtype or fp32. cos, sin, positions, offset and interleaved are those
    of `ops.rope.rope`. The fused kernel rounds once, the composition of `rms_norm` and `rope` twice; v is a view of qkv
    (where its heads are not one view, a copy). Raises ValueError for heads that do not add up, for weights that do not
    match, and for arguments that `rope` rejects.
    """
    _check(qkv, q_weight, k_weight, cos, sin, positions, heads, offset)
    if backend == "fused" and qkv.shape[3] <= MAX_FUSED_HEAD_DIM:
        if positions is not None:
            positions = positions.to(torch.int32)
        q, k, v = run(
            FusedQKNormRope, qkv, q_weight, k_weight, cos, sin, positions, offset, heads, eps, 0.0, interleaved
        )
        return q, k, v
    groups, *counts = heads
    q, k, v = (part.flatten(2, 3) for part in qkv.unflatten(2, (groups, sum(counts))).split(counts, dim=3))
    q, k = (
        rope(
            rms_norm(x, weight, eps, backend=backend),
            cos,
            sin,
            positions,
            offset=offset,
            interleaved=interleaved,
            backend=backend,
        )
        for x, weight in ((q, q_weight), (k, k_weight))
    )
    return q, k, v


def _check(
    qkv: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor | None,
    heads: tuple[int, int, int, int],
    offset: int,
) -> None:
    check_floating("qk_norm_rope", "qkv", qkv)
    if qkv.ndim != 4:
        raise ValueError(f"qk_norm_rope: qkv has shape {tuple(qkv.shape)}, expected [batch, seq, heads, head_dim]")
    if len(heads) != 4 or min(heads) < 0 or heads[0] * sum(heads[1:]) != qkv.shape[2]:
        raise ValueError(
            f"qk_norm_rope: qkv has {qkv.shape[2]} heads, expected groups * (q + k + v) of heads {tuple(heads)}"
        )
    for name, weight in (("q_weight", q_weight), ("k_weight", k_weight)):
        if weight.shape != qkv.shape[3:] or weight.dtype not in (qkv.dtype, torch.float32):
            raise ValueError(
                f"qk_norm_rope: {name} is {weight.dtype} of shape {tuple(weight.shape)}, expected {qkv.dtype} or "
                f"torch.float32 of shape ({qkv.shape[3]},)"
            )
    if q_weight.dtype != k_weight.dtype:
        raise ValueError(f"qk_norm_rope: k_weight is {k_weight.dtype}, expected {q_weight.dtype}, as q_weight")
    check_rotation("qk_norm_rope", qkv, cos, sin, positions, offset)
