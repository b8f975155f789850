"""What goes back: OpenAI's objects, whole and in chunks, with log-probabilities and counts."""

from __future__ import annotations

import time
import uuid
from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import Any

from megatronish.data.tokenizers.tokenizer import Tokenizer
from megatronish.inference.batch import FinishReason, TokenScore
from megatronish.inference.prompt import Prompt
from megatronish.inference.server.scheduler import Event

FINISH: dict[FinishReason, str] = {
    "end of document": "stop",
    "stop string": "stop",
    "max new tokens": "length",
    "context full": "length",
    "cancelled": "stop",
}


@dataclass
class Choice:
    """One answer so far."""

    text: str = ""
    ids: list[int] = field(default_factory=list)
    scores: list[TokenScore] = field(default_factory=list)
    offsets: list[int] = field(default_factory=list)  # of each token's text, as it arrived
    finish: str | None = None


class Reply(ABC):
    """Collects the events of all choices. Numbers count choices over all prompts."""

    prefix: str

    def __init__(self, model: str, tokenizer: Tokenizer, prompts: list[Prompt], logprobs: bool) -> None:
        self._model, self._tokenizer, self._prompts, self._logprobs = model, tokenizer, prompts, logprobs
        self._id, self._created = f"{self.prefix}-{uuid.uuid4().hex}", int(time.time())
        self._choices: list[Choice] = []

    def expect(self, choices: int, per_prompt: int) -> None:
        """So many choices will come."""
        self._choices = [Choice() for _ in range(choices)]
        assert choices == per_prompt * len(self._prompts)

    def chunk(self, number: int, event: Event) -> dict[str, Any] | None:
        """Take an event in; the chunk that a stream gives for it, None for one without anything to tell."""
        choice = self._choices[number]
        start = len(choice.ids)
        choice.offsets += [len(choice.text)] * len(event.ids)
        choice.text += event.text
        choice.ids += event.ids
        choice.scores += event.scores
        choice.finish = None if event.finish_reason is None else FINISH[event.finish_reason]
        if not event.text and not event.is_last and not (self._logprobs and event.ids):
            return None
        return self._object([self._part(number, event.text, start)], chunk=True)

    def opening(self) -> list[dict[str, Any]]:
        """Chunks before any text."""
        return []

    def whole(self) -> dict[str, Any]:
        """The answer in one object."""
        choices = [self._whole_choice(number) for number in range(len(self._choices))]
        return {**self._object(choices, chunk=False), "usage": self._usage()}

    def usage_chunk(self) -> dict[str, Any]:
        """The counts, for the end of a stream."""
        return {**self._object([], chunk=True), "usage": self._usage()}

    def _usage(self) -> dict[str, int]:
        prompt = sum(len(each.ids) for each in self._prompts)
        new = sum(len(choice.ids) for choice in self._choices)
        return {"prompt_tokens": prompt, "completion_tokens": new, "total_tokens": prompt + new}

    def _object(self, choices: list[dict[str, Any]], chunk: bool) -> dict[str, Any]:
        return {
            "id": self._id,
            "object": self._kind(chunk),
            "created": self._created,
            "model": self._model,
            "choices": choices,
        }

    def _bytes(self, token: int) -> bytes:
        return self._tokenizer.decode_bytes([token])

    def _token_text(self, token: int) -> str:
        return self._bytes(token).decode("utf-8", errors="replace")

    @abstractmethod
    def _kind(self, chunk: bool) -> str: ...

    @abstractmethod
    def _part(self, number: int, text: str, start: int) -> dict[str, Any]:
        """A choice in a chunk: `text`, and the tokens from `start` on."""

    @abstractmethod
    def _whole_choice(self, number: int) -> dict[str, Any]: ...


class CompletionReply(Reply):
    """Of /v1/completions."""

    prefix = "cmpl"

    def _kind(self, chunk: bool) -> str:
        return "text_completion"

    def _part(self, number: int, text: str, start: int) -> dict[str, Any]:
        choice = self._choices[number]
        return {
            "index": number,
            "text": text,
            "finish_reason": choice.finish,
            "logprobs": self._scores(choice, start) if self._logprobs else None,
        }

    def _whole_choice(self, number: int) -> dict[str, Any]:
        return self._part(number, self._choices[number].text, 0)

    def _scores(self, choice: Choice, start: int) -> dict[str, Any]:
        ids, scores = choice.ids[start:], choice.scores[start:]
        return {
            "tokens": [self._token_text(token) for token in ids],
            "token_logprobs": [score.logprob for score in scores],
            "top_logprobs": [{self._token_text(token): value for token, value in score.best} for score in scores],
            "text_offset": choice.offsets[start:],
        }


class ChatReply(Reply):
    """Of /v1/chat/completions."""

    prefix = "chatcmpl"

    def _kind(self, chunk: bool) -> str:
        return "chat.completion.chunk" if chunk else "chat.completion"

    def opening(self) -> list[dict[str, Any]]:
        """The role of each choice."""
        delta = {"role": "assistant", "content": ""}
        return [
            self._object([{"index": number, "delta": delta, "finish_reason": None, "logprobs": None}], chunk=True)
            for number in range(len(self._choices))
        ]

    def _part(self, number: int, text: str, start: int) -> dict[str, Any]:
        choice = self._choices[number]
        return {
            "index": number,
            "delta": {"content": text} if text else {},
            "finish_reason": choice.finish,
            "logprobs": self._scores(choice, start) if self._logprobs else None,
        }

    def _whole_choice(self, number: int) -> dict[str, Any]:
        choice = self._choices[number]
        return {
            "index": number,
            "message": {"role": "assistant", "content": choice.text},
            "finish_reason": choice.finish,
            "logprobs": self._scores(choice, 0) if self._logprobs else None,
        }

    def _scores(self, choice: Choice, start: int) -> dict[str, Any]:
        def one(token: int, logprob: float) -> dict[str, Any]:
            return {"token": self._token_text(token), "logprob": logprob, "bytes": list(self._bytes(token))}

        tokens = zip(choice.ids[start:], choice.scores[start:], strict=True)
        return {
            "content": [{**one(t, s.logprob), "top_logprobs": [one(*best) for best in s.best]} for t, s in tokens],
            "refusal": None,
        }
