"""Chooses the implementation of each operator, once, when a model is built."""

from __future__ import annotations

import importlib
import logging
import warnings
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from megatronish.ops import extension, third_party

# flash2 and flash3 are versions of flash-attn, fused is the CPU kernel of csrc/; "..._or_sdpa" takes SDPA for tensors that
# they do not take.
AttentionBackend = Literal["sdpa", "reference", "flash2", "flash3", "fused_or_sdpa", "flash2_or_sdpa", "flash3_or_sdpa"]
# RMSNorm, SwiGLU and RoPE: the kernels of csrc/, plain torch operations, Liger's Triton kernels, or NVIDIA Apex's
# ("apex_rms_norm": an Apex without its fused RoPE).
OpsBackend = Literal["fused", "reference", "liger", "apex", "apex_rms_norm"]

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Backends:
    """The implementations that a model was built with."""

    attention: AttentionBackend
    ops: OpsBackend


def resolve_ops(requested: str) -> OpsBackend:
    """The backend of RMSNorm, SwiGLU and RoPE for `requested` on this machine; see KernelConfig.ops for the names.

    "auto" selects the kernels of csrc/ on a machine without a GPU where they are built; otherwise plain torch, with a
    warning. The CUDA kernels compile but have not run on a GPU yet, so only "fused" selects them. Raises ValueError if
    "fused", "liger" or "apex" is requested and cannot be used here. The operators that "liger" and "apex" leave to plain
    torch are logged.
    """
    if requested == "reference":
        return "reference"
    if requested == "liger":
        return _resolve_liger()
    if requested == "apex":
        return _resolve_apex()
    if requested not in ("auto", "fused"):
        raise ValueError(f"unknown ops backend {requested!r}: choose auto, fused, reference, liger or apex")
    built = extension.EXTENSION
    problem = built.cuda_problem if torch.cuda.is_available() and not built.cuda else built.cpu_problem
    if requested == "auto" and torch.cuda.is_available():
        logger.info("ops: plain torch; the fused CUDA kernels are unproven on GPUs, kernels.ops 'fused' tries them")
        return "reference"
    if not problem:
        return "fused"
    if requested == "fused":
        raise _missing("fused", problem)
    warnings.warn(
        f"RMSNorm, SwiGLU and RoPE run as plain torch operations, several times slower: {problem}",
        RuntimeWarning,
        stacklevel=2,
    )
    return "reference"


def _resolve_liger() -> OpsBackend:
    problem = third_party.liger_problem()
    if problem:
        raise _missing("liger", problem)
    logger.info(
        "ops: liger-kernel %s for RMSNorm, SwiGLU and half-rotated RoPE; plain torch for GeGLU, interleaved RoPE, float64 "
        "and CPU tensors",
        third_party.liger_version(),
    )
    return "liger"


def _resolve_apex() -> OpsBackend:
    problem = third_party.apex_problem()
    if problem:
        raise _missing("apex", problem)
    no_rope = third_party.apex_rope_problem()
    logger.info(
        "ops: NVIDIA Apex for %s; plain torch for SwiGLU, GeGLU, %s, weights in another dtype, float64 and CPU tensors",
        "RMSNorm" if no_rope else "RMSNorm and half-rotated RoPE without explicit positions",
        f"RoPE ({no_rope})" if no_rope else "interleaved RoPE",
    )
    return "apex_rms_norm" if no_rope else "apex"


def _missing(requested: str, problem: str) -> ValueError:
    return ValueError(f"ops backend {requested!r} was asked for, but {problem}; or set ops to 'auto' or 'reference'")


def check_floating(name: str, argument: str, tensor: Tensor) -> None:
    """Raise ValueError unless `tensor`, the `argument` of operator `name`, is fp32, bf16, fp16 or float64."""
    if tensor.dtype not in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        raise ValueError(f"{name}: {argument} is {tensor.dtype}, expected float32, bfloat16, float16 or float64")


def installed_flash(capability: tuple[int, int]) -> tuple[Literal["flash2", "flash3"] | None, str]:
    """The flash-attn version to use on a GPU of this compute capability, or None, and a description of what was found.

    Version 3 (module `flash_attn_interface`) is taken on Hopper, version 2 (`flash_attn`) from Ampere on.
    """
    if capability < (8, 0):
        return None, f"flash-attn needs a GPU of compute capability 8.0, this one has {capability[0]}.{capability[1]}"
    problems = []
    versions: list[tuple[Literal["flash2", "flash3"], str]] = [("flash2", "flash_attn")]
    if capability[0] == 9:
        versions.insert(0, ("flash3", "flash_attn_interface"))
    for version, module_name in versions:
        try:
            module = importlib.import_module(module_name)
        except ModuleNotFoundError:
            continue
        except (ImportError, OSError) as error:  # built for another torch or CUDA
            problems.append(f"{module_name} does not load ({error})")
            continue
        if hasattr(module, "flash_attn_func") and hasattr(module, "flash_attn_varlen_func"):
            return version, f"{module_name} {getattr(module, '__version__', '')}".rstrip()
        problems.append(f"{module_name} has no flash_attn_func")
    return None, "; ".join(problems) or "flash-attn is not installed"


def resolve_attention(requested: str) -> AttentionBackend:
    """The attention backend for `requested` ("auto", "sdpa", "flash" or "reference") on this machine.

    "auto" takes flash-attn where it works and our kernel on CPUs, and SDPA for tensors that these do not take; what it chose
    on a machine with a GPU is logged. "sdpa" is torch's alone. Raises ValueError if "flash" is asked for and does not work here.
    """
    if requested == "sdpa":
        return "sdpa"
    if requested == "reference":
        return "reference"
    if requested not in ("auto", "flash"):
        raise ValueError(f"unknown attention backend {requested!r}: choose auto, sdpa, flash or reference")
    version, found = None, "there is no CUDA GPU"
    if torch.cuda.is_available():
        version, found = installed_flash(torch.cuda.get_device_capability())
    if requested == "flash":
        if version is None:
            raise ValueError(
                f"attention backend 'flash' was asked for, but {found}: `pip install flash-attn --no-build-isolation` on a "
                "machine with CUDA, or set attention to 'auto' or 'sdpa'"
            )
        return version
    if torch.cuda.is_available():
        logger.info("attention: %s", f"SDPA ({found})" if version is None else f"{found} for fp16 and bf16, else SDPA")
    if version is None:
        return "fused_or_sdpa"
    return "flash2_or_sdpa" if version == "flash2" else "flash3_or_sdpa"
