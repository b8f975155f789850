"""Text from a model, one sequence at a time: the prompt is read once, then each new token is read behind it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Literal

import torch

from megatronish.config.base import UserError
from megatronish.inference.sampling import Sampling, choose
from megatronish.model.kv_cache import KVCache
from megatronish.model.transformer import Transformer

FinishReason = Literal["end of document", "max new tokens", "context full"]
# A long prompt is read so many tokens at a time: the logits of all its tokens would take [prompt, V] memory.
PREFILL_TOKENS = 512


class Generation(Iterator[int]):
    """Iterator over new token ids; the end-of-document token ends it and is not among them.

    `finish_reason` is None until it ends. `prompt_tokens` and `new_tokens` count what was read and given.
    """

    def __init__(
        self,
        model: Transformer,
        prompt_ids: Sequence[int],
        max_new_tokens: int,
        sampling: Sampling,
        eod_id: int | None,
        generator: torch.Generator | None,
        vocab_size: int | None,
        first_ids: Sequence[int] | None,
    ) -> None:
        context, known = model.config.seq_length, vocab_size or model.config.vocab_size
        if max_new_tokens < 1:
            raise UserError(f"max new tokens {max_new_tokens} must be at least 1")
        if len(prompt_ids) == 0:
            raise UserError("the prompt is empty and the tokenizer has no end-of-document token to start from")
        if len(prompt_ids) > context:
            raise UserError(
                f"the prompt has {len(prompt_ids):,} tokens, but the model's context is {context:,}: shorten the prompt, "
                "or use a model trained with a longer seq_length"
            )
        if not 0 <= min(prompt_ids) <= max(prompt_ids) < known:
            raise UserError(f"prompt ids {min(prompt_ids)}..{max(prompt_ids)} are outside 0..{known - 1}")
        self.prompt_tokens = len(prompt_ids)
        self.new_tokens = 0
        self.finish_reason: FinishReason | None = None
        self._model, self._sampling, self._generator = model, sampling, generator
        self._eod_id, self._vocab_size, self._max_new_tokens = eod_id, known, max_new_tokens
        self._unread, self._first_ids = list(prompt_ids), first_ids
        self._cache: KVCache | None = None

    def __next__(self) -> int:
        if self.finish_reason is None and self.new_tokens == self._max_new_tokens:
            self.finish_reason = "max new tokens"
        if self.finish_reason is None and self.prompt_tokens + self.new_tokens > self._model.config.seq_length:
            self.finish_reason = "context full"
        if self.finish_reason is not None:
            raise StopIteration
        token = self._step()
        if token == self._eod_id:
            self.finish_reason = "end of document"
            raise StopIteration
        self.new_tokens += 1
        self._unread = [token]
        return token

    # A method and not a `with` around a yield: that would leave the caller in inference mode between two tokens.
    @torch.inference_mode()
    def _step(self) -> int:
        """Read what is unread and draw the token that follows it."""
        weight = next(self._model.parameters())
        if self._cache is None:  # made here, so that a generation that waits its turn holds no memory
            length = min(self._model.config.seq_length, self.prompt_tokens + self._max_new_tokens)
            self._cache = KVCache(self._model.config, 1, length, device=weight.device, dtype=weight.dtype)
        tokens = torch.tensor([self._unread], device=weight.device)
        for piece in tokens.split(PREFILL_TOKENS, dim=1):
            logits = self._model(piece, cache=self._cache)[:, -1]
        logits = logits[:, : self._vocab_size]  # a vocabulary padded for speed has ids that no tokenizer knows
        if self._first_ids is not None and self.new_tokens == 0:
            among = torch.tensor(self._first_ids, device=weight.device)
            return int(among[choose(logits[:, among], self._sampling, self._generator)])
        return int(choose(logits, self._sampling, self._generator))


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
) -> Generation:
    """Continue `prompt_ids` by at most `max_new_tokens` ids, each drawn from the model's logits.

    Ends at `eod_id`, or when the model has read model.config.seq_length tokens, the longest it was trained on (see
    `Generation.finish_reason`). generator: random numbers for this call, on the model's device. vocab_size: the
    tokenizer's; larger ids are never drawn. first_ids: the first new token is one of these (see `Prompt`). Raises UserError for an empty prompt, one longer than the context, or ids
    outside the vocabulary, all before anything is computed.
    """
    return Generation(model, prompt_ids, max_new_tokens, sampling, eod_id, generator, vocab_size, first_ids)
