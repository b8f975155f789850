"""One run: every case is checked against float64, then timed, then printed."""

from __future__ import annotations

import argparse
import datetime
import math
import platform
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch._dynamo.utils as dynamo_utils
import torch._functorch.config as functorch_config
from torch import Tensor

from megatronish.ops.dtypes import DTYPES
from megatronish.ops.extension import EXTENSION
from tools.bench.operators.bars import BarResult, judge
from tools.bench.operators.operators import HOST, STEP, Function, Operator, operators
from tools.bench.operators.peers import describe_missing, find_peers
from tools.bench.operators.report import Report, Result, line
from tools.bench.operators.timing import Timing, take_turns

# Compositions round three to six times, at a relative rms of 1.65e-3 in bf16; a wrong formula is off by 0.1 and more.
WRONG = {"fp32": 1e-5, "bf16": 2e-2, "fp16": 2.5e-3}
HOST_SHAPE = (4096, 1024)
COPY = "copy"


@dataclass(frozen=True)
class Case:
    """One operator at one size."""

    op: str
    dtype: str
    rows: int
    width: int
    host: bool = False  # forward and backward with the host's time, instead of each by itself


class Bench:
    """What all cases share."""

    def __init__(self, options: argparse.Namespace, device: torch.device) -> None:
        self.options, self.device = options, device
        self.table = operators()
        self.peers, missing = find_peers(device)
        built = EXTENSION.cuda if device.type == "cuda" else EXTENSION.cpu
        self.fused_problem = "" if built else EXTENSION.cuda_problem if device.type == "cuda" else EXTENSION.cpu_problem
        self.report = Report(describe_machine(device, options.threads), missing)

    def run(self, case: Case) -> None:
        """Check, time and print one case. An implementation that fails or computes something else is left out."""
        torch.compiler.reset()  # else dynamo's limit of recompilations turns later cases into eager ones
        problem = Problem(case, self.table[case.op], self.device, self.options)
        implementations = self.implementations(case.op)
        for direction in (HOST,) if case.host else self.table[case.op].directions:
            calls: dict[str, list[Callable[[], object]]] = {}
            errors: dict[str, float] = {}
            for name, function in implementations.items():
                try:
                    errors[name] = problem.error(function, direction)
                    if not errors[name] <= WRONG[case.dtype]:  # also where it is NaN
                        raise ArithmeticError(f"relative error {errors[name]:.1e} against float64: not timed")
                    calls[name] = problem.calls(function, direction)
                except Exception as error:  # whatever a peer raises must not end the table
                    self.leave_out(case, direction, name, error)
            if calls:
                self.time(case, direction, calls, errors)

    def implementations(self, op: str) -> dict[str, Function]:
        """By name, all that can compute `op` here; ours first."""
        operator = self.table[op]
        found: dict[str, Function] = {} if self.fused_problem else {"fused": operator.fused}
        found["compiled"] = Compiled(operator.reference)
        found.update(operator.others)
        found.update({peer: functions[op] for peer, functions in self.peers.items() if op in functions})
        return found

    def leave_out(self, case: Case, direction: str, name: str, error: Exception) -> None:
        """Print and record an implementation that is not timed."""
        reason = (str(error).strip().splitlines() or [repr(error)])[0][:200]
        text = f"{case.op} {direction} {case.dtype} {case.rows}x{case.width}: {name}: {type(error).__name__}: {reason}"
        self.report.left_out.append(text)
        print(f"LEFT OUT {text}", flush=True)

    def time(self, case: Case, direction: str, calls: dict[str, Any], errors: dict[str, float]) -> None:
        """Interleaved timings, together with a copy: results and one printed line."""
        host = direction == HOST
        if not host:
            source = torch.empty(self.options.copy_mib * 2**20, dtype=torch.uint8, device=self.device)
            target = torch.empty_like(source)
            calls = {**calls, COPY: [lambda: target.copy_(source)]}
        timings = take_turns(calls, self.options.repeats, self.device, host=host)
        copy_rate = None if host else 2 * source.numel() / timings.pop(COPY).seconds
        operator = self.table[case.op]
        moved = operator.moved_in(direction) * case.rows * case.width * DTYPES[case.dtype].itemsize
        results = [
            Result(
                op=case.op,
                direction=direction,
                dtype=case.dtype,
                rows=case.rows,
                width=case.width,
                implementation=name,
                in_place=name == "fused" and operator.in_place,
                error=errors[name],
                microseconds=timing.seconds * 1e6,
                spread=timing.spread,
                gb_per_s=None if copy_rate is None else moved / timing.seconds / 1e9,
                of_copy=None if copy_rate is None else moved / timing.seconds / copy_rate,
            )
            for name, timing in timings.items()
        ]
        self.report.results += results
        print(line(results), flush=True)
        if "fused" in timings:
            self.judge(case, direction, results, timings)

    def judge(self, case: Case, direction: str, results: list[Result], timings: dict[str, Timing]) -> None:
        """The bars of this case, printed where asked for."""
        fused = results[0]
        verdicts: list[BarResult] = judge(
            case.op,
            direction,
            self.device.type,
            case.dtype,
            case.width,
            microseconds={name: timing.seconds * 1e6 for name, timing in timings.items()},
            of_copy=fused.of_copy,
            error=fused.error,
            weight_gradient=self.table[case.op].weight_gradient,
        )
        self.report.verdicts[f"{case.op} {direction} {case.dtype} {case.rows}x{case.width}"] = verdicts
        if self.options.bars:
            print("             " + " | ".join(map(str, verdicts)), flush=True)


class Compiled:
    """torch.compile of a function for one shape, in one graph or an error."""

    def __init__(self, function: Function) -> None:
        self._function = torch.compile(function, dynamic=False, fullgraph=True)
        self._checked = False

    def __call__(self, *arguments: Any) -> Any:
        if self._checked:
            return self._function(*arguments)
        before = dynamo_utils.counters["stats"]["unique_graphs"]
        result = self._function(*arguments)
        if dynamo_utils.counters["stats"]["unique_graphs"] == before:
            raise RuntimeError("torch.compile compiled nothing: is it switched off in the environment?")
        self._checked = True
        return result


class Problem:
    """Inputs and exact results of a case."""

    def __init__(self, case: Case, operator: Operator, device: torch.device, options: argparse.Namespace) -> None:
        self.case, self.operator, self.device = case, operator, device
        self.constants = operator.constants(case.rows, case.width, device)
        self.inputs = self._draw(seed=0)
        wide = [x.detach().double().requires_grad_() for x in self.inputs]
        exact = outputs_of(operator.exact_result(self.inputs[0].dtype, *wide, *self.constants))
        self.grads = tuple(self._randn(y.shape, seed=100 + i) for i, y in enumerate(exact))
        self.exact = {
            "bwd": torch.autograd.grad(exact, wide, [g.double() for g in self.grads]),
            "fwd": tuple(y.detach() for y in exact),
        }
        size = sum(x.numel() * x.element_size() for x in self.inputs)
        others = 0 if case.host else math.ceil(options.rotate_mib * 2**20 / size) - 1
        self.more_inputs = [self._draw(seed=1 + number) for number in range(others)]

    def _randn(self, shape: tuple[int, ...], seed: int) -> Tensor:
        generator = torch.Generator(self.device).manual_seed(seed)
        return torch.randn(shape, generator=generator, device=self.device).to(DTYPES[self.case.dtype])

    def _draw(self, seed: int) -> list[Tensor]:
        shapes = self.operator.shapes(self.case.rows, self.case.width)
        return [self._randn(shape, seed * 10 + i).requires_grad_() for i, shape in enumerate(shapes)]

    def error(self, function: Function, direction: str) -> float:
        """The largest relative L2 error among the outputs, or among the gradients; the arguments are fresh copies."""
        inputs = [x.detach().clone().requires_grad_() for x in self.inputs]
        # Memory that was freed is likely to be taken for the outputs: what is not written there shows up as NaN.
        del_me = [torch.full_like(y, math.nan, dtype=inputs[0].dtype) for y in self.exact["fwd"]]
        del del_me
        outputs = outputs_of(function(*inputs, *self.constants))
        found = outputs
        if direction != "fwd":
            found = torch.autograd.grad(outputs, inputs, [g.clone() for g in self.grads_for(outputs)])
        exact = self.exact["fwd" if direction == "fwd" else "bwd"]
        errors = [((a.double() - e).norm() / e.norm()).item() for a, e in zip(found, exact, strict=True)]
        return math.nan if any(map(math.isnan, errors)) else max(errors)

    def calls(self, function: Function, direction: str) -> list[Callable[[], object]]:
        """One call for each set of inputs. Every one allocates what it returns, but for kernels that work in place."""
        return [self._call(function, inputs, direction) for inputs in (self.inputs, *self.more_inputs)]

    def _call(self, function: Function, inputs: list[Tensor], direction: str) -> Callable[[], object]:
        if direction == "fwd":
            detached = [x.detach() for x in inputs]
            return torch.no_grad()(lambda: function(*detached, *self.constants))
        if direction in (HOST, STEP):

            def both() -> object:
                outputs = outputs_of(function(*inputs, *self.constants))
                return torch.autograd.grad(outputs, inputs, self.grads_for(outputs))

            return both
        outputs = outputs_of(function(*inputs, *self.constants))
        grads = self.grads_for(outputs)
        return lambda: torch.autograd.grad(outputs, inputs, grads, retain_graph=True)

    def grads_for(self, outputs: tuple[Tensor, ...]) -> list[Tensor]:
        """The gradients of the outputs, in the dtypes of theirs (a loss is fp32)."""
        return [g.to(y.dtype) for g, y in zip(self.grads, outputs, strict=True)]


def outputs_of(result: Any) -> tuple[Tensor, ...]:
    """One tensor or several, as a tuple."""
    return result if isinstance(result, tuple) else (result,)


def describe_machine(device: torch.device, threads: int) -> dict[str, Any]:
    """What a number is worth nothing without."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{cpu_name()}, {threads} thread(s)"
    return {
        "name": name,
        "device": device.type,
        "threads": threads,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "date": datetime.date.today().isoformat(),
    }


def cpu_name() -> str:
    """The processor's name, where /proc/cpuinfo has it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [text.partition(":")[2].strip() for text in lines if text.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def cases(options: argparse.Namespace) -> list[Case]:
    """All that was asked for, in the order of the table."""
    found = []
    for op in options.ops:
        for dtype in options.dtypes:
            for width in options.widths:
                rows = max(1, options.mib * 2**20 // (width * DTYPES[dtype].itemsize))
                found.append(Case(op, dtype, rows, width))
        if options.host_row and not (operators()[op].in_place or operators()[op].one_backward):
            found.append(Case(op, "bf16" if "bf16" in options.dtypes else options.dtypes[0], *HOST_SHAPE, host=True))
    return found


def choose_device(name: str | None) -> torch.device:
    """The device asked for, else a GPU where there is one. Raises ValueError if it is not there."""
    found = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
    if found.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"--device {name}: there is no CUDA GPU that torch {torch.__version__} can use")
    return found


def run(options: argparse.Namespace) -> int:
    """Bench all that was asked for. Exit status 1 where the kernels are missing, fail or are wrong; bars do not count."""
    try:
        device = choose_device(options.device)
    except (ValueError, RuntimeError) as error:
        print(error, file=sys.stderr)
        return 2
    gpu = device.type == "cuda"
    options.mib = options.mib or (256 if gpu else 32)
    options.copy_mib = options.copy_mib or (512 if gpu else 64)
    options.rotate_mib = (256 if gpu else 0) if options.rotate_mib is None else options.rotate_mib
    torch.set_num_threads(options.threads)
    bench = Bench(options, device)
    machine = bench.report.machine
    print(f"{machine['name']}, torch {machine['torch']}, {machine['date']}; x of {options.mib} MiB", flush=True)
    if bench.report.missing:
        print(describe_missing(bench.report.missing), flush=True)
    if bench.fused_problem:
        print(f"the fused operators are missing: {bench.fused_problem}", file=sys.stderr)
    todo = cases(options)
    start = time.monotonic()
    with functorch_config.patch(donated_buffer=False):  # the backward pass of a compiled function runs many times
        for number, case in enumerate(todo):
            left = f", about {(time.monotonic() - start) / number * (len(todo) - number):.0f} s left" if number else ""
            print(f"[{number + 1}/{len(todo)}] {case.op} {case.dtype} {case.width}{left}", file=sys.stderr, flush=True)
            bench.run(case)
    finish(bench.report, options)
    wrong = [text for text in bench.report.left_out if ": fused: " in text]
    return 1 if bench.fused_problem or wrong else 0


def finish(report: Report, options: argparse.Namespace) -> None:
    """Print the summary of the bars and write the JSON file."""
    verdicts = [verdict for each in report.verdicts.values() for verdict in each]
    if options.bars and verdicts:
        counts = [sum(v.met is met for v in verdicts) for met in (True, False, None)]
        print(f"bars: {counts[0]} met, {counts[1]} missed, {counts[2]} without the implementation to compare with")
    if options.json:
        report.write_json(options.json)
