"""OpenAI's protocol: the validated requests, and the objects of complete and streamed responses."""

from __future__ import annotations

import time
import uuid
from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from megatronish.data.tokenizers.tokenizer import Tokenizer
from megatronish.errors import UserError
from megatronish.inference.batch import FinishReason, TokenScore
from megatronish.inference.chat_format import Message
from megatronish.inference.sampling import Sampling
from megatronish.inference.text import Prompt, TextDelta

MAX_CHOICES = 16
MAX_LOGPROBS = 20
MAX_PROMPTS = 64
DEFAULT_COMPLETION_TOKENS = 16  # OpenAI's
FINISH_REASONS: dict[FinishReason, str] = {
    "end of document": "stop",
    "stop string": "stop",
    "max new tokens": "length",
    "context full": "length",
    "cancelled": "stop",
}
Ids = list[Annotated[int, Field(ge=0)]]
Text = Annotated[str, Field(min_length=1)]


class CommonRequest(BaseModel):
    """Fields of both kinds of requests. Unsupported fields that would change the text are rejected by name; other unknown
    fields (user, metadata, ...) are ignored."""

    model_config = ConfigDict(strict=True, extra="allow", allow_inf_nan=False)

    model: str | None = None
    temperature: float | None = Field(default=None, ge=0, le=1000)
    top_p: float | None = Field(default=None, gt=0, le=1)
    top_k: int | None = Field(default=None, ge=0)
    min_p: float | None = Field(default=None, ge=0, le=1)
    repetition_penalty: float | None = Field(default=None, gt=0, le=1000)
    seed: int | None = Field(default=None, ge=-(2**62), lt=2**62)
    n: int | None = Field(default=None, ge=1, le=MAX_CHOICES)
    stop: Text | Annotated[list[Text], Field(max_length=16)] | None = None
    stream: bool | None = None
    stream_options: dict[str, Any] | None = None
    max_tokens: int | None = Field(default=None, ge=1)

    @model_validator(mode="after")
    def _reject_unsupported(self) -> CommonRequest:
        without_effect: dict[str, Any] = {
            "presence_penalty": 0,
            "frequency_penalty": 0,
            "logit_bias": {},
            "tools": [],
            "functions": [],
            "suffix": "",
            "echo": False,
            "best_of": self.n or 1,
            "response_format": {"type": "text"},
        }
        for name, value in (self.model_extra or {}).items():
            if name in without_effect and value is not None and value != without_effect[name]:
                raise ValueError(f"{name} is not supported: leave it out")
        return self

    @property
    def stops(self) -> tuple[str, ...]:
        """The stop strings."""
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())

    @property
    def include_usage(self) -> bool:
        """Whether a stream ends with token counts."""
        return bool((self.stream_options or {}).get("include_usage"))

    @property
    def sampling(self) -> Sampling:
        """The sampling parameters, with OpenAI's defaults."""
        names = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")
        return Sampling(**{name: value for name in names if (value := getattr(self, name)) is not None})


class CompletionRequest(CommonRequest):
    """POST /v1/completions."""

    prompt: str | Ids | list[str] | list[Ids] = ""
    logprobs: int | None = Field(default=None, ge=0, le=MAX_LOGPROBS)

    @property
    def prompts(self) -> list[str | list[int]]:
        """Each prompt, as text or ids; an empty list of ids is one prompt. Raises UserError for more than MAX_PROMPTS."""
        if isinstance(self.prompt, str) or all(isinstance(item, int) for item in self.prompt):
            return [self.prompt]  # type: ignore[list-item]
        if len(self.prompt) > MAX_PROMPTS:
            raise UserError(f"{len(self.prompt)} prompts in one request: give at most {MAX_PROMPTS}")
        return list(self.prompt)  # type: ignore[arg-type]


class ChatMessage(BaseModel):
    """One message; content as text, or as a list of text parts."""

    model_config = ConfigDict(strict=True)
    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[dict[str, Any]]

    @field_validator("content")
    @classmethod
    def _text_only(cls, content: str | list[dict[str, Any]]) -> str | list[dict[str, Any]]:
        if not isinstance(content, str):
            for part in content:
                if part.get("type") != "text" or not isinstance(part.get("text"), str):
                    raise ValueError("only text can be read: give parts of type text")
        return content

    @property
    def message(self) -> Message:
        """The message in the form of chat templates, which name OpenAI's newer role "developer" "system"."""
        parts = [self.content] if isinstance(self.content, str) else [part["text"] for part in self.content]
        return Message(role="system" if self.role == "developer" else self.role, content="".join(parts))


class ChatRequest(CommonRequest):
    """POST /v1/chat/completions."""

    messages: Annotated[list[ChatMessage], Field(min_length=1)]
    max_completion_tokens: int | None = Field(default=None, ge=1)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(default=None, ge=0, le=MAX_LOGPROBS)

    @property
    def best(self) -> int | None:
        """How many log-probabilities per token are requested, None for none. Raises UserError for top_logprobs alone."""
        if self.top_logprobs is not None and not self.logprobs:
            raise UserError("top_logprobs needs logprobs: true")
        return (self.top_logprobs or 0) if self.logprobs else None


@dataclass
class Choice:
    """The output of one generation so far."""

    text: str = ""
    ids: list[int] = field(default_factory=list)
    scores: list[TokenScore] = field(default_factory=list)
    offsets: list[int] = field(default_factory=list)  # length of the text before each token arrived
    finish: str | None = None


class Response(ABC):
    """Collects the output of all choices; choices are numbered over all prompts."""

    prefix: str

    def __init__(
        self, model: str, tokenizer: Tokenizer, prompts: list[Prompt], per_prompt: int, logprobs: int | None
    ) -> None:
        self.prompts, self.per_prompt, self.logprobs = prompts, per_prompt, logprobs
        self._model, self._tokenizer = model, tokenizer
        self._id, self._created = f"{self.prefix}-{uuid.uuid4().hex}", int(time.time())
        self._choices = [Choice() for _ in range(len(prompts) * per_prompt)]

    def add(self, number: int, delta: TextDelta) -> dict[str, Any] | None:
        """Add new output of a choice; returns the chunk of a stream, None if it would be empty."""
        choice, start = self._choices[number], len(self._choices[number].ids)
        choice.offsets += [len(choice.text)] * len(delta.ids)
        choice.text += delta.text
        choice.ids += delta.ids
        choice.scores += delta.scores
        choice.finish = None if delta.finish_reason is None else FINISH_REASONS[delta.finish_reason]
        if not delta.text and choice.finish is None and not (self.logprobs is not None and delta.ids):
            return None
        return self._object([self._choice(number, delta.text, start, chunk=True)], chunk=True)

    def opening(self) -> list[dict[str, Any]]:
        """Chunks that precede all text."""
        return []

    def complete(self) -> dict[str, Any]:
        """The response as one object."""
        choices = [self._choice(number, choice.text, 0) for number, choice in enumerate(self._choices)]
        return {**self._object(choices), "usage": self._usage()}

    def usage_chunk(self) -> dict[str, Any]:
        """The token counts at the end of a stream."""
        return {**self._object([], chunk=True), "usage": self._usage()}

    def _usage(self) -> dict[str, int]:
        prompt = sum(len(each.ids) for each in self.prompts)
        new = sum(len(choice.ids) for choice in self._choices)
        return {"prompt_tokens": prompt, "completion_tokens": new, "total_tokens": prompt + new}

    def _object(self, choices: list[dict[str, Any]], chunk: bool = False) -> dict[str, Any]:
        return {
            "id": self._id,
            "object": self._kind(chunk),
            "created": self._created,
            "model": self._model,
            "choices": choices,
        }

    def _choice(self, number: int, text: str, start: int, chunk: bool = False) -> dict[str, Any]:
        """A choice with `text`, and the tokens from index `start`."""
        choice = self._choices[number]
        scores = None if self.logprobs is None else self._scores(choice, start)
        return {"index": number, **self._content(text, chunk), "finish_reason": choice.finish, "logprobs": scores}

    def _token_text(self, token: int) -> str:
        return self._tokenizer.decode_bytes([token]).decode("utf-8", errors="replace")

    @abstractmethod
    def _kind(self, chunk: bool) -> str: ...

    @abstractmethod
    def _content(self, text: str, chunk: bool) -> dict[str, Any]: ...

    @abstractmethod
    def _scores(self, choice: Choice, start: int) -> dict[str, Any]: ...


class CompletionResponse(Response):
    """Of /v1/completions."""

    prefix = "cmpl"

    def _kind(self, chunk: bool) -> str:
        return "text_completion"

    def _content(self, text: str, chunk: bool) -> dict[str, Any]:
        return {"text": text}

    def _scores(self, choice: Choice, start: int) -> dict[str, Any]:
        ids, scores = choice.ids[start:], choice.scores[start:]
        return {
            "tokens": [self._token_text(token) for token in ids],
            "token_logprobs": [score.logprob for score in scores],
            "top_logprobs": [{self._token_text(token): value for token, value in score.best} for score in scores],
            "text_offset": choice.offsets[start:],
        }


class ChatResponse(Response):
    """Of /v1/chat/completions."""

    prefix = "chatcmpl"

    def opening(self) -> list[dict[str, Any]]:
        """The role of each choice."""
        delta = {"role": "assistant", "content": ""}
        return [
            self._object([{"index": number, "delta": delta, "finish_reason": None, "logprobs": None}], chunk=True)
            for number in range(len(self._choices))
        ]

    def _kind(self, chunk: bool) -> str:
        return "chat.completion.chunk" if chunk else "chat.completion"

    def _content(self, text: str, chunk: bool) -> dict[str, Any]:
        if chunk:
            return {"delta": {"content": text} if text else {}}
        return {"message": {"role": "assistant", "content": text}}

    def _scores(self, choice: Choice, start: int) -> dict[str, Any]:
        def one(token: int, logprob: float) -> dict[str, Any]:
            raw = self._tokenizer.decode_bytes([token])
            return {"token": self._token_text(token), "logprob": logprob, "bytes": list(raw)}

        tokens = zip(choice.ids[start:], choice.scores[start:], strict=True)
        return {
            "content": [{**one(t, s.logprob), "top_logprobs": [one(*best) for best in s.best]} for t, s in tokens],
            "refusal": None,
        }
