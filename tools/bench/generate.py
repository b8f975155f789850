"""Tokens per second of generation, compared with `transformers` (static cache, compiled) and `litgpt` (compiled).

Every implementation has the same weights, reads a prompt and generates greedily past any end of document. Prefill is the time
to the first token, decode the rate of the following ones. Runs rotate through the implementations, so that other load affects
all of them; results are medians. The logits of the prompt are compared first. --clock cpu measures the processor time of the
process; with --threads 1 it is independent of other processes.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the root of the checkout

from megatronish.launch.process import initialize_process, tune_allocator

initialize_process()
tune_allocator()

import torch  # noqa: E402
from torch import Tensor  # noqa: E402
from tqdm import tqdm  # noqa: E402

from megatronish.config.model import ModelConfig  # noqa: E402
from megatronish.config.presets import resolve_model  # noqa: E402
from megatronish.errors import UserError, exit_on_user_error  # noqa: E402
from megatronish.inference.batch import Batch, Request  # noqa: E402
from megatronish.inference.quantize import quantize_model  # noqa: E402
from megatronish.inference.sampling import GREEDY  # noqa: E402
from megatronish.model.transformer import Transformer  # noqa: E402
from tools.bench.train import build_litgpt, build_transformers  # noqa: E402

NAMES = (
    "megatronish bf16",
    "megatronish bf16 compiled",
    "megatronish int8",
    "megatronish int4",
    "transformers bf16",
    "transformers bf16 compiled",
    "transformers int8 compiled",
    "litgpt bf16",
    "litgpt bf16 compiled",
)
# Largest relative difference of the prompt's last logits: bf16 rounds by 2^-9 in different places of all layers. Quantized
# weights are another model: the limit only rules out nonsense.
TOLERANCE = {"bf16": 0.05, "int8": 0.3, "int4": 0.9}


@dataclass
class Generator:
    """One implementation: `run(prompts [b, p], new tokens)`, its last logits of prompts [b, V], and measured seconds."""

    run: Callable[[Tensor, int], object]
    logits: Callable[[Tensor], Tensor]
    prefill: list[float] = field(default_factory=list)
    total: list[float] = field(default_factory=list)


def ours(config: ModelConfig, form: str, device: torch.device) -> Generator:
    """Batch over Transformer."""
    model = Transformer(config, seed=0).to(torch.bfloat16).to(device).eval()
    kind, compiled = form.removesuffix(" compiled"), form.endswith(" compiled")
    if kind != "bf16":
        quantize_model(model, kind)  # type: ignore[arg-type]
    batches: dict[int, Batch] = {}

    def run(prompts: Tensor, new: int) -> object:
        if len(prompts) not in batches:
            batches[len(prompts)] = Batch(model, len(prompts), compiled=compiled)
        batch = batches[len(prompts)]
        requests = [Request(prompt, new, GREEDY, ignore_eod=True) for prompt in prompts.tolist()]
        return [list(each) for each in [batch.add(request) for request in requests]]

    return Generator(run, lambda prompts: model(prompts, last=1)[:, -1])


def transformers(config: ModelConfig, form: str, device: torch.device) -> Generator:
    """`generate` with a static cache; int8 by torchao's weight-only quantization."""
    from transformers import CompileConfig

    model: Any = build_transformers(config, compiled=False).model.to(device, torch.bfloat16).eval()
    model.config.use_cache = model.generation_config.use_cache = True
    if form.startswith("int8"):
        quantization = import_module("torchao.quantization")
        quantization.quantize_(model, quantization.Int8WeightOnlyConfig())
    compiling: Any = CompileConfig(fullgraph=False)
    compiling._compile_all_devices = True
    options: dict[str, Any] = {"compile_config": compiling} if form.endswith("compiled") else {"disable_compile": True}

    def run(prompts: Tensor, new: int) -> object:
        return model.generate(
            prompts,
            attention_mask=torch.ones_like(prompts),
            max_new_tokens=new,
            min_new_tokens=new,
            do_sample=False,
            cache_implementation="static",
            pad_token_id=0,
            eos_token_id=None,
            **options,
        )

    return Generator(run, lambda prompts: model(prompts, logits_to_keep=1).logits[:, -1])


def litgpt(config: ModelConfig, form: str, device: torch.device) -> Generator:
    """litgpt's generation loop with its cache."""
    model: Any = build_litgpt(config, compiled=False).model.to(device, torch.bfloat16).eval()
    base = import_module("litgpt.generate.base")
    call = torch.compile(model) if form.endswith("compiled") else model
    ready = 0

    def run(prompts: Tensor, new: int) -> object:
        nonlocal ready
        if ready != len(prompts):
            model.clear_kv_cache()
            model.max_seq_length = config.seq_length
            model.set_kv_cache(batch_size=len(prompts), device=device, dtype=torch.bfloat16)
            ready = len(prompts)
        position, tokens = torch.arange(prompts.shape[1], device=device), prompts
        written = []
        for _ in range(new):
            tokens = base.batched_next_token(call, position, tokens, [{"temperature": 0.0}] * len(prompts)).view(-1, 1)
            written.append(tokens)
            position = position[-1:] + 1
        return written

    def logits(prompts: Tensor) -> Tensor:
        model.clear_kv_cache()
        return model(prompts)[:, -1]

    return Generator(run, logits)


def build(name: str, config: ModelConfig, device: torch.device) -> Generator:
    """The implementation `name`."""
    library, _, form = name.partition(" ")
    return {"megatronish": ours, "transformers": transformers, "litgpt": litgpt}[library](config, form, device)


def check(generators: dict[str, Generator], prompts: Tensor) -> None:
    """Raise SystemExit unless all have the logits of the first, which is ours in bf16."""
    with torch.inference_mode():
        expected = next(iter(generators.values())).logits(prompts).float()
        for name, generator in generators.items():
            error = ((generator.logits(prompts).float() - expected).norm() / expected.norm()).item()
            limit = TOLERANCE[name.split()[1]]
            if not error <= limit:
                raise SystemExit(f"{name} is another model: its logits differ by {error:.3f}, more than {limit}")


@torch.inference_mode()
def measure(generators: dict[str, Generator], prompts: Tensor, options: argparse.Namespace) -> None:
    """Each round runs every implementation for one token and for all tokens."""
    clock = time.process_time if options.clock == "cpu" else time.perf_counter

    def timed(generator: Generator, new: int) -> float:
        start = clock()
        generator.run(prompts, new)
        if prompts.is_cuda:
            torch.cuda.synchronize()
        return clock() - start

    order = list(generators.values())
    for number in tqdm(range(-2, options.rounds), leave=False, disable=None):  # the first two compile and warm up
        for generator in order[number % len(order) :] + order[: number % len(order)]:
            prefill, total = timed(generator, 1), timed(generator, options.new_tokens + 1)
            if number >= 0:
                generator.prefill.append(prefill)
                generator.total.append(total)


def rates(generators: dict[str, Generator], batch: int, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Medians in tokens per second, which are printed as a table; the measured seconds are deleted."""
    results: list[dict[str, Any]] = []
    for name, each in generators.items():
        decode = statistics.median(total - first for total, first in zip(each.total, each.prefill, strict=True))
        prefill = batch * options.prompt_tokens / statistics.median(each.prefill)
        decode = batch * options.new_tokens / max(decode, 1e-9)
        results.append({"name": name, "batch": batch, "prefill": prefill, "decode": decode})
        each.prefill.clear()
        each.total.clear()
    base = next((r for r in results if r["name"] == "transformers bf16 compiled"), None)
    for r in results:
        ratio = f"{r['prefill'] / base['prefill']:>9.2f}x{r['decode'] / base['decode']:>9.2f}x" if base else ""
        print(f"{r['name']:28}{batch:>6}{r['prefill']:>14,.0f}{r['decode']:>12,.1f}{ratio}")
    return results


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="tools/bench/generate.py", description=__doc__)
    add = parser.add_argument
    add("--preset", default="smollm2_135m", help="shape of the model, with random weights and an untied head")
    add("--layers", type=int, help="number of layers")
    add("--batch", type=int, nargs="+", default=[1, 16], help="batch sizes (1 16)")
    add("--prompt-tokens", type=int, default=64, metavar="N", help="(64)")
    add("--new-tokens", type=int, default=32, metavar="N", help="(32)")
    add("--rounds", type=int, default=5, metavar="N", help="(5)")
    add("--names", nargs="+", choices=NAMES, default=list(NAMES), metavar="NAME", help=f"of: {', '.join(NAMES)}")
    add("--device", choices=("cpu", "cuda"), default="cpu")
    add("--threads", type=int, help="(default: the number of cores)")
    add("--clock", choices=("wall", "cpu"), default="wall", help="elapsed time, or processor time")
    add("--json", type=Path, metavar="FILE", help="write the results here as well")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    with exit_on_user_error():
        if options.threads:
            torch.set_num_threads(options.threads)
        length = options.prompt_tokens + options.new_tokens + 1
        changes: dict[str, Any] = {"tie_embeddings": False, "seq_length": length, "qk_norm": False}
        if options.layers:
            changes["num_layers"] = options.layers
        config, device = resolve_model({"preset": options.preset, **changes}), torch.device(options.device)
        if config.norm != "rmsnorm" or config.activation != "swiglu":
            raise UserError(
                f"--preset {options.preset}: the peers are built as Llamas; choose an RMSNorm and SwiGLU preset"
            )
        generators: dict[str, Generator] = {}
        for name in NAMES:
            try:
                generators |= {name: build(name, config, device)} if name in options.names else {}
            except ImportError as error:
                print(f"left out: {name}: {error}")
        results = []
        print(
            f"{options.preset}, prompt {options.prompt_tokens}, new {options.new_tokens}, {torch.get_num_threads()} threads"
        )
        print(f"{'':28}{'batch':>6}{'prefill tok/s':>14}{'decode':>12}{'against compiled transformers':>31}")
        for batch in options.batch:
            draw = torch.Generator().manual_seed(batch)
            prompts = torch.randint(config.vocab_size, (batch, options.prompt_tokens), generator=draw).to(device)
            check(generators, prompts)
            measure(generators, prompts, options)
            results += rates(generators, batch, options)
        if options.json:
            options.json.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
