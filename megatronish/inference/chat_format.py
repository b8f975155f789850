"""A conversation as token ids: by the chat template that came with the model, or as plain lines for a model without one."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypedDict

from megatronish.data.tokenizers.tokenizer import HuggingFaceTokenizer, Tokenizer
from megatronish.errors import UserError
from megatronish.inference.prompt import Prompt

TEMPLATE_FILE, SETTINGS_FILE = "chat_template.jinja", "tokenizer_config.json"
ROLES = ("system", "user", "assistant")


class Message(TypedDict):
    """One turn of a conversation."""

    role: str
    content: str


@dataclass(frozen=True)
class ChatFormat:
    """How a model reads a conversation. template: Jinja source, None for plain lines `User: ...`, `Assistant: ...`.

    stop_ids and stop_texts end an answer, beside the end of a document.
    """

    tokenizer: Tokenizer
    template: str | None
    special_ids: dict[str, int]
    variables: dict[str, Any]
    stop_ids: frozenset[int]
    stop_texts: tuple[str, ...]

    @classmethod
    def of_folder(cls, folder: Path, tokenizer: Tokenizer) -> ChatFormat:
        """The format of the model in `folder`. Raises UserError for files there that cannot be read."""
        settings = _read_settings(folder / SETTINGS_FILE)
        special_ids = _special_ids(tokenizer)
        template = _template(folder, settings)
        names = ("bos_token", "eos_token", "unk_token", "pad_token")
        variables = {name: text for name in names if (text := _content(settings.get(name))) is not None}
        if template is None:
            return cls(tokenizer, None, special_ids, variables, frozenset(), ("\nUser:", "\nSystem:"))
        ends = {
            special_ids[text]
            for text in (variables.get("eos_token"), "<|im_end|>", "<|eot_id|>")
            if text in special_ids
        }
        return cls(tokenizer, template, special_ids, variables, frozenset(ends), ())

    def prompt(self, messages: Sequence[Message]) -> Prompt:
        """Ids up to where the answer begins. What a message says never becomes a special token.

        Raises UserError for a conversation that the template refuses.
        """
        if self.template is None:
            lines = [f"{message['role'].capitalize()}: {message['content'].strip()}" for message in messages]
            start = [] if self.tokenizer.start_id is None else [self.tokenizer.start_id]
            return Prompt(start + self.tokenizer.encode("\n".join([*lines, "Assistant:"])).tolist())
        mark = next(c for c in map(chr, range(0xE000, 0xF8FF)) if all(c not in m["content"] for m in messages))
        pattern = re.compile("|".join(re.escape(text) for text in sorted(self.special_ids, key=len, reverse=True)))
        if self.special_ids:
            # A mark inside each: no special token any more, until it is taken out again from plain text.
            messages = [
                Message(
                    role=m["role"], content=pattern.sub(lambda found: found[0][0] + mark + found[0][1:], m["content"])
                )
                for m in messages
            ]
        text = self._render(messages)
        ids: list[int] = []
        pieces = re.split(f"({pattern.pattern})", text) if self.special_ids else [text]
        for place, piece in enumerate(pieces):
            if place % 2:
                ids.append(self.special_ids[piece])
            elif piece:
                ids += self.tokenizer.encode(piece.replace(mark, "")).tolist()
        return Prompt(ids)

    def _render(self, messages: Sequence[Message]) -> str:
        from jinja2 import TemplateError
        from jinja2.sandbox import ImmutableSandboxedEnvironment

        def refuse(message: str) -> None:
            raise TemplateError(message)

        # As Hugging Face sets it up; sandboxed, for a template comes from where the weights came from.
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
        )
        environment.globals["raise_exception"] = refuse
        assert self.template is not None, "plain lines need no template"
        try:
            template = environment.from_string(self.template)
            return template.render(messages=messages, add_generation_prompt=True, **self.variables)
        except (TemplateError, TypeError) as error:
            raise UserError(f"the model's chat template does not take this conversation: {error}") from None


def _special_ids(tokenizer: Tokenizer) -> dict[str, int]:
    if not isinstance(tokenizer, HuggingFaceTokenizer):
        return {}
    return {token["content"]: token["id"] for token in tokenizer.spec.get("added_tokens") or [] if token["special"]}


def _template(folder: Path, settings: dict[str, Any]) -> str | None:
    path = folder / TEMPLATE_FILE
    if path.exists():
        return path.read_text(encoding="utf-8")
    found = settings.get("chat_template")
    if isinstance(found, list):  # several, by name
        found = next((each["template"] for each in found if each.get("name") == "default"), None)
    return found


def _read_settings(path: Path) -> dict[str, Any]:
    if not path.exists():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(
            f"{path}: cannot be read ({error}); restore it, or delete it to talk without a template"
        ) from None
    return content if isinstance(content, dict) else {}


def _content(token: Any) -> str | None:
    """A special token as tokenizer_config.json names it: text, or an object around it."""
    return token.get("content") if isinstance(token, dict) else token
