"""Tokens per second of a full training step, compared with `transformers` and `litgpt` with the same weights.

One step is forward, loss, backward and a fused AdamW update of a 25M-parameter Llama-like model on 512 tokens. Every
implementation gets the same initial weights, the same tokens, the same optimizer, threads and process (hence the same
allocator and OpenMP settings, those that megatronish's launchers make). The loss and the gradient norm of the first step
must agree before anything is timed. Then they alternate step by step, in rotating order, so that load on the machine
affects all equally; medians, and the spread between the 10th and the 90th percentile.

--profile then runs a few more steps of each under torch.profiler and prints the time by kind of work. Compiled peers are
torch.compile of the full model; ours compiles block by block, as `train.compile` does.
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
from importlib import import_module
from pathlib import Path
from typing import Any

sys.path.insert(
    0, str(Path(__file__).resolve().parents[2])
)  # the root of the checkout: `tools.bench` is no installed package

from megatronish.launch.process import initialize_process, tune_allocator

initialize_process()
tune_allocator()

import torch  # noqa: E402
import torch._inductor.config as inductor_config  # noqa: E402
from torch import Tensor, nn  # noqa: E402
from torch.profiler import record_function  # noqa: E402
from tqdm import tqdm  # noqa: E402

from megatronish.config.model import KernelConfig, ModelConfig  # noqa: E402
from megatronish.model.transformer import Transformer  # noqa: E402
from megatronish.ops.dtypes import DTYPES  # noqa: E402
from megatronish.ops.extension import EXTENSION  # noqa: E402
from tools.bench.step_profile import KINDS, OPTIMIZER_SCOPE, profile_steps  # noqa: E402

# Largest relative difference of the first step. fp32: sums of thousands of terms in another order. bf16: roundings of 2^-9
# in other places, which through six blocks reach some percent of the gradients of queries and keys; litgpt's loss itself is a
# bf16 number, with 2^-8 between neighbours.
LOSS_TOLERANCE = {"fp32": 1e-5, "bf16": 2**-8}
GRADIENT_TOLERANCE = {"fp32": 1e-4, "bf16": 0.1}
WARM_UP = 2  # the first step compiles; the second allocates what the first one's compilation kept
PEERS = {"transformers": "pip install transformers", "litgpt": "pip install litgpt"}
NAMES = (
    "megatronish fused",
    "megatronish fused, compiled blocks",
    "megatronish reference",
    "transformers eager",
    "transformers compiled",
    "litgpt eager",
    "litgpt compiled",
)
LossFunction = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Implementation:
    """A model and the function that gives its mean loss over (tokens, labels) [b, s]."""

    model: nn.Module
    loss: LossFunction
    compiled: bool
    names: Callable[[dict[str, Tensor], ModelConfig], dict[str, Tensor]] | None = (
        None  # from ours to its own; None: ours
    )


@dataclass(frozen=True)
class Result:
    """The timed steps of one implementation in one dtype; seconds per step."""

    implementation: str
    dtype: str
    tokens_per_second: float
    median: float
    p10: float
    p90: float
    first_loss: float
    last_loss: float


def build_ours(config: ModelConfig, ops: str, compiled: bool) -> Implementation:
    """megatronish with `ops` as its operators' backend."""
    model = Transformer(config, KernelConfig.model_validate({"ops": ops}), seed=0)
    if compiled:
        model.compile_blocks()

    def loss(tokens: Tensor, labels: Tensor) -> Tensor:
        total, count = model.loss(tokens, labels)
        return total / count

    return Implementation(model, loss, compiled)


def build_transformers(config: ModelConfig, compiled: bool) -> Implementation:
    """`transformers`' Llama with SDPA, and the loss that it computes itself."""
    from transformers import LlamaConfig, LlamaForCausalLM

    settings: dict[str, Any] = {
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_attention_heads,
        "num_key_value_heads": config.resolved_kv_heads,
        "intermediate_size": config.ffn_hidden_size,
        "max_position_embeddings": config.seq_length,
        "rms_norm_eps": config.norm_eps,
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_theta},
        "tie_word_embeddings": False,
        "attn_implementation": "sdpa",
        "use_cache": False,
    }
    model = LlamaForCausalLM(LlamaConfig(**settings))
    state = Transformer(config, KernelConfig(ops="reference"), seed=0).state_dict()
    model.load_state_dict(transformers_names(state, config))
    call = torch.compile(model) if compiled else model
    return Implementation(
        model,
        lambda tokens, labels: call(tokens, labels=labels, shift_labels=labels).loss,
        compiled,
        transformers_names,
    )


def build_litgpt(config: ModelConfig, compiled: bool) -> Implementation:
    """litgpt's GPT with the shape of a Llama, and the loss of its pretraining script."""
    litgpt, loss = import_module("litgpt.model"), import_module("litgpt.utils").chunked_cross_entropy
    theirs = litgpt.Config(
        block_size=config.seq_length,
        n_layer=config.num_layers,
        n_embd=config.hidden_size,
        n_head=config.num_attention_heads,
        n_query_groups=config.resolved_kv_heads,
        intermediate_size=config.ffn_hidden_size,
        vocab_size=config.vocab_size,
        padded_vocab_size=config.vocab_size,
        rope_base=int(config.rope_theta),
        rotary_percentage=1.0,
        norm_class_name="RMSNorm",
        norm_eps=config.norm_eps,
        mlp_class_name="LLaMAMLP",
        parallel_residual=False,
        bias=False,
    )
    model = litgpt.GPT(theirs)
    state = Transformer(config, KernelConfig(ops="reference"), seed=0).state_dict()
    model.load_state_dict(litgpt_names(state, config))
    call = torch.compile(model) if compiled else model
    return Implementation(model, lambda tokens, labels: loss(call(tokens), labels), compiled, litgpt_names)


def transformers_names(state: dict[str, Tensor], config: ModelConfig) -> dict[str, Tensor]:
    """Our tensors under the names of `transformers`' Llama; packed projections are taken apart."""
    theirs = {
        "model.embed_tokens.weight": state["embedding.weight"],
        "model.norm.weight": state["final_norm.weight"],
        "lm_head.weight": state["head.weight"],
    }
    kv = config.resolved_kv_heads * config.resolved_head_dim
    for layer in range(config.num_layers):
        block, ours = f"model.layers.{layer}.", f"blocks.{layer}."
        packed = state[ours + "attention.qkv.weight"]
        for part, weight in zip("qkv", packed.split((len(packed) - 2 * kv, kv, kv)), strict=True):
            theirs[f"{block}self_attn.{part}_proj.weight"] = weight
        for part, weight in zip(("gate", "up"), state[ours + "mlp.up.weight"].chunk(2), strict=True):
            theirs[f"{block}mlp.{part}_proj.weight"] = weight
        theirs[block + "self_attn.o_proj.weight"] = state[ours + "attention.out.weight"]
        theirs[block + "mlp.down_proj.weight"] = state[ours + "mlp.down.weight"]
        theirs[block + "input_layernorm.weight"] = state[ours + "attention_norm.weight"]
        theirs[block + "post_attention_layernorm.weight"] = state[ours + "mlp_norm.weight"]
    return theirs


def litgpt_names(state: dict[str, Tensor], config: ModelConfig) -> dict[str, Tensor]:
    """Our tensors under the names of litgpt's GPT, which packs q, k and v as we do and keeps gate and up apart."""
    theirs = {
        "transformer.wte.weight": state["embedding.weight"],
        "transformer.ln_f.weight": state["final_norm.weight"],
        "lm_head.weight": state["head.weight"],
    }
    for layer in range(config.num_layers):
        block, ours = f"transformer.h.{layer}.", f"blocks.{layer}."
        theirs[block + "mlp.fc_1.weight"], theirs[block + "mlp.fc_2.weight"] = state[ours + "mlp.up.weight"].chunk(2)
        theirs[block + "mlp.proj.weight"] = state[ours + "mlp.down.weight"]
        theirs[block + "attn.qkv.weight"] = state[ours + "attention.qkv.weight"]
        theirs[block + "attn.proj.weight"] = state[ours + "attention.out.weight"]
        theirs[block + "norm_1.weight"] = state[ours + "attention_norm.weight"]
        theirs[block + "norm_2.weight"] = state[ours + "mlp_norm.weight"]
    return theirs


def builder(name: str) -> Callable[[ModelConfig], Implementation]:
    """What makes the implementation `name`."""
    library, _, form = name.partition(" ")
    if library != "megatronish":
        make = build_transformers if library == "transformers" else build_litgpt
        return partial(make, compiled=form == "compiled")
    return partial(build_ours, ops=form.partition(",")[0], compiled="compiled" in form)


def available(names: list[str], on_gpu: bool) -> list[str]:
    """Those of `names` that can run here; prints what is missing and how to install it."""
    found, reported = [], set()
    problem = EXTENSION.cuda_problem if on_gpu else EXTENSION.cpu_problem
    for name in names:
        library = name.partition(" ")[0]
        if "fused" in name and problem:
            print(f"left out: {name}: {problem}")
        elif library in PEERS and importlib.util.find_spec(library) is None:
            if library not in reported:
                print(f"left out: {library} is not installed: {PEERS[library]}")
            reported.add(library)
        else:
            found.append(name)
    return found


class Runner:
    """One implementation with its optimizer, on its device and in its dtype."""

    def __init__(self, made: Implementation, device: torch.device, dtype: torch.dtype) -> None:
        self.loss, self.model, self.compiled, self.device = made.loss, made.model, made.compiled, device
        self.names = made.names
        self.model.to(device, dtype).train()
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(), lr=1e-4, betas=(0.9, 0.95), weight_decay=0.1, fused=True
        )
        self.seconds: list[float] = []
        self.losses: list[float] = []

    def first_gradient(self, tokens: Tensor, labels: Tensor) -> tuple[float, dict[str, Tensor]]:
        """Loss and gradients by name with the initial weights, which stay as they are."""
        loss = self.loss(tokens, labels)
        loss.backward()
        gradients = {name: p.grad for name, p in self.model.named_parameters() if p.grad is not None}
        self.optimizer.zero_grad(set_to_none=True)
        return loss.item(), gradients

    def step(self, tokens: Tensor, labels: Tensor) -> float:
        """One training step; returns its seconds."""
        self._wait()
        start = time.perf_counter()
        loss = self.loss(tokens, labels)
        loss.backward()
        with record_function(OPTIMIZER_SCOPE):
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self._wait()
        seconds = time.perf_counter() - start
        self.losses.append(loss.item())
        return seconds

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def batch(config: ModelConfig, step: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Random tokens [1, seq_length] and the tokens that follow them; a function of the step's number."""
    generator = torch.Generator().manual_seed(step)
    drawn = torch.randint(config.vocab_size, (1, config.seq_length + 1), generator=generator).to(device)
    return drawn[:, :-1].contiguous(), drawn[:, 1:].contiguous()


def check_first_step(runners: dict[str, Runner], config: ModelConfig, dtype: str, device: torch.device) -> None:
    """Raise SystemExit unless every implementation has the loss and each of the gradients of our reference operators."""
    tokens, labels = batch(config, 0, device)
    reference = Runner(build_ours(config, "reference", False), device, DTYPES[dtype])
    wanted_loss, ours = reference.first_gradient(tokens, labels)
    worst = 0.0
    for name, runner in tqdm(runners.items(), desc=f"{dtype}: compile and compare", file=sys.stderr, leave=False):
        loss, gradients = runner.first_gradient(tokens, labels)
        wanted = ours if runner.names is None else runner.names(ours, config)
        off = {
            key: ((gradients[key].float() - g.float()).norm() / g.float().norm()).item() for key, g in wanted.items()
        }
        where = max(off, key=lambda key: off[key])
        worst = max(worst, off[where])
        if not (abs(loss / wanted_loss - 1) <= LOSS_TOLERANCE[dtype] and off[where] <= GRADIENT_TOLERANCE[dtype]):
            raise SystemExit(
                f"{name} is another model: first loss {loss:.7g}, expected {wanted_loss:.7g} within "
                f"{LOSS_TOLERANCE[dtype]:g}; gradient of {where} off by {off[where]:.2g}, allowed "
                f"{GRADIENT_TOLERANCE[dtype]:g} of its norm"
            )
    print(
        f"{dtype}: first loss {wanted_loss:.5f}; all {len(runners)} agree, every gradient within {worst:.1e} of its norm"
    )


def time_in_turns(runners: dict[str, Runner], config: ModelConfig, options: argparse.Namespace) -> None:
    """Fill in each runner's seconds: --rounds rounds after the warm-up, the order rotated from round to round."""
    names = list(runners)
    bar = tqdm(total=(WARM_UP + options.rounds) * len(names), desc="timed steps", file=sys.stderr, leave=False)
    for index in range(WARM_UP + options.rounds):
        tokens, labels = batch(config, 1 + index, torch.device(options.device))
        shift = index % len(names)
        for name in names[shift:] + names[:shift]:
            seconds = runners[name].step(tokens, labels)
            if index >= WARM_UP:
                runners[name].seconds.append(seconds)
            bar.update()
    bar.close()


def summarise(runners: dict[str, Runner], dtype: str, tokens: int) -> list[Result]:
    """Medians and spreads."""
    results = []
    for name, runner in runners.items():
        ordered = sorted(runner.seconds)
        p10, p90 = (ordered[round(share * (len(ordered) - 1))] for share in (0.1, 0.9))
        median = statistics.median(ordered)
        results.append(
            Result(name, dtype, tokens / median, median, p10, p90, runner.losses[0], runner.losses[-1]),
        )
    return results


def show(results: list[Result], runners: dict[str, Runner]) -> None:
    """One line an implementation, with the speed of the first of them over it (the median of the rounds' ratios)."""
    first = runners[results[0].implementation].seconds
    print(f"{'':36} tokens/s  ms per step (p10 to p90)    speed of the first over it")
    for r in results:
        ratio = statistics.median(b / a for a, b in zip(first, runners[r.implementation].seconds, strict=True))
        print(
            f"{r.dtype} {r.implementation:36} {r.tokens_per_second:8.0f} {r.median * 1e3:8.1f} "
            f"({r.p10 * 1e3:6.1f} to {r.p90 * 1e3:6.1f})    {ratio:5.2f}",
            flush=True,
        )


def profile_in_turn(
    runners: dict[str, Runner], config: ModelConfig, dtype: str, options: argparse.Namespace
) -> dict[str, dict[str, float]]:
    """Milliseconds a step by kind of work, by implementation; printed as a table."""
    found = {}
    for name, runner in tqdm(runners.items(), desc=f"{dtype}: profile", file=sys.stderr, leave=False):
        tokens, labels = batch(config, 0, torch.device(options.device))
        seconds = profile_steps(
            runner.model, partial(runner.step, tokens, labels), options.profile_steps, compiled=runner.compiled
        )
        found[f"{dtype} {name}"] = {kind: 1e3 * value for kind, value in seconds.items()}
    kinds = [kind for kind in KINDS if any(row[kind] >= 0.05 for row in found.values())]
    print(f"{'milliseconds a step, profiled':41}" + "".join(f"{kind:>18}" for kind in kinds) + f"{'sum':>10}")
    for name, row in found.items():
        print(f"{name:41}" + "".join(f"{row[kind]:18.1f}" for kind in kinds) + f"{sum(row.values()):10.1f}")
    return found


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtypes", nargs="+", default=["bf16", "fp32"], choices=["bf16", "fp32"])
    parser.add_argument("--only", nargs="+", default=list(NAMES), metavar="NAME", help=f"some of: {'; '.join(NAMES)}")
    parser.add_argument("--rounds", type=int, default=12, help="timed steps of each implementation")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="CPU threads")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--kv-heads", type=int, default=4)
    parser.add_argument("--ffn", type=int, default=1280)
    parser.add_argument("--vocab", type=int, default=8192)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--json", type=Path, help="write the figures here")
    parser.add_argument("--profile", action="store_true", help="also profile where the time of a step goes (CPU only)")
    parser.add_argument("--profile-steps", type=int, default=3)
    options = parser.parse_args(arguments)
    unknown = set(options.only) - set(NAMES)
    if unknown:
        parser.error(f"--only: unknown {sorted(unknown)}: choose from {', '.join(NAMES)}")
    if options.profile and options.device.startswith("cuda"):
        parser.error("--profile looks at operators on a CPU: add --device cpu")
    return options


def main(arguments: list[str] | None = None) -> int:
    """Compare, time and, if asked to, profile in every dtype."""
    options = parse(arguments)
    torch.set_num_threads(options.threads)
    # Kernels of compiled graphs get names in the profile.
    inductor_config.cpp.enable_kernel_profile = options.profile
    config = ModelConfig(
        vocab_size=options.vocab,
        num_layers=options.layers,
        hidden_size=options.hidden,
        num_attention_heads=options.heads,
        num_kv_heads=options.kv_heads,
        ffn_hidden_size=options.ffn,
        seq_length=options.tokens,
    )
    device = torch.device(options.device)
    names = available(options.only, device.type == "cuda")
    count = sum(p.numel() for p in Transformer(config, KernelConfig(ops="reference"), seed=None).parameters())
    print(f"torch {torch.__version__}, {device}, {torch.get_num_threads()} threads, {count / 1e6:.1f}M parameters")
    results: list[Result] = []
    profiles: dict[str, dict[str, float]] = {}
    for dtype in options.dtypes:
        runners = {name: Runner(builder(name)(config), device, DTYPES[dtype]) for name in names}
        check_first_step(runners, config, dtype, device)
        time_in_turns(runners, config, options)
        found = summarise(runners, dtype, options.tokens)
        show(found, runners)
        results += found
        if options.profile:
            profiles |= profile_in_turn(runners, config, dtype, options)
        torch._dynamo.reset()
    if options.json:
        figures = {"results": [asdict(result) for result in results], "profile_ms": profiles}
        options.json.write_text(json.dumps(figures, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
