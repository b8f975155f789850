"""Export a trained model to ONNX: `export_onnx.py RUN OUT` writes OUT/model.onnx, its tokenizer, and config.json.

One graph for prefill and for decoding with a cache, with the names of optimum. Needs `pip install 'megatronish[onnx]'`.
"""

from __future__ import annotations

import argparse
import signal
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # run from a checkout that is not installed

from megatronish.errors import exit_on_user_error


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(prog="export_onnx.py", description=__doc__, allow_abbrev=False)
    add = parser.add_argument
    add("source", type=Path, metavar="RUN", help="a run's folder, one checkpoint, or an imported folder")
    add("target", type=Path, metavar="OUT", help="a new folder")
    add("--which", choices=("latest", "best"), default="latest", help="checkpoint of a run (latest)")
    add("--dtype", choices=("fp32", "fp16"), default="fp32", help="of the weights and the arithmetic (fp32)")
    return parser


def main() -> int:
    arguments = build_parser().parse_args()
    with exit_on_user_error():
        from megatronish.checkpoint.weights import find_model
        from megatronish.interop.onnx import export_onnx
        from megatronish.ops.dtypes import DTYPES

        source = find_model(arguments.source, arguments.which)
        result = export_onnx(source, arguments.target, DTYPES[arguments.dtype])
        print(f"{source} -> {result.folder}: {result.size / 1e6:.1f} MB")
        if result.model_type is None:
            print("no config.json: no Hugging Face architecture expresses this model; the graph needs none")
        if result.difference is None:
            print("not compared: onnxruntime is not installed")
        else:
            print(
                f"onnxruntime's logits, prompt and cached, agree to {result.difference:.1e} of the largest "
                f"({result.tokens} tokens)"
            )
    return 0


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    sys.exit(main())
