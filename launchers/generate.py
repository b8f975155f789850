"""Write text with a trained model: `python launchers/generate.py --checkpoint runs/demo --prompt "def "`.

Text goes to stdout as it is made, rates to stderr.
"""

from __future__ import annotations

import argparse
import signal
import sys
import time

from megatronish.config.base import UserError, explained
from megatronish.parallel.startup import settle_process


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(prog="generate.py", description=__doc__, allow_abbrev=False)
    add = parser.add_argument
    add(
        "--checkpoint",
        required=True,
        metavar="DIR",
        help="a run's folder (its best checkpoint, else its latest) or one checkpoint",
    )
    add("--prompt", action="append", metavar="TEXT", help="repeatable; empty or left out: begin a new document")
    add("--max-new-tokens", type=int, default=200, metavar="N", help="at most so many tokens a prompt (200)")
    add("--temperature", type=float, default=0.8, metavar="T", help="divides the logits; 0 is greedy (0.8)")
    add("--top-k", type=int, default=0, metavar="K", help="draw from the K best tokens; 0 is all (0)")
    add(
        "--top-p", type=float, default=0.95, metavar="P", help="draw from the best tokens of total probability P (0.95)"
    )
    add("--greedy", action="store_true", help="always take the best token, as --temperature 0")
    add("--seed", type=int, default=1234, help="of the random numbers of each prompt (1234)")
    add("--device", choices=("auto", "cpu", "cuda"), default="auto", help="auto: a GPU where there is one")
    add("--dtype", choices=("auto", "fp32", "bf16", "fp16"), default="auto", help="auto: as saved")
    return parser


def main() -> int:
    arguments = build_parser().parse_args()
    with explained():
        if not 0 <= arguments.seed < 2**63:
            raise UserError(f"--seed {arguments.seed} must be at least 0 and below 2**63")
        settle_process()
        run(arguments)
    return 0


def run(arguments: argparse.Namespace) -> None:
    """Check everything, then write a text for each prompt. Raises UserError."""
    import torch  # only after the process is settled

    from megatronish.inference.generate import generate
    from megatronish.inference.load import DTYPES, load_for_inference, resolve_device
    from megatronish.inference.prompt import encode_prompt
    from megatronish.inference.sampling import GREEDY, Sampling
    from megatronish.inference.stream import text_pieces

    sampling = Sampling(arguments.temperature, arguments.top_k, arguments.top_p)
    device = resolve_device(arguments.device)
    model, tokenizer, info = load_for_inference(arguments.checkpoint, device, DTYPES.get(arguments.dtype))
    print(f"{info.folder}: {next(model.parameters()).dtype} on {device}", file=sys.stderr)
    prompts = [(text, encode_prompt(tokenizer, text)) for text in arguments.prompt or [""]]
    generations = [
        generate(
            model,
            prompt.ids,
            arguments.max_new_tokens,
            GREEDY if arguments.greedy else sampling,
            tokenizer.eod_id,
            torch.Generator(device).manual_seed(arguments.seed),
            vocab_size=tokenizer.vocab_size,
            first_ids=prompt.first_ids,
        )
        for _, prompt in prompts
    ]
    for (text, prompt), generation in zip(prompts, generations, strict=True):
        print(text, end="", flush=True)
        start = time.perf_counter()
        for piece in text_pieces(tokenizer, prompt, generation):
            print(piece, end="", flush=True)
        seconds = time.perf_counter() - start
        print(flush=True)
        print(
            f"[{generation.new_tokens} tokens in {seconds:.2f} s, {generation.new_tokens / seconds:,.1f} tokens/s; "
            f"prompt of {generation.prompt_tokens}; {generation.finish_reason}]",
            file=sys.stderr,
        )


if __name__ == "__main__":
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `generate.py ... | head` ends quietly
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    sys.stdout.reconfigure(errors="replace")  # type: ignore[union-attr]  # a terminal that is not UTF-8
    sys.exit(main())
