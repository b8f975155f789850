"""Write text with a trained model: `python launchers/generate.py --checkpoint runs/demo --prompt "def "`.

Text goes to stdout as it is made, rates to stderr. --interactive is a conversation, with /commands.
"""

from __future__ import annotations

import argparse
import signal
import sys
import time
from typing import TYPE_CHECKING

from megatronish.errors import UserError, exit_on_user_error
from megatronish.inference.arguments import (
    add_compile,
    add_quantize,
    add_sampling,
    model_parser,
    open_model,
    sampling_of,
)
from megatronish.launch.process import initialize_process

if TYPE_CHECKING:  # torch: only after the process is settled
    from megatronish.inference.load import Loaded
    from megatronish.inference.sampling import Sampling


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = model_parser("generate.py", __doc__)
    add = parser.add_argument
    add("--prompt", action="append", metavar="TEXT", help="repeatable; empty or left out: begin a new document")
    add("--interactive", action="store_true", help="talk to the model; /help lists what else can be typed")
    add("--system", metavar="TEXT", help="with --interactive: what the model is told before the conversation")
    add("--max-new-tokens", type=int, default=200, metavar="N", help="at most so many tokens a prompt or answer (200)")
    add_sampling(parser)
    add("--stop", action="append", default=[], metavar="TEXT", help="end a text before this; repeatable")
    add("--lookup", type=int, default=0, metavar="N", help="guess N tokens ahead where text repeats itself (0)")
    add_quantize(parser)
    add_compile(parser)
    return parser


def main() -> int:
    arguments = build_parser().parse_args()
    with exit_on_user_error():
        if arguments.interactive and arguments.prompt:
            raise UserError(
                "--prompt and --interactive: give one of them; what is typed is the prompt of a conversation"
            )
        initialize_process()
        run(arguments)
    return 0


def run(arguments: argparse.Namespace) -> None:
    """Check everything, then write a text for each prompt, or talk. Raises UserError."""
    sampling = sampling_of(arguments)
    if arguments.lookup < 0:
        raise UserError(f"--lookup {arguments.lookup} must be at least 0")
    loaded = open_model(arguments)
    weight = next(loaded.model.parameters())
    print(f"{loaded.info.folder}: {weight.dtype} on {weight.device}", file=sys.stderr)
    if arguments.interactive:
        from megatronish.inference.chat import converse

        signal.signal(signal.SIGINT, signal.default_int_handler)  # Ctrl-C ends an answer, not the conversation
        converse(loaded, sampling, arguments)
        return
    write(loaded, sampling, arguments)


def write(loaded: Loaded, sampling: Sampling, arguments: argparse.Namespace) -> None:
    """A text for each prompt, all made together, the first shown as it comes."""
    import torch

    from megatronish.inference.batch import Batch, Request
    from megatronish.inference.generate import TextGeneration
    from megatronish.inference.prompt import encode_prompt
    from megatronish.inference.stream import StopStrings

    model, tokenizer, _ = loaded
    StopStrings(arguments.stop)
    texts = arguments.prompt or [""]
    prompts = [encode_prompt(tokenizer, text) for text in texts]
    length = max(len(prompt.ids) for prompt in prompts) + max(0, arguments.max_new_tokens)
    length = min(length, model.config.seq_length)
    batch = Batch(
        model,
        len(prompts),
        length,
        eod_id=tokenizer.eod_id,
        vocab_size=tokenizer.vocab_size,
        compiled=arguments.compile,
    )
    requests = []
    for prompt in prompts:
        draw = torch.Generator(batch.device).manual_seed(arguments.seed)
        requests.append(
            Request(prompt.ids, arguments.max_new_tokens, sampling, draw, prompt.first_ids, arguments.lookup)
        )
        batch.check(requests[-1])
    start, total = time.perf_counter(), 0
    for text, prompt, request in [(t, p, batch.add(r)) for t, p, r in zip(texts, prompts, requests, strict=True)]:
        print(text, end="", flush=True)
        for piece in TextGeneration(request, tokenizer, prompt, arguments.stop):
            print(piece, end="", flush=True)
        print(flush=True)
        guesses = f"; {request.accepted} of {request.guessed} guesses right" if request.guessed else ""
        print(
            f"[{request.new_tokens} tokens; prompt of {request.prompt_tokens}; {request.finish_reason}{guesses}]",
            file=sys.stderr,
        )
        total += request.new_tokens
    seconds = time.perf_counter() - start
    print(f"[{total} tokens in {seconds:.2f} s, {total / seconds:,.1f} tokens/s]", file=sys.stderr)


if __name__ == "__main__":
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `generate.py ... | head` ends quietly
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    sys.stdout.reconfigure(errors="replace")  # type: ignore[union-attr]  # a terminal that is not UTF-8
    sys.exit(main())
