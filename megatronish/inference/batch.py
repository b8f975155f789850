"""Several sequences generated side by side over one key/value cache, each coming and going when it likes.

A step reads a piece of a prompt or several short prompts, then one new token (or a guessed run of them) of every sequence that has read its own:
"continuous batching" (Yu et al. 2022, Orca) with prompts in pieces (Agrawal et al. 2023, Sarathi).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from megatronish.errors import UserError
from megatronish.inference.compiled import CompiledStep
from megatronish.inference.lookup import PromptLookup
from megatronish.inference.sampling import Sampling, choose
from megatronish.model.kv_cache import CACHE_CHUNK, KVCache
from megatronish.model.transformer import Transformer
from megatronish.ops.linear import FEW_ROWS

FILLED = 16  # short prompts are read together with zeros behind them, up to a multiple of so many tokens

FinishReason = Literal["end of document", "max new tokens", "context full", "stop string", "cancelled"]


@dataclass(frozen=True)
class Request:
    """What to continue, and how. prompt_ids: what the model reads, one id at least. first_ids: the first new token is one
    of these (see `Prompt`). lookup: guess so many tokens ahead where the text repeats itself (0: never; the same text
    comes out). stop_ids: ids that end the text beside the end of a document. logprobs: record the log-probability of every token and of so many best ones (None: record nothing).
    ignore_eod: go on behind the end-of-document token, as a benchmark does."""

    prompt_ids: Sequence[int]
    max_new_tokens: int
    sampling: Sampling
    generator: torch.Generator | None = None
    first_ids: Sequence[int] | None = None
    lookup: int = 0
    logprobs: int | None = None
    stop_ids: frozenset[int] = frozenset()
    ignore_eod: bool = False


@dataclass
class TokenScore:
    """Log-probability of a token in the model's own distribution (before any of Sampling), and of the best ones."""

    logprob: float
    best: list[tuple[int, float]]


@dataclass(eq=False)
class Generation(Iterator[int]):
    """Iterator over new token ids; the end-of-document token ends it and is not among them.

    Asking for an id lets the whole batch go on until there is one. `finish_reason` is None until it ends. `new_ids` are
    the ids so far, `scores` theirs where asked for; `guessed` and `accepted` count the tokens of `Request.lookup`.
    """

    batch: Batch
    request: Request
    new_ids: list[int] = field(default_factory=list)
    scores: list[TokenScore] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    guessed: int = 0
    accepted: int = 0
    ids: list[int] = field(default_factory=list)  # prompt and new
    read: int = 0  # of `ids` by the model
    slot: int | None = None
    lookup: PromptLookup | None = None
    given: int = 0  # new ids that iteration has given

    def __post_init__(self) -> None:
        self.ids = list(self.request.prompt_ids)
        self.lookup = PromptLookup(self.ids, self.request.lookup) if self.request.lookup else None

    @property
    def prompt_tokens(self) -> int:
        """Tokens of the prompt."""
        return len(self.request.prompt_ids)

    @property
    def new_tokens(self) -> int:
        """Tokens written so far."""
        return len(self.new_ids)

    @property
    def unread(self) -> int:
        """Ids that the model has not read."""
        return len(self.ids) - self.read

    def __next__(self) -> int:
        while self.given == len(self.new_ids):
            if self.finish_reason is not None:
                raise StopIteration
            self.batch.step()
        self.given += 1
        return self.new_ids[self.given - 1]


class Batch:
    """A model, a cache of `slots` rows of `max_length` tokens (the model's context by default), and what runs in them.

    eod_id: the token that ends a text. vocab_size: the tokenizer's; larger ids are never drawn. keep_prefixes: a prompt
    that begins as an earlier one of the same slot does is not read again that far; its numbers then differ in rounding
    from those of a prompt read at once. compiled: one new token of every sequence is a graph of torch.compile, made when
    first needed.
    """

    def __init__(
        self,
        model: Transformer,
        slots: int = 1,
        max_length: int | None = None,
        *,
        eod_id: int | None = None,
        vocab_size: int | None = None,
        keep_prefixes: bool = False,
        compiled: bool = False,
    ) -> None:
        self.model = model
        self.max_length = min(max_length or model.config.seq_length, model.config.seq_length)
        self.eod_id, self.vocab_size = eod_id, vocab_size or model.config.vocab_size
        self.keep_prefixes = keep_prefixes
        self._step = CompiledStep(model) if compiled else None
        self.waiting: deque[Generation] = deque()
        self.running: list[Generation] = []
        weight = next(model.parameters())
        self.device = weight.device
        self._cache = KVCache(model.config, slots, self.max_length, device=weight.device, dtype=weight.dtype)
        self._held: list[list[int]] = [[] for _ in range(slots)]  # the ids that a slot's keys and values are of
        self._free = list(range(slots))

    @property
    def cache_bytes(self) -> int:
        """Memory of the cache."""
        return self._cache.nbytes

    def check(self, request: Request) -> None:
        """Raise UserError for a request that cannot be served: too long a prompt, ids outside the vocabulary, no tokens."""
        ids = request.prompt_ids
        if request.max_new_tokens < 1:
            raise UserError(f"max new tokens {request.max_new_tokens} must be at least 1")
        if len(ids) == 0:
            raise UserError("the prompt is empty and the tokenizer has no end-of-document token to start from")
        if len(ids) > self.max_length:
            limit = "use a model trained with a longer seq_length"
            if self.max_length < self.model.config.seq_length:
                limit = f"raise the limit (the model's own is {self.model.config.seq_length:,})"
            raise UserError(
                f"the prompt has {len(ids):,} tokens, but the model's context is {self.max_length:,}: shorten the prompt, "
                f"or {limit}"
            )
        if not 0 <= min(ids) <= max(ids) < self.vocab_size:
            raise UserError(f"prompt ids {min(ids)}..{max(ids)} are outside 0..{self.vocab_size - 1}")

    def add(self, request: Request) -> Generation:
        """Queue a request; it gets a slot when one is free, in the order of arrival. Raises UserError, see `check`."""
        self.check(request)
        generation = Generation(self, request)
        self.waiting.append(generation)
        return generation

    def finish(self, generation: Generation, reason: FinishReason) -> None:
        """End a generation and free its slot; nothing happens to one that has ended."""
        if generation.finish_reason is not None:
            return
        generation.finish_reason = reason
        if generation.slot is None:
            self.waiting.remove(generation)
            return
        self.running.remove(generation)
        self._free.append(generation.slot)

    # Not a `with` around a yield: that would leave the caller in inference mode between two tokens.
    @torch.inference_mode()
    def step(self) -> None:
        """A piece of a prompt, or several short ones, and one decoding pass for all that have read theirs."""
        while self.waiting and self._free:
            self._admit(self.waiting.popleft())
        ready = [each for each in self.running if each.unread == 1]
        last: list[tuple[Generation, Tensor]] = []
        for group in self._groups():
            hidden = self._read_pieces(group)
            last += [(each, row) for each, row in zip(group, hidden, strict=True) if each.unread == 0]
        self._begin(last)
        self._decode(ready)

    def _admit(self, generation: Generation) -> None:
        """Give it the free slot whose contents its prompt shares the longest beginning with."""
        shared = {slot: self._shared(slot, generation.ids) for slot in self._free}
        slot = max(self._free, key=lambda slot: (shared[slot], -len(self._held[slot])))
        self._free.remove(slot)
        generation.slot, generation.read = slot, shared[slot]
        row = self._cache.select([slot])
        if shared[slot]:
            row.rewind(shared[slot])
        else:
            row.reset()
        del self._held[slot][shared[slot] :]
        self.running.append(generation)

    def _shared(self, slot: int, ids: list[int]) -> int:
        held = self._held[slot]
        if not self.keep_prefixes:
            return 0
        limit = min(len(held), len(ids) - 1)  # the last id is read in any case: its logits are wanted
        count = next((i for i in range(limit) if held[i] != ids[i]), limit)
        return count if self._cache.can_rewind(len(held) - count) else 0

    def _groups(self) -> Iterable[list[Generation]]:
        """Whose prompts this step reads a piece of, those together that one forward pass reads.

        A piece is never cut by what was read before it, and pieces are read together only as far as the CPU's kernels compute
        every row by itself (ops/linear.py): its numbers do not depend on its neighbours there.
        """
        groups: dict[int, list[Generation]] = {}
        room = CACHE_CHUNK
        for each in self.running:
            if each.unread == 1:
                continue
            piece = min(each.unread, self._cache.chunk)
            if piece > room:
                break
            room -= piece
            together = id(each) if piece > FEW_ROWS else -(-piece // FILLED)
            groups.setdefault(together, []).append(each)
        return groups.values()

    def _read_pieces(self, group: list[Generation]) -> Tensor:
        """Read the next pieces of prompts, shorter ones filled up; what the head would read of the last token of each,
        [b, hidden]."""
        pieces = [each.ids[each.read :][: self._cache.chunk] for each in group]
        width = max(map(len, pieces))
        tokens = torch.tensor([piece + [0] * (width - len(piece)) for piece in pieces], device=self.device)
        slots = [each.slot for each in group if each.slot is not None]
        hidden = self.model.last_hidden(tokens, self._cache.select(slots), [len(piece) for piece in pieces])
        for slot, each, piece in zip(slots, group, pieces, strict=True):
            self._held[slot] += piece
            each.read += len(piece)
        return hidden

    def _begin(self, last: list[tuple[Generation, Tensor]]) -> None:
        """Draw the first new token of each whose prompt is read, from what the head would read: the head is the largest
        matrix of a small model, and reads its weights once for all of them, each row by itself as long as they are few."""
        assert self.model.head is not None, "generation needs the whole model"
        for part in (last[start : start + FEW_ROWS] for start in range(0, len(last), FEW_ROWS)):
            logits = self.model.head(torch.stack([hidden for _, hidden in part]))
            for (generation, _), row in zip(part, logits, strict=True):
                self._take(generation, row)

    def _decode(self, ready: list[Generation]) -> None:
        """Read the last token of each, with the guesses behind it, and draw the tokens that follow."""
        if not ready:
            return
        room = self.max_length - max(each.read for each in ready)
        guesses = [self._guess(each, room - 1) for each in ready]
        width = 1 + max(map(len, guesses))
        rows = [
            ([each.ids[-1], *guess] + [0] * width)[:width] for each, guess in zip(ready, guesses, strict=True)
        ]  # zeros fill up shorter guesses: what they write is forgotten again
        cache = self._cache.select([each.slot for each in ready if each.slot is not None])
        tokens = torch.tensor(rows, device=self.device)
        if self._step is not None and width == 1:
            logits = self._step(tokens, cache)
        else:
            logits = self.model(tokens, cache=cache)
        for row, (each, guess) in enumerate(zip(ready, guesses, strict=True)):
            assert each.slot is not None, "running generations have a slot"
            slot, start = each.slot, each.read
            read = [each.ids[-1]]
            for place in range(width):
                self._take(each, logits[row, place])
                right = place < len(guess) and each.finish_reason is None and each.ids[-1] == guess[place]
                if not right:
                    break
                read.append(guess[place])
            each.accepted += len(read) - 1
            each.guessed += len(guess)
            each.read = start + len(read)
            self._held[slot] += read
            if len(read) < width:
                self._cache.select([slot]).rewind(each.read)

    def _guess(self, generation: Generation, room: int) -> list[int]:
        if generation.lookup is None:
            return []
        left = generation.request.max_new_tokens - generation.new_tokens - 1
        return generation.lookup.guess(min(left, room))

    def _take(self, generation: Generation, logits: Tensor) -> None:
        """Draw the token that follows the ids so far from logits [V]; end the generation where it ends."""
        request = generation.request
        logits = logits[: self.vocab_size]  # a vocabulary padded for speed has ids that no tokenizer knows
        drawn_from = logits
        if request.first_ids is not None and generation.new_tokens == 0:
            among = torch.tensor(request.first_ids, device=self.device)
            drawn_from = torch.full_like(logits, -torch.inf).scatter(0, among, logits[among])
        token = int(choose(drawn_from[None], request.sampling, request.generator, generation.ids))
        if (token == self.eod_id or token in request.stop_ids) and not request.ignore_eod:
            self.finish(generation, "end of document")
            return
        if request.logprobs is not None:
            generation.scores.append(_score(logits, token, request.logprobs))
        generation.ids.append(token)
        generation.new_ids.append(token)
        if generation.lookup is not None:
            generation.lookup.push(token)
        if generation.new_tokens == request.max_new_tokens:
            self.finish(generation, "max new tokens")
        elif len(generation.ids) > self.max_length:
            self.finish(generation, "context full")


def _score(logits: Tensor, token: int, count: int) -> TokenScore:
    logprobs = logits.float().log_softmax(-1)
    values, ids = logprobs.topk(min(count, len(logprobs)))
    return TokenScore(float(logprobs[token]), list(zip(ids.tolist(), values.tolist(), strict=True)))
