"""Evaluate a model on held-out text: `python launchers/evaluate.py --checkpoint runs/demo`.

Loss, perplexity and bits per byte, compared with gzip -9 and xz -9e on the same bytes; also written to
RUN/evaluation.json.
"""

from __future__ import annotations

import argparse
import signal
import sys

from megatronish.errors import exit_on_user_error
from megatronish.inference.arguments import add_loading, model_parser, open_model
from megatronish.launch.process import initialize_process


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = model_parser("evaluate.py", __doc__)
    add = parser.add_argument
    add("--data", metavar="PREFIX", help="a data set of the same tokenizer (default: that of the run)")
    add("--stride", type=int, metavar="N", help="tokens scored per window; fewer give more context (half the context)")
    add("--max-tokens", type=int, metavar="N", help="only the first held-out documents, up to N tokens (all)")
    add_loading(parser)
    return parser


def main() -> int:
    arguments = build_parser().parse_args()
    with exit_on_user_error():
        initialize_process()
        from megatronish.inference.held_out import evaluate_model  # torch: only after the process is settled

        loaded = open_model(arguments)
        result = evaluate_model(loaded, arguments.data, arguments.stride, arguments.max_tokens)
        print(result.table())
        print(f"written to {result.save(loaded.info.run_dir)}")
    return 0


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    sys.exit(main())
