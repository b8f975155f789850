"""Command-line arguments shared by launchers for trained models. Torch is imported only after the process is set up."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from megatronish.errors import UserError

if TYPE_CHECKING:
    from megatronish.inference.load import Loaded
    from megatronish.inference.sampling import Sampling


def model_parser(program: str, description: str | None) -> argparse.ArgumentParser:
    """A parser with --checkpoint, --device and --dtype."""
    parser = argparse.ArgumentParser(prog=program, description=description, allow_abbrev=False)
    add = parser.add_argument
    add("--checkpoint", required=True, metavar="DIR", help="a run (its best checkpoint, else its latest), one checkpoint, or an "
        "exported or quantized folder")  # fmt: skip
    add("--device", choices=("auto", "cpu", "cuda"), default="auto", help="auto: a GPU where there is one")
    add("--dtype", choices=("auto", "fp32", "bf16", "fp16"), default="auto", help="auto: as saved")
    return parser


def add_loading(parser: argparse.ArgumentParser, compiled: bool = False) -> None:
    """Add --quantize, and --compile with `compiled`."""
    add = parser.add_argument
    choices = ("none", "int8", "int4")
    add("--quantize", choices=choices, default="none", help="quantize the weights (tools/quantize.py saves them)")
    if compiled:
        cost = "compiles for seconds per layer, then about 7%% faster on CPUs"
        add("--compile", action="store_true", help=f"decode with torch.compile: {cost}")


def add_sampling(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of sampling."""
    add = parser.add_argument
    add("--temperature", type=float, default=0.8, metavar="T", help="divides the logits; 0 is greedy (0.8)")
    add("--top-k", type=int, default=0, metavar="K", help="sample from the K best tokens; 0 is all (0)")
    add(
        "--top-p",
        type=float,
        default=0.95,
        metavar="P",
        help="sample from the best tokens of total probability P (0.95)",
    )
    add(
        "--min-p", type=float, default=0.0, metavar="P", help="only tokens of at least P times the best probability (0)"
    )
    add("--repetition-penalty", type=float, default=1.0, metavar="R", help="above 1: fewer repetitions (1)")
    add("--greedy", action="store_true", help="always take the best token, as --temperature 0")
    add("--seed", type=int, default=1234, help="random seed of each prompt (1234)")


def sampling_of(arguments: argparse.Namespace) -> Sampling:
    """The sampling parameters of the arguments. Raises UserError for values out of range."""
    from megatronish.inference.sampling import Sampling

    if not 0 <= arguments.seed < 2**63:
        raise UserError(f"--seed {arguments.seed} must be at least 0 and below 2**63")
    return Sampling(
        0.0 if arguments.greedy else arguments.temperature,
        arguments.top_k,
        arguments.top_p,
        arguments.min_p,
        arguments.repetition_penalty,
    )


def open_model(arguments: argparse.Namespace) -> Loaded:
    """Load the model of the arguments. Raises UserError."""
    from megatronish.inference.load import load_for_inference, resolve_device
    from megatronish.ops.dtypes import DTYPES

    loaded = load_for_inference(arguments.checkpoint, resolve_device(arguments.device), DTYPES.get(arguments.dtype))
    if getattr(arguments, "quantize", "none") != "none":
        from megatronish.inference.quantize import quantize_model

        quantize_model(loaded.model, arguments.quantize)
    return loaded
