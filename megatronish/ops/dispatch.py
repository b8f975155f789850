"""Chooses the implementation of each operator, once, when a model is built."""

from __future__ import annotations

import importlib.util
import logging
from typing import Literal

import torch

AttentionBackend = Literal["sdpa", "flash", "flash_or_sdpa", "reference"]

logger = logging.getLogger(__name__)


def flash_module_name() -> str | None:
    """Name of the installed flash-attention module, the newest first: 3 (`flash_attn_interface`), 2 (`flash_attn`)."""
    for name in ("flash_attn_interface", "flash_attn"):
        if importlib.util.find_spec(name) is not None:
            return name
    return None


def resolve_attention(requested: str) -> AttentionBackend:
    """The attention backend for `requested` ("auto", "sdpa", "flash" or "reference") on this machine.

    "auto" takes flash-attn where it is installed beside a GPU of compute capability 8.0 or more; such a model still
    uses SDPA for tensors that flash-attn does not take (fp32, CPU). Raises ValueError if "flash" is asked for and missing.
    """
    if requested in ("sdpa", "reference"):
        return requested  # type: ignore[return-value]
    module = flash_module_name()
    if requested == "flash":
        if module is None:
            raise ValueError(
                "attention backend 'flash' was asked for, but flash-attn is not installed: "
                "`pip install flash-attn --no-build-isolation` on a machine with CUDA, or set attention to 'auto' or 'sdpa'"
            )
        return "flash"
    if requested != "auto":
        raise ValueError(f"unknown attention backend {requested!r}: choose auto, sdpa, flash or reference")
    if not torch.cuda.is_available():
        return "sdpa"
    if module is not None and torch.cuda.get_device_capability() >= (8, 0):
        logger.info("attention: %s for fp16 and bf16, SDPA for the rest", module)
        return "flash_or_sdpa"
    logger.info("attention: SDPA (flash-attn is %s)", "not installed" if module is None else "for newer GPUs")
    return "sdpa"
