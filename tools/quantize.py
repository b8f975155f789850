"""Quantize a trained model's weights to 8 or 4 bits: `python tools/quantize.py --checkpoint runs/demo --format int8 --output DIR`.

Prints the size of the weights and the perplexity on held-out text, before and after. launchers/generate.py and
launchers/serve.py open DIR.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

from megatronish.errors import UserError, exit_on_user_error
from megatronish.inference.arguments import model_parser, open_model
from megatronish.launch.process import initialize_process


def main() -> int:
    parser = model_parser("quantize.py", __doc__)
    add = parser.add_argument
    add("--format", choices=("int8", "int4"), required=True, help="bits per weight")
    add("--group", type=int, default=64, metavar="N", help="int4: columns that share a scale: 32, 64 or 128 (64)")
    add("--output", type=Path, metavar="DIR", help="write the model here; without it, only evaluate")
    add(
        "--data",
        metavar="PREFIX",
        help="a data set of the same tokenizer to evaluate on (default: that of the run)",
    )
    add("--max-tokens", type=int, default=20_000, metavar="N", help="evaluate on N held-out tokens (20,000)")
    arguments = parser.parse_args()
    with exit_on_user_error():
        if arguments.output is not None and arguments.output.exists() and any(arguments.output.iterdir()):
            raise UserError(f"--output {arguments.output}: is not empty; name a new folder")
        initialize_process()
        from megatronish.checkpoint.manifest import MANIFEST_FILE, write_manifest
        from megatronish.inference.held_out import evaluate_model
        from megatronish.inference.quantize import quantize_model, save_quantized, stored_bytes

        loaded = open_model(arguments)
        before, size = evaluate_model(loaded, arguments.data, None, arguments.max_tokens), stored_bytes(loaded.model)
        quantize_model(loaded.model, arguments.format, arguments.group)
        after, narrow = evaluate_model(loaded, arguments.data, None, arguments.max_tokens), stored_bytes(loaded.model)
        print(f"{'':8}{'weights, MB':>13}{'perplexity':>12}{'bits per byte':>15}")
        print(f"{'before':8}{size / 1e6:>13.1f}{before.perplexity:>12.4f}{before.bits_per_byte:>15.4f}")
        print(f"{arguments.format:8}{narrow / 1e6:>13.1f}{after.perplexity:>12.4f}{after.bits_per_byte:>15.4f}")
        print(
            f"{'change':8}{narrow / size - 1:>13.1%}{after.perplexity / before.perplexity - 1:>12.2%}"
            f"{after.bits_per_byte / before.bits_per_byte - 1:>15.2%}   on {after.tokens:,} tokens of {after.data}"
        )
        if arguments.output is not None:
            arguments.output.mkdir(parents=True, exist_ok=True)
            for path in loaded.info.folder.iterdir():  # tokenizer, chat template, run description
                kept = path.suffix not in (".safetensors", ".pt", ".bin") and path.name != MANIFEST_FILE
                if path.is_file() and kept:
                    shutil.copy2(path, arguments.output)
            save_quantized(arguments.output, loaded.model, arguments.format, arguments.group)
            write_manifest(arguments.output, loaded.info.step or 0)
            print(f"written to {arguments.output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
