"""The requests of OpenAI's protocol that the server takes, checked."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

MAX_CHOICES = 16
MAX_LOGPROBS = 20
Ids = list[Annotated[int, Field(ge=0)]]
Text = Annotated[str, Field(min_length=1)]


class Common(BaseModel):
    """What both kinds of request share. Fields that would change the text and are not supported are refused by name; others
    that are unknown (user, metadata, ...) are passed over."""

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

    @model_validator(mode="after")
    def _refuse_unsupported(self) -> Common:
        harmless: dict[str, Any] = {
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
            if name in harmless and value is not None and value != harmless[name]:
                raise ValueError(f"{name} is not supported: leave it out")
        return self

    @property
    def stops(self) -> tuple[str, ...]:
        """The stop strings."""
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())

    @property
    def include_usage(self) -> bool:
        """Whether a stream ends with the counts of its tokens."""
        return bool((self.stream_options or {}).get("include_usage"))


class CompletionRequest(Common):
    """POST /v1/completions."""

    prompt: str | Ids | list[str] | list[Ids] = ""
    max_tokens: int | None = Field(default=None, ge=1)
    logprobs: int | None = Field(default=None, ge=0, le=MAX_LOGPROBS)

    @property
    def prompts(self) -> list[str | list[int]]:
        """Each prompt, as text or ids. An empty list of ids is one prompt."""
        if isinstance(self.prompt, str) or all(isinstance(item, int) for item in self.prompt):
            return [self.prompt]  # type: ignore[list-item]
        return list(self.prompt)  # type: ignore[arg-type]


class ChatMessage(BaseModel):
    """A turn; content as text, or as a list of text parts."""

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
    def text(self) -> str:
        """What it says."""
        return self.content if isinstance(self.content, str) else "".join(part["text"] for part in self.content)


class ChatRequest(Common):
    """POST /v1/chat/completions."""

    messages: Annotated[list[ChatMessage], Field(min_length=1)]
    max_tokens: int | None = Field(default=None, ge=1)
    max_completion_tokens: int | None = Field(default=None, ge=1)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(default=None, ge=0, le=MAX_LOGPROBS)
