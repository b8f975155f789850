"""Conversations as token ids: by the model's chat template, or as plain lines for a model without one."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypedDict

from megatronish.data.tokenizers.tokenizer import HuggingFaceTokenizer, Tokenizer
from megatronish.errors import UserError
from megatronish.inference.text import Prompt
from megatronish.interop.tokenizer_files import chat_template, tokenizer_settings


class Message(TypedDict):
    """One message of a conversation."""

    role: str
    content: str


@dataclass(frozen=True)
class ChatFormat:
    """Converts conversations to prompts. template: Jinja source, None for plain lines `User: ...`, `Assistant: ...`.

    stop_ids and stop_texts end an answer, in addition to the end-of-document token.
    """

    tokenizer: Tokenizer
    template: str | None
    special_ids: dict[str, int]
    variables: dict[str, Any]
    stop_ids: frozenset[int]
    stop_texts: tuple[str, ...]

    @classmethod
    def of_folder(cls, folder: Path, tokenizer: Tokenizer) -> ChatFormat:
        """The format of the model in `folder`. Raises UserError for files that cannot be read."""
        settings, template = tokenizer_settings(folder), chat_template(folder)
        spec = tokenizer.spec if isinstance(tokenizer, HuggingFaceTokenizer) else {}
        special_ids = {token["content"]: token["id"] for token in spec.get("added_tokens") or [] if token["special"]}
        names = ("bos_token", "eos_token", "unk_token", "pad_token")
        tokens = {name: settings.get(name) for name in names}  # each a string, or an object with its content
        variables = {
            name: text
            for name, token in tokens.items()
            if (text := token.get("content") if isinstance(token, dict) else token) is not None
        }
        if template is None:
            return cls(tokenizer, None, special_ids, variables, frozenset(), ("\nUser:", "\nSystem:"))
        ends = {
            special_ids[text]
            for text in (variables.get("eos_token"), "<|im_end|>", "<|eot_id|>")
            if text in special_ids
        }
        return cls(tokenizer, template, special_ids, variables, frozenset(ends), ())

    def prompt(self, messages: Sequence[Message]) -> Prompt:
        """Token ids up to the start of the answer. The text of a message never becomes a special token.

        Raises UserError for a conversation that the template rejects.
        """
        if self.template is None:
            lines = [f"{message['role'].capitalize()}: {message['content'].strip()}" for message in messages]
            start = [] if self.tokenizer.start_id is None else [self.tokenizer.start_id]
            return Prompt(start + self.tokenizer.encode("\n".join([*lines, "Assistant:"])).tolist())
        mark = next(c for c in map(chr, range(0xE000, 0xF8FF)) if all(c not in m["content"] for m in messages))
        pattern = re.compile("|".join(re.escape(text) for text in sorted(self.special_ids, key=len, reverse=True)))
        if self.special_ids:
            # A mark inside the text of a special token in a message keeps it from being one; it is removed again below.
            messages = [
                Message(
                    role=m["role"], content=pattern.sub(lambda found: found[0][0] + mark + found[0][1:], m["content"])
                )
                for m in messages
            ]
        text = self._render(messages)
        ids: list[int] = []
        pieces = re.split(f"({pattern.pattern})", text) if self.special_ids else [text]
        for index, piece in enumerate(pieces):
            if index % 2:
                ids.append(self.special_ids[piece])
            elif piece:
                ids += self.tokenizer.encode(piece.replace(mark, "")).tolist()
        return Prompt(ids)

    def _render(self, messages: Sequence[Message]) -> str:
        from jinja2 import TemplateError
        from jinja2.sandbox import ImmutableSandboxedEnvironment

        def refuse(message: str) -> None:
            raise TemplateError(message)

        # As in transformers; sandboxed because templates come from the same source as the weights.
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
