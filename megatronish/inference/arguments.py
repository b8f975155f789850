"""The command-line arguments that launchers of a trained model share. No torch: that waits until the process is settled."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from megatronish.errors import UserError

if TYPE_CHECKING:
    from megatronish.inference.load import Loaded
    from megatronish.inference.sampling import Sampling


def model_parser(program: str, description: str | None) -> argparse.ArgumentParser:
    """A parser that knows --checkpoint, --device and --dtype."""
    parser = argparse.ArgumentParser(prog=program, description=description, allow_abbrev=False)
    parser.add_argument(
        "--checkpoint",
        required=True,
        metavar="DIR",
        help="a run's folder (its best checkpoint, else its latest), one checkpoint, or an exported or quantized folder",
    )
    parser.add_argument(
        "--device", choices=("auto", "cpu", "cuda"), default="auto", help="auto: a GPU where there is one"
    )
    parser.add_argument("--dtype", choices=("auto", "fp32", "bf16", "fp16"), default="auto", help="auto: as saved")
    return parser


def add_quantize(parser: argparse.ArgumentParser) -> None:
    """--quantize, for weights that are narrowed as they are loaded."""
    parser.add_argument(
        "--quantize",
        choices=("none", "int8", "int4"),
        default="none",
        help="narrow the weights after loading (tools/quantize.py saves them narrowed)",
    )


def add_compile(parser: argparse.ArgumentParser) -> None:
    """--compile, for who generates long enough."""
    parser.add_argument(
        "--compile",
        action="store_true",
        help="the decoding step as one graph of torch.compile: seconds a layer at first, then faster by some 7%% on CPUs",
    )


def add_sampling(parser: argparse.ArgumentParser, temperature: float = 0.8) -> None:
    """How tokens are drawn."""
    add = parser.add_argument
    add(
        "--temperature",
        type=float,
        default=temperature,
        metavar="T",
        help=f"divides the logits; 0 is greedy ({temperature})",
    )
    add("--top-k", type=int, default=0, metavar="K", help="draw from the K best tokens; 0 is all (0)")
    add(
        "--top-p", type=float, default=0.95, metavar="P", help="draw from the best tokens of total probability P (0.95)"
    )
    add("--min-p", type=float, default=0.0, metavar="P", help="only tokens of P times the best one's probability (0)")
    add(
        "--repetition-penalty",
        type=float,
        default=1.0,
        metavar="R",
        help="above 1: what was written comes back less (1)",
    )
    add("--greedy", action="store_true", help="always take the best token, as --temperature 0")
    add("--seed", type=int, default=1234, help="of the random numbers of each prompt (1234)")


def sampling_of(arguments: argparse.Namespace) -> Sampling:
    """The sampling that the arguments ask for. Raises UserError for values out of range."""
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
    """The model that the arguments name, loaded. Raises UserError."""
    from megatronish.inference.load import load_for_inference, resolve_device
    from megatronish.ops.dtypes import DTYPES

    loaded = load_for_inference(arguments.checkpoint, resolve_device(arguments.device), DTYPES.get(arguments.dtype))
    if getattr(arguments, "quantize", "none") != "none":
        from megatronish.inference.quantize import quantize_model

        quantize_model(loaded.model, arguments.quantize)
    return loaded
