"""Third-party kernels as backends of our operators: Liger's (Triton) and NVIDIA Apex's (CUDA). Neither is required.

The calls follow their sources (liger-kernel 0.8.5, Apex of 2025) and never overwrite an argument or a gradient of the caller.
Tensors that they do not support are computed by plain torch: see `liger_takes`, `apex_takes`.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import inspect
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

LIGER_MAX_WIDTH = 65536  # its kernels hold one row per block
LIGER_FIX = "`pip install -U liger-kernel`"
APEX_FIX = "build it from https://github.com/NVIDIA/apex with its CUDA extensions (`apex` on the package index is another project)"
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


# ---- Availability: "" where a library can be used, else the problem and its fix.


def liger_problem() -> str:
    """Why Liger's kernels cannot be used on this machine, or ""."""
    if not torch.cuda.is_available():
        return "there is no CUDA GPU"
    needed = {
        "rms_norm": "LigerRMSNormFunction",
        "fused_add_rms_norm": "LigerFusedAddRMSNormFunction",
        "swiglu": "LigerFusedGateUpSiLUMulFunction",
        "rope": "rope_forward",
    }
    if importlib.util.find_spec("liger_kernel") is None:
        return f"liger-kernel is not installed: {LIGER_FIX}"
    for name, function in needed.items():
        try:
            module = importlib.import_module(f"liger_kernel.ops.{name}")
        except (ImportError, OSError) as error:
            return f"liger-kernel {liger_version()} does not load ({error}): {LIGER_FIX}"
        found = getattr(module, function, None)
        if found is None or (name == "rope" and "rotary_dim" not in inspect.signature(found).parameters):
            return f"liger-kernel {liger_version()} is too old (ops.{name} lacks what 0.8.5 has): {LIGER_FIX}"
    return ""


def liger_version() -> str:
    """The installed version of liger-kernel."""
    try:
        return importlib.metadata.version("liger-kernel")
    except importlib.metadata.PackageNotFoundError:
        return "of unknown version"


def apex_problem() -> str:
    """Why NVIDIA Apex's RMSNorm cannot be used on this machine, or ""."""
    if not torch.cuda.is_available():
        return "there is no CUDA GPU"
    return apex_package_problem() or _import_problem("fused_layer_norm_cuda", "apex.normalization.fused_layer_norm")


def apex_rope_problem() -> str:
    """Why NVIDIA Apex's fused RoPE cannot be used on this machine, or ""."""
    return apex_problem() or _import_problem(
        "fused_rotary_positional_embedding", "apex.transformer.functional.fused_rope"
    )


def apex_package_problem() -> str:
    """Whether the installed `apex` is NVIDIA's, without importing it: the one of the package index starts a web stack."""
    spec = importlib.util.find_spec("apex")
    if spec is None:
        return f"NVIDIA Apex is not installed: {APEX_FIX}"
    if not any(Path(folder, "normalization").is_dir() for folder in spec.submodule_search_locations or ()):
        return (
            "the installed `apex` is not NVIDIA's but another project of the package index: `pip uninstall apex`, then "
            "build NVIDIA's from https://github.com/NVIDIA/apex"
        )
    return ""


def _import_problem(extension: str, module: str) -> str:
    for name in (extension, module):
        try:
            importlib.import_module(name)
        except (ImportError, OSError) as error:
            return f"NVIDIA Apex is installed without a working {name} ({error}): {APEX_FIX}"
    return ""


# ---- Liger.


def liger_takes(x: Tensor) -> bool:
    """Whether Liger's kernels support this tensor: on a GPU, of 16 or 32 bits, not empty, rows not too wide."""
    return _on_gpu(x) and x.dtype in _DTYPES and 0 < x.shape[-1] <= LIGER_MAX_WIDTH and x.numel() > 0


def _on_gpu(x: Tensor) -> bool:
    return x.is_cuda


def liger_rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """`ops.rms_norm.rms_norm` by Liger. "gemma" is its name for fp32 arithmetic up to one rounding, as ours."""
    from liger_kernel.ops.rms_norm import LigerRMSNormFunction

    in_place = False  # else the caller's gradient is overwritten
    y: Tensor = LigerRMSNormFunction.apply(x, weight, eps, 0.0, "gemma", in_place)
    return y


def liger_add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """`ops.rms_norm.add_rms_norm` by Liger."""
    from liger_kernel.ops.fused_add_rms_norm import LigerFusedAddRMSNormFunction

    y, total = LigerFusedAddRMSNormFunction.apply(x, residual, weight, eps, 0.0, "gemma", False)
    return y, total


def liger_swiglu(gate_up: Tensor) -> Tensor:
    """`ops.swiglu.swiglu` by Liger, whose gradient has two dims whatever its input had."""
    from liger_kernel.ops.swiglu import LigerFusedGateUpSiLUMulFunction

    y: Tensor = LigerFusedGateUpSiLUMulFunction.apply(gate_up.reshape(-1, gate_up.shape[-1]))
    return y.view(*gate_up.shape[:-1], gate_up.shape[-1] // 2)


class _LigerRope(torch.autograd.Function):
    """q [b, s, h, d] and k [b, s, g, d] rotated together; cos, sin [b or 1, s, rotary / 2]."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        from liger_kernel.ops.rope import rope_forward

        ctx.save_for_backward(cos, sin)
        q, k, *_ = rope_forward(*map(_heads_first, (q, k)), cos, sin, rotary_dim=2 * cos.shape[-1])
        return q.transpose(1, 2), k.transpose(1, 2)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dq: Tensor, dk: Tensor) -> tuple[Tensor | None, ...]:
        from liger_kernel.ops.rope import rope_backward

        cos, sin = ctx.saved_tensors
        dq, dk = rope_backward(*map(_heads_first, (dq, dk)), cos, sin, rotary_dim=2 * cos.shape[-1])
        return dq.transpose(1, 2), dk.transpose(1, 2), None, None


def _heads_first(x: Tensor) -> Tensor:
    """x [b, s, h, d] as [b, h, s, d]. Liger rotates a contiguous x in place, so it gets a copy of one."""
    return (x.clone() if x.is_contiguous() else x).transpose(1, 2)


def liger_rope(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """q [b, s, h, d] and k [b, s, g, d] by the angles of cos, sin [b or 1, s, rotary / 2], the two halves of a head."""
    q, k = _LigerRope.apply(q, k, cos, sin)
    return q, k


# ---- Apex.


def apex_takes(x: Tensor, weight: Tensor) -> bool:
    """Whether Apex's RMSNorm returns x's dtype: on a GPU, with the weight in the same 16- or 32-bit dtype."""
    return _on_gpu(x) and x.dtype in _DTYPES and weight.dtype == x.dtype and x.numel() > 0


def apex_rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """`ops.rms_norm.rms_norm` by Apex."""
    from apex.normalization.fused_layer_norm import fused_rms_norm_affine

    y: Tensor = fused_rms_norm_affine(x, weight, weight.shape, eps)
    return y


def apex_rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x [b, s, h, d] by the angles of cos, sin [s, rotary / 2] in fp32; Apex wants [s, b, h, d] and tables of full width."""
    from apex.transformer.functional.fused_rope import fused_apply_rotary_pos_emb_cached

    wide_cos, wide_sin = (torch.cat((table, table), dim=-1)[:, None, None] for table in (cos, sin))
    # True: the result is laid out so that it is contiguous once transposed back.
    y: Tensor = fused_apply_rotary_pos_emb_cached(x.transpose(0, 1), wide_cos, wide_sin, True)
    return y.transpose(0, 1)
