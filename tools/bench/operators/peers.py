"""Other projects' kernels as further implementations of the operators: those that are installed, on a CUDA device.

Each is called as its own users call it, in-place writes included, with the arguments of `operators.Operator`.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from megatronish.ops import third_party
from tools.bench.operators.operators import EPS, Function


def find_peers(device: torch.device) -> tuple[dict[str, dict[str, Function]], dict[str, str]]:
    """Peer -> operator -> implementation for those that can be used, and for the others the reason why not."""
    found: dict[str, dict[str, Function]] = {}
    missing: dict[str, str] = {}
    candidates: dict[str, tuple[Callable[[], str], Callable[[], dict[str, Function]]]] = {
        "liger": (third_party.liger_problem, liger),
        "apex": (third_party.apex_problem, apex),
        "flash-attn": (lambda: import_problem("flash_attn.layers.rotary", "flash-attn"), flash_attn),
        "quack": (lambda: import_problem("quack.rmsnorm", "quack-kernels"), quack),
    }
    for name, (problem, functions) in candidates.items():
        missing[name] = "its kernels need a CUDA device" if device.type != "cuda" else problem()
        if not missing[name]:
            del missing[name]
            found[name] = functions()
    return found, missing


def import_problem(module: str, package: str) -> str:
    """Why `module` cannot be imported, or ""."""
    if importlib.util.find_spec(module.split(".")[0]) is None:
        return f"{package} is not installed"
    try:
        importlib.import_module(module)
    except (ImportError, OSError) as error:  # built for another torch or CUDA
        return f"{package} does not load ({error})"
    return ""


def liger() -> dict[str, Function]:
    """LinkedIn's Triton kernels; the norms in their default mode "llama", which rounds twice."""
    from liger_kernel.ops.cross_entropy import LigerCrossEntropyFunction
    from liger_kernel.ops.fused_add_rms_norm import LigerFusedAddRMSNormFunction
    from liger_kernel.ops.rms_norm import LigerRMSNormFunction
    from liger_kernel.ops.rope import LigerRopeFunction
    from liger_kernel.ops.swiglu import LigerFusedGateUpSiLUMulFunction

    def rotate(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        q, k = LigerRopeFunction.apply(q.transpose(1, 2), k.transpose(1, 2), cos, sin, None, 1, 2 * cos.shape[-1])
        return q.transpose(1, 2), k.transpose(1, 2)

    def rope_qkv(qkv: Tensor, cos: Tensor, sin: Tensor, kv_heads: int) -> tuple[Tensor, ...]:
        q, k, v = qkv.split((qkv.shape[2] - 2 * kv_heads, kv_heads, kv_heads), dim=2)
        return *rotate(q, k, cos, sin), v

    def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
        # It writes the gradient over the logits, already in the forward pass.
        loss: Tensor = LigerCrossEntropyFunction.apply(logits.view_as(logits), labels, None, -100, 0.0, 0.0, "sum")[0]
        return loss

    return {
        "rms_norm": lambda x, w: LigerRMSNormFunction.apply(x, w, EPS, 0.0, "llama", False),
        "add_rms_norm": lambda x, residual, w: LigerFusedAddRMSNormFunction.apply(
            x, residual, w, EPS, 0.0, "llama", False
        ),
        "swiglu": LigerFusedGateUpSiLUMulFunction.apply,
        "rope_qkv_": rope_qkv,  # it has no kernel for one tensor
        "cross_entropy": cross_entropy,
    }


def apex() -> dict[str, Function]:
    """NVIDIA's CUDA kernels."""
    functions: dict[str, Function] = {"rms_norm": lambda x, w: third_party.apex_rms_norm(x, w, EPS)}
    if not third_party.apex_rope_problem():
        functions["rope"] = third_party.apex_rope
    return functions


def flash_attn() -> dict[str, Function]:
    """flash-attn's Triton rotary kernel; its tables have the dtype of the heads."""
    from flash_attn.layers.rotary import apply_rotary_emb, apply_rotary_emb_qkv_

    def rope_qkv(qkv: Tensor, cos: Tensor, sin: Tensor, kv_heads: int) -> tuple[Tensor, ...]:
        q_heads = qkv.shape[2] - 2 * kv_heads
        packed = qkv.clone() if qkv.requires_grad and torch.is_grad_enabled() else qkv
        packed = apply_rotary_emb_qkv_(packed, cos.to(qkv.dtype), sin.to(qkv.dtype), num_heads_q=q_heads)
        q, k, v = packed.split((q_heads, kv_heads, kv_heads), dim=2)
        return q, k, v

    return {
        "rope": lambda x, cos, sin: apply_rotary_emb(x, cos.to(x.dtype), sin.to(x.dtype)),
        "rope_qkv_": rope_qkv,
    }


def quack() -> dict[str, Function]:
    """Dao-AILab's CuTe kernels, for Hopper and later."""
    from quack.rmsnorm import rmsnorm

    return {
        "rms_norm": lambda x, w: rmsnorm(x, w, eps=EPS),
        "add_rms_norm": lambda x, residual, w: rmsnorm(x, w, residual=residual, eps=EPS, prenorm=True),
    }


def describe_missing(missing: Mapping[str, str]) -> str:
    """One line: who is not in the comparison and why."""
    reasons: dict[str, list[str]] = {}
    for name, reason in missing.items():
        reasons.setdefault(reason, []).append(name)
    return "not compared: " + "; ".join(f"{', '.join(names)} ({reason})" for reason, names in reasons.items())
