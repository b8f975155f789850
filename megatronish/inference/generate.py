"""Text from a model: one sequence of ids, or several texts at once with their stop strings."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from megatronish.data.tokenizers.tokenizer import Tokenizer
from megatronish.inference.batch import Batch, Generation, Request
from megatronish.inference.prompt import Prompt
from megatronish.inference.sampling import Sampling
from megatronish.inference.stream import StopStrings, TextStream
from megatronish.model.transformer import Transformer


def generate(
    model: Transformer,
    prompt_ids: Sequence[int],
    max_new_tokens: int,
    sampling: Sampling,
    eod_id: int | None = None,
    generator: torch.Generator | None = None,
    *,
    vocab_size: int | None = None,
    first_ids: Sequence[int] | None = None,
    lookup: int = 0,
) -> Generation:
    """Continue `prompt_ids` by at most `max_new_tokens` ids, each drawn from the model's logits.

    Ends at `eod_id`, or when the model has read model.config.seq_length tokens, the longest it was trained on (see
    `Generation.finish_reason`). generator: random numbers for this call, on the model's device. The rest is as in `Batch`
    and `Request`. Raises UserError for an empty prompt, one longer than the context, or ids outside the vocabulary, all
    before anything is computed.
    """
    request = Request(prompt_ids, max_new_tokens, sampling, generator, first_ids, lookup)
    length = max(1, min(model.config.seq_length, len(prompt_ids) + max(0, max_new_tokens)))
    if length < len(prompt_ids) or len(prompt_ids) == 0:
        length = model.config.seq_length  # `check` says what is wrong
    return Batch(model, 1, length, eod_id=eod_id, vocab_size=vocab_size).add(request)


class TextGeneration(Iterator[str]):
    """The text of a generation, piece by piece: whole characters only, and nothing from a stop string on.

    `text` is what was given so far. `finish_reason` is that of the generation, "stop string" where one ended it.
    """

    def __init__(self, generation: Generation, tokenizer: Tokenizer, prompt: Prompt, stop: Sequence[str] = ()) -> None:
        """Raises UserError for an empty stop string."""
        self.generation = generation
        self.text = ""
        self._stream = TextStream(tokenizer, prompt.ids, prompt.overlap)
        self._stops = StopStrings(stop)
        self._taken = 0
        self._flushed = False

    @property
    def finished(self) -> bool:
        """Whether `take` has nothing more to give."""
        return self._flushed

    def take(self) -> str:
        """The text that has become certain since the last call, from the ids that are there; ends the generation where
        a stop string is whole."""
        piece = ""
        ids = self.generation.new_ids
        while self._taken < len(ids) and not self._stops.found:
            piece += self._stops.push(self._stream.push(ids[self._taken]))
            self._taken += 1
        if self._stops.found:
            if self.generation.finish_reason is None:
                self.generation.batch.finish(self.generation, "stop string")
            self.generation.finish_reason = "stop string"  # also where the same step ended it otherwise
            self._flushed = True
        elif self.generation.finish_reason is not None and not self._flushed:
            self._flushed = True
            piece += self._stops.push(self._stream.finish())
            piece += self._stops.finish()
            if self._stops.found:
                self.generation.finish_reason = "stop string"
        self.text += piece
        return piece

    def __next__(self) -> str:
        if self._flushed:
            raise StopIteration
        if self._taken == len(self.generation.new_ids) and self.generation.finish_reason is None:
            self.generation.batch.step()
        return self.take()
