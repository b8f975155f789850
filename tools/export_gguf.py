"""Export a trained model to GGUF, the format of llama.cpp: `export_gguf.py RUN model.gguf`.

Llama-like models (those that llama, mistral without a window, qwen2 and qwen3 express) with a byte-level BPE, as
tools/preprocess_data.py trains it. Needs `pip install 'megatronish[gguf]'`.
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
    parser = argparse.ArgumentParser(
        prog="export_gguf.py",
        description=__doc__,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("source", type=Path, metavar="RUN", help="a run's folder, one checkpoint, or an imported folder")
    add("target", type=Path, metavar="OUT", help="a new file, by custom *.gguf")
    add("--which", choices=("latest", "best"), default="latest", help="checkpoint of a run (latest)")
    add("--dtype", choices=("fp32", "fp16", "bf16", "q8_0"), help="of the matrices (as they are stored)")
    return parser


def main() -> int:
    arguments = build_parser().parse_args()
    with exit_on_user_error():
        from megatronish.checkpoint.weights import find_model
        from megatronish.interop.gguf import export_gguf

        source = find_model(arguments.source, arguments.which)
        result = export_gguf(source, arguments.target, arguments.dtype)
        print(f"{source} -> {result.path}: {result.architecture}, {result.size / 1e6:.1f} MB")
        if not result.tokenizer:
            print("the model has no tokenizer, so the file has none")
    return 0


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    sys.exit(main())
