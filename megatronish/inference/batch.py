"""Text generation with continuous batching (Yu et al. 2022, Orca) and chunked prefill (Agrawal et al. 2023, Sarathi).

Sequences share one key/value cache and enter and leave the batch independently. Each step runs prefill on one chunk of a
long prompt or on several short prompts, then decodes one token (or several draft tokens) of every other sequence.
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
from megatronish.inference.prompt_lookup import PromptLookup
from megatronish.inference.sampling import Sampling, choose
from megatronish.model.kv_cache import CACHE_CHUNK, KVCache
from megatronish.model.transformer import Transformer
from megatronish.ops.linear import FEW_ROWS

PADDING_MULTIPLE = 16  # short prompts of one forward pass are padded to a multiple of this length

FinishReason = Literal["end of document", "max new tokens", "context full", "stop string", "cancelled"]


@dataclass(frozen=True)
class Request:
    """Parameters of one generation.

    prompt_ids: at least one id. generator: random numbers, on the device of the model. first_ids: the candidates for the
    first new token (see `text.Prompt`). lookup: maximum number of draft tokens per step of speculative decoding (0: off;
    the output is the same). logprobs: record the log-probability of each new token and of that many most likely ones
    (None: record nothing). stop_ids: ids that end the text like the end-of-document token. ignore_eod: continue after an
    end-of-document token, for benchmarks.
    """

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
    """Log-probability of a token under the model's own distribution (before Sampling), and of the most likely tokens."""

    logprob: float
    best: list[tuple[int, float]]


@dataclass(eq=False)
class Generation(Iterator[int]):
    """Iterator over new token ids; the end-of-document token ends it and is not among them.

    Requesting an id runs steps of the batch until there is one. `finish_reason` is None until the generation ends.
    `new_ids` are the ids so far, `scores` their scores if requested; `drafted` and `accepted` count the draft tokens of
    speculative decoding.
    """

    batch: Batch
    request: Request
    new_ids: list[int] = field(default_factory=list)
    scores: list[TokenScore] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    drafted: int = 0
    accepted: int = 0
    ids: list[int] = field(default_factory=list)  # prompt and new ids
    read: int = 0  # ids in the key/value cache
    slot: int | None = None
    lookup: PromptLookup | None = None
    returned: int = 0  # new ids returned by iteration

    def __post_init__(self) -> None:
        self.ids = list(self.request.prompt_ids)
        self.lookup = PromptLookup(self.ids, self.request.lookup) if self.request.lookup else None

    @property
    def unread(self) -> int:
        """Number of ids that are not in the key/value cache yet."""
        return len(self.ids) - self.read

    def __next__(self) -> int:
        while self.returned == len(self.new_ids):
            if self.finish_reason is not None:
                raise StopIteration
            self.batch.step()
        self.returned += 1
        return self.new_ids[self.returned - 1]


class Batch:
    """A model, a key/value cache of `slots` rows of `max_length` tokens (default: the model's context), and its sequences.

    eod_id: the token that ends a text. vocab_size: the tokenizer's; larger ids are never sampled. keep_prefixes: reuse the
    cached prefix that a prompt shares with the last sequence of its slot; results then differ in rounding from a full
    prefill. compiled: decode with a graph of torch.compile, compiled on first use.
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
        self._cached_ids: list[list[int]] = [[] for _ in range(slots)]  # the ids whose keys and values each slot holds
        self._free = list(range(slots))

    @property
    def cache_bytes(self) -> int:
        """Memory of the key/value cache."""
        return self._cache.nbytes

    def check(self, request: Request) -> None:
        """Raise UserError for an empty or too long prompt, ids outside the vocabulary, or fewer than one new token."""
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
        """Queue a request; slots are assigned in order of arrival. Raises UserError, see `check`."""
        self.check(request)
        generation = Generation(self, request)
        self.waiting.append(generation)
        return generation

    def finish(self, generation: Generation, reason: FinishReason) -> None:
        """End a generation and free its slot; no effect on one that has ended."""
        if generation.finish_reason is not None:
            return
        generation.finish_reason = reason
        if generation.slot is None:
            self.waiting.remove(generation)
            return
        self.running.remove(generation)
        self._free.append(generation.slot)

    @torch.inference_mode()
    def step(self) -> None:
        """Prefill of one chunk or of several short prompts, and one decoding pass for the sequences that had completed theirs."""
        while self.waiting and self._free:
            self._admit(self.waiting.popleft())
        ready = [each for each in self.running if each.unread == 1]
        last: list[tuple[Generation, Tensor]] = []
        for group in self._prefill_groups():
            hidden = self._prefill(group)
            last += [(each, row) for each, row in zip(group, hidden, strict=True) if each.unread == 0]
        self._sample_first(last)
        self._decode(ready)

    def _admit(self, generation: Generation) -> None:
        """Assign the free slot that shares the longest prefix with the prompt."""
        shared = {slot: self._shared_prefix(slot, generation.ids) for slot in self._free}
        slot = max(self._free, key=lambda slot: (shared[slot], -len(self._cached_ids[slot])))
        self._free.remove(slot)
        generation.slot, generation.read = slot, shared[slot]
        row = self._cache.select([slot])
        if shared[slot]:
            row.rewind(shared[slot])
        else:
            row.reset()
        del self._cached_ids[slot][shared[slot] :]
        self.running.append(generation)

    def _shared_prefix(self, slot: int, ids: list[int]) -> int:
        cached = self._cached_ids[slot]
        if not self.keep_prefixes:
            return 0
        limit = min(len(cached), len(ids) - 1)  # the last id is always read: its logits are needed
        count = next((i for i in range(limit) if cached[i] != ids[i]), limit)
        return count if self._cache.can_rewind(len(cached) - count) else 0

    def _prefill_groups(self) -> Iterable[list[Generation]]:
        """The sequences that this step prefills, grouped by forward pass.

        Chunk boundaries do not depend on other sequences, and chunks are batched only within the row count for which the
        CPU kernels compute every row independently (ops/linear.py): results do not depend on the rest of the batch.
        """
        groups: dict[int, list[Generation]] = {}
        room = CACHE_CHUNK
        for each in self.running:
            if each.unread == 1:
                continue
            chunk = min(each.unread, self._cache.chunk)
            if chunk > room:
                break
            room -= chunk
            key = id(each) if chunk > FEW_ROWS else -(-chunk // PADDING_MULTIPLE)
            groups.setdefault(key, []).append(each)
        return groups.values()

    def _prefill(self, group: list[Generation]) -> Tensor:
        """Run the next chunk of each prompt, padded to the longest; final hidden states of each last token, [b, hidden]."""
        chunks = [each.ids[each.read :][: self._cache.chunk] for each in group]
        width = max(map(len, chunks))
        tokens = torch.tensor([chunk + [0] * (width - len(chunk)) for chunk in chunks], device=self.device)
        slots = [each.slot for each in group if each.slot is not None]
        hidden = self.model.last_hidden(tokens, self._cache.select(slots), [len(chunk) for chunk in chunks])
        for slot, each, chunk in zip(slots, group, chunks, strict=True):
            self._cached_ids[slot] += chunk
            each.read += len(chunk)
        return hidden

    def _sample_first(self, last: list[tuple[Generation, Tensor]]) -> None:
        """Sample the first new token of each completed prompt. The head is the largest matrix of a small model: one product
        reads its weights once for up to FEW_ROWS prompts, which are still computed independently."""
        assert self.model.head is not None, "generation needs the complete model"
        for part in (last[start : start + FEW_ROWS] for start in range(0, len(last), FEW_ROWS)):
            logits = self.model.head(torch.stack([hidden for _, hidden in part]))
            for (generation, _), row in zip(part, logits, strict=True):
                self._sample(generation, row)

    def _decode(self, ready: list[Generation]) -> None:
        """One forward pass over the last token of each sequence and its draft tokens; samples the tokens that follow."""
        if not ready:
            return
        room = self.max_length - max(each.read for each in ready)
        drafts = [self._draft(each, room - 1) for each in ready]
        width = 1 + max(map(len, drafts))
        rows = [
            ([each.ids[-1], *draft] + [0] * width)[:width] for each, draft in zip(ready, drafts, strict=True)
        ]  # shorter drafts are padded with zeros, whose keys and values are discarded below
        cache = self._cache.select([each.slot for each in ready if each.slot is not None])
        tokens = torch.tensor(rows, device=self.device)
        if self._step is not None and width == 1:
            logits = self._step(tokens, cache)
        else:
            logits = self.model(tokens, cache=cache)
        for row, (each, draft) in enumerate(zip(ready, drafts, strict=True)):
            assert each.slot is not None, "running generations have a slot"
            slot, read = each.slot, [each.ids[-1]]
            for index in range(width):
                self._sample(each, logits[row, index])
                accepted = index < len(draft) and each.finish_reason is None and each.ids[-1] == draft[index]
                if not accepted:
                    break
                read.append(draft[index])
            each.accepted += len(read) - 1
            each.drafted += len(draft)
            each.read += len(read)
            self._cached_ids[slot] += read
            if len(read) < width:
                self._cache.select([slot]).rewind(each.read)

    def _draft(self, generation: Generation, room: int) -> list[int]:
        if generation.lookup is None:
            return []
        left = generation.request.max_new_tokens - len(generation.new_ids) - 1
        return generation.lookup.draft(min(left, room))

    def _sample(self, generation: Generation, logits: Tensor) -> None:
        """Sample the next token of a generation from logits [V], and end the generation if it is the last one."""
        request = generation.request
        logits = logits[: self.vocab_size]  # a vocabulary padded for speed has ids that the tokenizer does not have
        candidates = logits
        if request.first_ids is not None and not generation.new_ids:
            ids = torch.tensor(request.first_ids, device=self.device)
            candidates = torch.full_like(logits, -torch.inf).scatter(0, ids, logits[ids])
        token = int(choose(candidates[None], request.sampling, request.generator, generation.ids))
        if (token == self.eod_id or token in request.stop_ids) and not request.ignore_eod:
            self.finish(generation, "end of document")
            return
        if request.logprobs is not None:
            generation.scores.append(_score(logits, token, request.logprobs))
        generation.ids.append(token)
        generation.new_ids.append(token)
        if generation.lookup is not None:
            generation.lookup.push(token)
        if len(generation.new_ids) == request.max_new_tokens:
            self.finish(generation, "max new tokens")
        elif len(generation.ids) > self.max_length:
            self.finish(generation, "context full")


def _score(logits: Tensor, token: int, count: int) -> TokenScore:
    logprobs = logits.float().log_softmax(-1)
    values, ids = logprobs.topk(min(count, len(logprobs)))
    return TokenScore(float(logprobs[token]), list(zip(ids.tolist(), values.tolist(), strict=True)))


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
    """Continue one sequence, `prompt_ids`, by at most `max_new_tokens` ids; the arguments are those of `Request` and `Batch`.

    Ends at `eod_id`, or when the model has read model.config.seq_length tokens. Raises UserError before any computation,
    see `Batch.check`.
    """
    length = min(model.config.seq_length, len(prompt_ids) + max(0, max_new_tokens))
    batch = Batch(model, 1, max(1, length), eod_id=eod_id, vocab_size=vocab_size)
    return batch.add(Request(prompt_ids, max_new_tokens, sampling, generator, first_ids, lookup))
