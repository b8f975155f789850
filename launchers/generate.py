"""Generate text with a trained model: `python launchers/generate.py --checkpoint runs/demo --prompt "def "`.

Text is streamed to stdout, rates go to stderr. --interactive is a conversation, with /commands.
"""

from __future__ import annotations

import argparse
import signal
import sys

from megatronish.errors import UserError, exit_on_user_error
from megatronish.inference import arguments as shared
from megatronish.launch.process import initialize_process


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = shared.model_parser("generate.py", __doc__)
    add = parser.add_argument
    add("--prompt", action="append", metavar="TEXT", help="repeatable; empty or left out: begin a new document")
    add("--interactive", action="store_true", help="a conversation with the model; /help lists its commands")
    add("--system", metavar="TEXT", help="with --interactive: the system message")
    add("--max-new-tokens", type=int, default=200, metavar="N", help="at most N tokens per prompt or answer (200)")
    shared.add_sampling(parser)
    add("--stop", action="append", default=[], metavar="TEXT", help="end a text before this; repeatable")
    add("--lookup", type=int, default=0, metavar="N", help="speculative decoding: up to N draft tokens per step (0)")
    shared.add_loading(parser, compiled=True)
    return parser


def main() -> int:
    arguments = build_parser().parse_args()
    with exit_on_user_error():
        if arguments.interactive and arguments.prompt:
            raise UserError("--prompt and --interactive: give one of them; a conversation has no prompt")
        if arguments.lookup < 0:
            raise UserError(f"--lookup {arguments.lookup} must be at least 0")
        initialize_process()
        from megatronish.inference.chat import converse  # torch: only after the process is set up
        from megatronish.inference.complete import complete

        sampling, loaded = shared.sampling_of(arguments), shared.open_model(arguments)
        weight = next(loaded.model.parameters())
        print(f"{loaded.info.folder}: {weight.dtype} on {weight.device}", file=sys.stderr)
        (converse if arguments.interactive else complete)(loaded, sampling, arguments)
    return 0


if __name__ == "__main__":
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `generate.py ... | head` ends quietly
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    sys.stdout.reconfigure(errors="replace")  # type: ignore[union-attr]  # a terminal that is not UTF-8
    sys.exit(main())
