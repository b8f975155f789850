"""Convert models from and to Hugging Face: `convert_hf.py import HF_FOLDER OUT`, `convert_hf.py export RUN OUT`.

Architectures: llama (Llama 2 and 3, SmolLM), mistral, qwen2, qwen3, phi3, gpt_neox (Pythia), starcoder2, stablelm. Only
safetensors are read; no code that comes with a model is run.
"""

from __future__ import annotations

import argparse
import re
import signal
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # run from a checkout that is not installed

from megatronish.errors import UserError, exit_on_user_error

SIZES = {"MB": 10**6, "GB": 10**9, "MIB": 2**20, "GIB": 2**30}


def size(text: str) -> int:
    """`5GB` in bytes."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(MB|GB|MiB|GiB)", text, re.IGNORECASE)
    if match is None or float(match[1]) <= 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a size such as 500MB or 5GB")
    return int(float(match[1]) * SIZES[match[2].upper()])


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="convert_hf.py",
        description=__doc__,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="import|export")
    read = commands.add_parser(
        "import",
        allow_abbrev=False,
        help="a Hugging Face folder to one that generate.py, evaluate.py and serve.py open",
    )
    read.add_argument("source", type=Path, metavar="HF_FOLDER", help="config.json, *.safetensors, tokenizer")
    write = commands.add_parser(
        "export", allow_abbrev=False, help="a checkpoint to a folder that AutoModelForCausalLM and AutoTokenizer open"
    )
    write.add_argument("source", type=Path, metavar="RUN", help="a run's folder, one checkpoint, or an imported folder")
    write.add_argument("--which", choices=("latest", "best"), default="latest", help="checkpoint of a run (latest)")
    write.add_argument(
        "--architecture",
        metavar="NAME",
        help="e.g. llama (as it was imported, else the first that expresses the model)",
    )
    write.add_argument(
        "--max-shard-size", type=size, default=5 * 10**9, metavar="SIZE", help="of a weights file, e.g. 500MB (5GB)"
    )
    for command in (read, write):
        command.add_argument("target", type=Path, metavar="OUT", help="a new folder")
        command.add_argument("--dtype", choices=("fp32", "bf16", "fp16"), help="of the weights (as they are stored)")
        command.add_argument(
            "--verify",
            choices=("auto", "always", "never"),
            default="auto",
            help="compare logits with transformers'; auto: where it is installed and memory is free for two fp32 copies",
        )
    return parser


def main() -> int:
    arguments = build_parser().parse_args()
    with exit_on_user_error():
        run(arguments)
    return 0


def run(arguments: argparse.Namespace) -> None:
    """Convert and report. Raises UserError."""
    from tqdm import tqdm

    from megatronish.checkpoint.weights import find_model
    from megatronish.interop.huggingface import export_model, import_model
    from megatronish.ops.dtypes import DTYPES

    source, dtype = arguments.source, DTYPES.get(arguments.dtype)
    bar = tqdm(unit="B", unit_scale=True, desc=arguments.command, file=sys.stderr, disable=None, leave=False)

    def progress(done: int, total: int) -> None:
        bar.total = total
        bar.update(done)

    with bar:
        if arguments.command == "import":
            result = import_model(source, arguments.target, dtype=dtype, progress=progress)
        else:
            source = find_model(source, arguments.which)
            result = export_model(
                source,
                arguments.target,
                model_type=arguments.architecture,
                dtype=dtype,
                max_shard_bytes=arguments.max_shard_size,
                progress=progress,
            )
    tokenizer = result.tokenizer
    print(
        f"{source} -> {result.folder}: {result.model_type}, {result.parameters:,} parameters in "
        f"{str(result.dtype).removeprefix('torch.')}, {len(result.files)} file(s) of weights"
    )
    if tokenizer.kind is None:
        print("the model has no tokenizer, so the new folder has none")
    else:
        start = "" if tokenizer.bos_id is None else f", texts start with {tokenizer.bos_id}"
        print(f"tokenizer: {tokenizer.kind}, end of document {tokenizer.eod_id}{start}")
    verify(arguments, source, result.parameters)


def verify(arguments: argparse.Namespace, source: Path, parameters: int) -> None:
    """Print the agreement with transformers. Raises UserError if it is required and cannot be computed."""
    from megatronish.interop.agreement import compare, why_not

    if arguments.verify == "never":
        return
    obstacle = why_not(parameters)
    if obstacle and arguments.verify == "always":
        raise UserError(f"--verify always: {obstacle}. The conversion itself is complete.")
    if obstacle:
        print(f"not compared with transformers: {obstacle}")
        return
    pair = (arguments.target, source) if arguments.command == "import" else (source, arguments.target)
    print("\n".join(compare(*pair).lines()))


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    sys.exit(main())
