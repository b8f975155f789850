"""Time the fused operators beside plain torch, torch.compile, F.rms_norm and Liger (where it imports), errors first.

For each operator, shape and dtype: the relative L2 error against float64 (add_rms_norm rounds twice, the sum and the
result), then GB/s of the bytes that must move, as a share
of the bandwidth of a copy measured in the same loop, and how many times as long every other implementation takes. All of
them take turns, so that a busy machine slows them alike; medians over --repeats, and the spread between the 10th and the
90th percentile. Run it on one CPU thread (--threads 1) or on a GPU.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from megatronish.parallel.startup import settle_process, tune_allocator

settle_process()
tune_allocator()

import torch  # noqa: E402
import torch._functorch.config as functorch_config  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from torch import Tensor  # noqa: E402

from megatronish.ops import reference  # noqa: E402
from megatronish.ops.extension import EXTENSION  # noqa: E402
from megatronish.ops.rms_norm import add_rms_norm, rms_norm  # noqa: E402
from megatronish.ops.rope import rope  # noqa: E402
from megatronish.ops.swiglu import swiglu  # noqa: E402

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
HEAD_DIM = 128
EPS = 1e-5
Function = Callable[..., Any]


@dataclass(frozen=True)
class Result:
    """One implementation of one operator in one direction."""

    op: str
    direction: str
    dtype: str
    rows: int
    width: int
    implementation: str
    error: float
    microseconds: float
    spread: float
    gb_per_s: float
    of_copy: float


def eager_rms_norm(x: Tensor, w: Tensor) -> Tensor:
    """The composition that most models are written in: fp32 inside, the weight in the model's dtype."""
    wide = x.float()
    return w * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + EPS)).to(x.dtype)


def eager_add_rms_norm(x: Tensor, residual: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
    """A sum, then `eager_rms_norm`."""
    total = x + residual
    return eager_rms_norm(total, w), total


def eager_swiglu(gate_up: Tensor) -> Tensor:
    """silu(gate) * up in the dtype of the input."""
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up


def eager_rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x cos + rotate_half(x) sin, with tables of the whole width in the model's dtype."""
    c, s = (torch.cat((t, t), dim=-1).to(x.dtype)[None, :, None] for t in (cos, sin))
    a, b = x.chunk(2, dim=-1)
    return x * c + torch.cat((-b, a), dim=-1) * s


def implementations(op: str, cos: Tensor, sin: Tensor) -> tuple[dict[str, Function], Function]:
    """By name, every implementation of `op` as a function of its differentiable inputs; and the exact one."""
    exact: Function
    found: dict[str, Function]
    if op == "rms_norm":
        exact = partial(reference.rms_norm, eps=EPS)
        found = {"fused": partial(rms_norm, eps=EPS, backend="fused"), "eager": eager_rms_norm}
        found["F.rms_norm"] = lambda x, w: F.rms_norm(x, w.shape, w, EPS)
        if importlib.util.find_spec("liger_kernel") and cos.is_cuda:
            from liger_kernel.ops.rms_norm import LigerRMSNormFunction

            found["liger"] = lambda x, w: LigerRMSNormFunction.apply(x, w, EPS, 0.0, "llama", False)
    elif op == "add_rms_norm":

        def exact(x: Tensor, residual: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
            return reference.rms_norm(x + residual, w, EPS), x + residual

        found = {"fused": partial(add_rms_norm, eps=EPS, backend="fused"), "eager": eager_add_rms_norm}
    elif op == "swiglu":
        exact = reference.swiglu
        found = {"fused": partial(swiglu, backend="fused"), "eager": eager_swiglu}
    else:
        exact = partial(reference.rope, cos=cos, sin=sin)
        found = {
            "fused": partial(rope, cos=cos, sin=sin, backend="fused"),
            "eager": partial(eager_rope, cos=cos, sin=sin),
        }
    found["compiled"] = torch.compile(exact, dynamic=False)
    if not (EXTENSION.cuda if cos.is_cuda else EXTENSION.cpu):
        del found["fused"]
    return found, exact


def make_inputs(op: str, rows: int, width: int, dtype: torch.dtype, device: torch.device) -> list[Tensor]:
    """The differentiable inputs of `op` over `rows` tokens."""
    generator = torch.Generator(device).manual_seed(0)
    shapes: dict[str, list[tuple[int, ...]]] = {
        "rms_norm": [(rows, width), (width,)],
        "add_rms_norm": [(rows, width), (rows, width), (width,)],
        "swiglu": [(rows, 2 * width)],
        "rope": [(1, rows, width // HEAD_DIM, HEAD_DIM)],
    }
    return [torch.randn(shape, generator=generator, device=device).to(dtype).requires_grad_() for shape in shapes[op]]


def outputs_of(result: Any) -> tuple[Tensor, ...]:
    """One tensor or several, as a tuple."""
    return result if isinstance(result, tuple) else (result,)


def moved_bytes(op: str, direction: str, rows: int, width: int, size: int) -> int:
    """Bytes that must be read and written once, weights and tables left out."""
    passes = {
        ("rms_norm", "fwd"): 2,
        ("rms_norm", "bwd"): 3,
        ("add_rms_norm", "fwd"): 4,
        ("add_rms_norm", "bwd"): 4,
        ("swiglu", "fwd"): 3,
        ("swiglu", "bwd"): 5,
        ("rope", "fwd"): 2,
        ("rope", "bwd"): 2,
    }
    return passes[op, direction] * rows * width * size


def relative_error(found: tuple[Tensor, ...], exact: tuple[Tensor, ...]) -> float:
    """The largest relative L2 error among several tensors."""
    return max(((a.double() - e).norm() / e.norm()).item() for a, e in zip(found, exact, strict=True))


def clock(call: Callable[[], object], device: torch.device) -> float:
    """Seconds of one call, on a GPU by events."""
    if device.type != "cuda":
        start = time.perf_counter()
        call()
        return time.perf_counter() - start
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record()
    call()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1e3


def take_turns(calls: dict[str, Callable[[], object]], repeats: int, device: torch.device) -> dict[str, list[float]]:
    """Times of each call, one after the other in every round; two rounds to warm up are left out."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for repeat in range(repeats + 2):
        for name, call in calls.items():
            seconds = clock(call, device)
            if repeat >= 2:
                times[name].append(seconds)
    return times


def bench(op: str, direction: str, dtype_name: str, rows: int, width: int, options: argparse.Namespace) -> list[Result]:
    """All implementations of one operator in one direction: checked, then timed."""
    device, dtype = torch.device(options.device), DTYPES[dtype_name]
    angles = torch.outer(
        torch.arange(rows, dtype=torch.float64), 1e4 ** -torch.linspace(0, 1, HEAD_DIM // 2 + 1).double()[:-1]
    )
    cos, sin = angles.cos().to(device, torch.float32), angles.sin().to(device, torch.float32)
    functions, exact_function = implementations(op, cos, sin)
    inputs = make_inputs(op, rows, width, dtype, device)
    wide = [x.detach().double().requires_grad_() for x in inputs]
    exact = outputs_of(exact_function(*wide))
    grads = tuple(torch.randn_like(y).to(dtype) for y in exact)
    wanted = exact if direction == "fwd" else torch.autograd.grad(exact, wide, [g.double() for g in grads])
    calls: dict[str, Callable[[], object]] = {}
    errors: dict[str, float] = {}
    for name, function in functions.items():
        outputs = outputs_of(function(*inputs))
        backward = lambda y=outputs: torch.autograd.grad(y, inputs, grads, retain_graph=True)  # noqa: E731
        errors[name] = relative_error(outputs if direction == "fwd" else backward(), wanted)
        calls[name] = torch.no_grad()(lambda f=function: f(*inputs)) if direction == "fwd" else backward
    del wide, exact, wanted
    source = torch.empty(options.copy_mib * 2**20, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    calls["copy"] = lambda: target.copy_(source)
    times = take_turns(calls, options.repeats, device)
    copy = 2 * source.numel() / statistics.median(times.pop("copy"))
    results = []
    for name, seconds in times.items():
        median, ordered = statistics.median(seconds), sorted(seconds)
        spread = (ordered[int(0.9 * (len(ordered) - 1))] - ordered[int(0.1 * (len(ordered) - 1))]) / median
        rate = moved_bytes(op, direction, rows, width, dtype.itemsize) / median
        results.append(
            Result(
                op,
                direction,
                dtype_name,
                rows,
                width,
                name,
                errors[name],
                median * 1e6,
                spread,
                rate / 1e9,
                rate / copy,
            )
        )
    return results


def show(results: list[Result]) -> None:
    """One line an operator: the fused figures, and how many times as long the others take."""
    fused = next((r for r in results if r.implementation == "fused"), results[0])
    others = "  ".join(
        f"{r.implementation} {r.microseconds / fused.microseconds:.2f}x" for r in results if r is not fused
    )
    print(
        f"{fused.op:12} {fused.direction} {fused.dtype} {fused.rows:6}x{fused.width:<5} error {fused.error:.1e}  "
        f"{fused.microseconds:8.0f} us +-{fused.spread:4.0%}  {fused.gb_per_s:6.1f} GB/s  {fused.of_copy:4.2f} of copy  "
        f"| {others}",
        flush=True,
    )


def plot(results: list[Result], path: Path) -> None:
    """Bars of the share of copy bandwidth, an operator and dtype a group."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    labels = list(dict.fromkeys(f"{r.op} {r.direction}\n{r.dtype} {r.width}" for r in results))
    names = list(dict.fromkeys(r.implementation for r in results))
    figure, axes = pyplot.subplots(figsize=(max(6.0, 0.7 * len(labels)), 4.0))
    for offset, name in enumerate(names):
        bars = [
            (labels.index(f"{r.op} {r.direction}\n{r.dtype} {r.width}"), r.of_copy)
            for r in results
            if r.implementation == name
        ]
        axes.bar([x + 0.8 * offset / len(names) for x, _ in bars], [y for _, y in bars], 0.8 / len(names), label=name)
    axes.set_xticks([x + 0.4 for x in range(len(labels))], labels, rotation=90, fontsize=7)
    axes.set_ylabel("share of copy bandwidth")
    axes.legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=150)


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ops", nargs="+", default=["rms_norm", "add_rms_norm", "swiglu", "rope"])
    parser.add_argument("--dtypes", nargs="+", default=["fp32", "bf16"], choices=list(DTYPES))
    parser.add_argument("--widths", nargs="+", type=int, default=[1024, 4096], help="hidden sizes, or F of SwiGLU")
    parser.add_argument("--mib", type=int, default=0, help="size of x (default: 32 on a CPU, 256 on a GPU)")
    parser.add_argument("--copy-mib", type=int, default=64, help="size of what the copy copies")
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--threads", type=int, default=1, help="CPU threads")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--json", type=Path, help="write the figures here")
    parser.add_argument("--plot", type=Path, help="write a picture (PNG) here")
    options = parser.parse_args(arguments)
    options.mib = options.mib or (256 if options.device.startswith("cuda") else 32)
    return options


def main(arguments: list[str] | None = None) -> int:
    """Bench everything asked for; exit status 1 where the kernels are not built."""
    options = parse(arguments)
    torch.set_num_threads(options.threads)
    functorch_config.donated_buffer = False  # the backward pass of a compiled function runs many times
    problem = EXTENSION.cuda_problem if options.device.startswith("cuda") else EXTENSION.cpu_problem
    if problem:
        print(f"the fused operators are missing: {problem}", file=sys.stderr)
    print(f"torch {torch.__version__}, {options.device}, {options.threads} threads, x of {options.mib} MiB")
    results: list[Result] = []
    for op in options.ops:
        for dtype in options.dtypes:
            for width in options.widths:
                rows = options.mib * 2**20 // (width * DTYPES[dtype].itemsize)
                for direction in ("fwd", "bwd"):
                    results += bench(op, direction, dtype, rows, width, options)
                    show([r for r in results if (r.op, r.dtype, r.width, r.direction) == (op, dtype, width, direction)])
    if options.json:
        options.json.write_text(json.dumps([asdict(result) for result in results], indent=1) + "\n")
    if options.plot:
        plot(results, options.plot)
    return 1 if problem else 0


if __name__ == "__main__":
    sys.exit(main())
