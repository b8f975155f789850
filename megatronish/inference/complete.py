"""Completions of prompts in the terminal."""

from __future__ import annotations

import argparse
import sys
import time

import torch

from megatronish.inference.batch import Batch, Request
from megatronish.inference.load import Loaded
from megatronish.inference.sampling import Sampling
from megatronish.inference.text import TextGeneration, check_stop, encode_prompt


def complete(loaded: Loaded, sampling: Sampling, arguments: argparse.Namespace) -> None:
    """Print a completion of each prompt; all are generated in one batch, and the first is streamed. Raises UserError."""
    model, tokenizer, _ = loaded
    check_stop(arguments.stop)
    texts = arguments.prompt or [""]
    prompts = [encode_prompt(tokenizer, text) for text in texts]
    length = max(len(prompt.ids) for prompt in prompts) + max(0, arguments.max_new_tokens)
    batch = Batch(
        model,
        len(prompts),
        length,
        eod_id=tokenizer.eod_id,
        vocab_size=tokenizer.vocab_size,
        compiled=arguments.compile,
    )
    generations = []
    for prompt in prompts:
        draw = torch.Generator(batch.device).manual_seed(arguments.seed)
        request = Request(prompt.ids, arguments.max_new_tokens, sampling, draw, prompt.first_ids, arguments.lookup)
        generations.append(batch.add(request))
    start = time.perf_counter()
    for text, prompt, generation in zip(texts, prompts, generations, strict=True):
        print(text, end="", flush=True)
        for piece in TextGeneration(generation, tokenizer, prompt, arguments.stop):
            print(piece, end="", flush=True)
        print(flush=True)
        drafts = f"; {generation.accepted} of {generation.drafted} draft tokens accepted" if generation.drafted else ""
        counts = f"{len(generation.new_ids)} tokens; prompt of {len(prompt.ids)}"
        print(f"[{counts}; {generation.finish_reason}{drafts}]", file=sys.stderr)
    seconds, total = time.perf_counter() - start, sum(len(generation.new_ids) for generation in generations)
    print(f"[{total} tokens in {seconds:.2f} s, {total / seconds:,.1f} tokens/s]", file=sys.stderr)
