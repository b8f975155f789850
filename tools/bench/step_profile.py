"""Where the time of a training step goes, by kind of work, measured by torch.profiler on a CPU.

Modules are classified by the names of their classes, so that any decoder-only model can be looked at. In the forward pass
an operation belongs to the innermost module that ran it; in the backward pass to the module whose forward operation it
differentiates, identified by autograd's sequence numbers.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn
from torch.autograd.profiler_util import FunctionEvent
from torch.profiler import ProfilerActivity, profile, record_function

KINDS = (
    "matmul",
    "attention",
    "norm + residual",
    "rope + layout",
    "swiglu",
    "embedding",
    "cross-entropy",
    "fused by compiler",
    "optimizer",
    "gradient sums",
    "python, autograd",
)
OPTIMIZER_SCOPE = "kind: optimizer"  # what the caller wraps the optimizer's step in
_SCOPE = "kind: "
_NODE = "autograd::engine::evaluate_function: "
# Parts of class names, the first that fits. What a block does itself is the residual sum; what an attention module does
# itself, other than attention, is rotation and splitting and joining heads; the rest of the model is the loss.
_CLASSES = (
    ("Linear", "matmul"),
    ("Head", "matmul"),
    ("Norm", "norm + residual"),
    ("Rotary", "rope + layout"),
    ("Attention", "rope + layout"),
    ("MLP", "swiglu"),
    ("SiLU", "swiglu"),
    ("Embedding", "embedding"),
    ("Block", "norm + residual"),
    ("DecoderLayer", "norm + residual"),
)
_ATTENTION = ("scaled_dot_product", "ScaledDotProduct", "causal_attention", "CausalAttention")
_MATMULS = ("aten::mm", "aten::addmm", "aten::bmm", "aten::linear", "mkldnn::_linear_pointwise", "mkl::_mkl_linear")


def profile_steps(model: nn.Module, step: Callable[[], object], steps: int, *, compiled: bool) -> dict[str, float]:
    """Seconds of one step() by kind (KINDS), over `steps` of them.

    step: forward, loss and backward of `model` and, inside `record_function(OPTIMIZER_SCOPE)`, the optimizer's step.
    compiled: parts of the model were compiled with `torch._inductor.config.cpp.enable_kernel_profile`, where kernels
    have no module: operations are classified by their names alone.
    """
    with _scopes(model, enabled=not compiled), profile(activities=[ProfilerActivity.CPU]) as trace:
        for _ in range(steps):
            step()
    events: list[FunctionEvent] = list(trace.events() or [])
    seconds = dict.fromkeys(KINDS, 0.0)
    for kind, microseconds in _by_kind(events).items():
        seconds[kind] += microseconds / 1e6 / steps
    # The time between the outermost events is Python.
    starts, ends = [e.time_range.start for e in events], [e.time_range.end for e in events]
    wall = (max(ends) - min(starts)) / 1e6 / steps
    seconds["python, autograd"] += max(0.0, wall - sum(seconds.values()))
    return seconds


@contextmanager
def _scopes(model: nn.Module, *, enabled: bool) -> Iterator[None]:
    """While it is open, modules of a known kind run inside a profiler scope of that name."""
    handles: list[Any] = []
    for module in model.modules() if enabled else ():
        kind = next((kind for part, kind in _CLASSES if part in type(module).__name__), None)
        if kind is None:
            continue
        open_scopes: list[Any] = []

        def enter(_module: nn.Module, _args: Any, kind: str = kind, opened: list[Any] = open_scopes) -> None:
            opened.append(record_function(_SCOPE + kind))
            opened[-1].__enter__()

        def leave(_module: nn.Module, _args: Any, _out: Any, opened: list[Any] = open_scopes) -> None:
            opened.pop().__exit__(None, None, None)

        handles += [module.register_forward_pre_hook(enter), module.register_forward_hook(leave)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _by_kind(events: Iterable[FunctionEvent]) -> dict[str, float]:
    """Microseconds by kind: each event's time without that of the events in it."""
    ordered = sorted(events, key=lambda e: e.time_range.start)
    kind_of_node: dict[int, str] = {}
    for event in ordered:
        if event.sequence_nr >= 0 and not _inside_backward(event):
            kind_of_node[event.sequence_nr] = _kind(
                event, {}
            )  # the last operation before a number is used makes the node
    totals: dict[str, float] = defaultdict(float)
    for event in ordered:
        totals[_kind(event, kind_of_node)] += event.self_cpu_time_total
    return totals


def _inside_backward(event: FunctionEvent | None) -> bool:
    while event is not None:
        if event.name.startswith(_NODE):
            return True
        event = event.cpu_parent
    return False


def _kind(event: FunctionEvent, kind_of_node: dict[int, str]) -> str:
    """The kind of one event, by its own name and those around it, from the inside out."""
    if event.name.startswith((_SCOPE, _NODE, "Optimizer.", "ProfilerStep", "Torch-Compiled", "CompiledFunction")):
        return "python, autograd"
    at: FunctionEvent | None = event
    while at is not None:
        if any(part in at.name for part in _ATTENTION):
            return "attention"
        if at.name in _MATMULS:
            return "matmul"
        if "cpp_fused" in at.name:
            return "fused by compiler"
        if at.name.startswith(_SCOPE):
            return at.name.removeprefix(_SCOPE)
        if at.name.startswith(_NODE):
            if "AccumulateGrad" in at.name:
                return "gradient sums"
            if "CompiledFunction" in at.name:
                return "fused by compiler"
            return kind_of_node.get(at.sequence_nr, "cross-entropy")
        at = at.cpu_parent
    return "cross-entropy"
