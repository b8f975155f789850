"""A conversation in the terminal: history, streamed answers, and /commands."""

from __future__ import annotations

import argparse
import dataclasses
import json
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from megatronish.errors import UserError
from megatronish.inference.batch import Batch, Request
from megatronish.inference.chat_format import ChatFormat, Message
from megatronish.inference.load import Loaded
from megatronish.inference.sampling import Sampling
from megatronish.inference.text import TextGeneration

HELP = """/help            this list
/reset           delete the conversation
/undo            delete the last question and its answer
/retry           another answer to the last question
/system TEXT     the system message (without TEXT: none)
/set NAME VALUE  temperature, top_k, top_p, min_p, repetition_penalty, seed or max_new_tokens (without: show them)
/history         show the conversation
/save FILE       write the conversation as JSON
/quit            leave (or Ctrl-D); Ctrl-C ends an answer"""


class Chat:
    """A conversation with a model. `messages` are its messages, the system message first if there is one."""

    def __init__(
        self, loaded: Loaded, sampling: Sampling, *, seed: int = 0, max_new_tokens: int = 200, system: str | None = None,
        stop: tuple[str, ...] = (), lookup: int = 0, compiled: bool = False,
    ) -> None:  # fmt: skip
        model, tokenizer, info = loaded
        self.format = ChatFormat.of_folder(info.folder, tokenizer)
        self.sampling, self.seed, self.max_new_tokens = sampling, seed, max_new_tokens
        self.stop, self.lookup = (*stop, *self.format.stop_texts), lookup
        self.messages: list[Message] = []
        self.set_system(system)
        self._tokenizer = tokenizer
        self._batch = Batch(
            model,
            eod_id=tokenizer.eod_id,
            vocab_size=tokenizer.vocab_size,
            keep_prefixes=True,  # successive prompts share the conversation so far
            compiled=compiled,
        )
        self._generator = torch.Generator(self._batch.device).manual_seed(seed)

    def set_system(self, system: str | None) -> None:
        """Set or remove the system message."""
        turns = [message for message in self.messages if message["role"] != "system"]
        self.messages = ([Message(role="system", content=system)] if system else []) + turns

    def answer(self, question: str, show: Callable[[str], object]) -> TextGeneration:
        """Generate the answer to a question; its pieces go to `show`, and it is appended to the conversation.

        Ctrl-C ends the answer. The oldest turns are dropped where the context has no room for the answer. Raises
        UserError for a question that is too long.
        """
        conversation = [*self.messages, Message(role="user", content=question)]
        prompt = self.format.prompt(conversation)
        first = int(conversation[0]["role"] == "system")
        room = self._batch.max_length - min(self.max_new_tokens, self._batch.max_length // 2)
        while len(prompt.ids) > room and len(conversation) > first + 1:
            del conversation[first : first + 2]
            prompt = self.format.prompt(conversation)
        request = Request(
            prompt.ids,
            self.max_new_tokens,
            self.sampling,
            self._generator,
            lookup=self.lookup,
            stop_ids=self.format.stop_ids,
        )
        generation = self._batch.add(request)
        text = TextGeneration(generation, self._tokenizer, prompt, self.stop)
        try:
            for piece in text:
                show(piece)
        except KeyboardInterrupt:
            self._batch.finish(generation, "cancelled")
            show(text.take().text)
        self.messages = [*conversation, Message(role="assistant", content=text.text.strip())]
        return text

    def undo(self) -> str:
        """Delete the last question and its answer; returns the question. Raises UserError if there is none."""
        if not any(message["role"] == "user" for message in self.messages):
            raise UserError("nothing has been asked yet")
        self.messages.pop()
        return self.messages.pop()["content"]

    def set(self, name: str, value: str) -> None:
        """Change a setting. Raises UserError for an unknown one or a value out of range."""
        if name not in self.settings():
            raise UserError(f"no setting {name!r}: there are {', '.join(self.settings())}")
        try:
            number: Any = int(value) if name in ("seed", "max_new_tokens", "top_k") else float(value)
            if name == "seed":
                self._generator.manual_seed(number)
        except (ValueError, RuntimeError):
            raise UserError(f"{name}: {value!r} is not a valid number") from None
        if name == "max_new_tokens" and number < 1:
            raise UserError(f"max_new_tokens {value} must be at least 1")
        if name in ("seed", "max_new_tokens"):
            setattr(self, name, number)
        else:
            self.sampling = dataclasses.replace(self.sampling, **{name: number})

    def settings(self) -> dict[str, Any]:
        """All settings by name."""
        return {**dataclasses.asdict(self.sampling), "seed": self.seed, "max_new_tokens": self.max_new_tokens}


def converse(loaded: Loaded, sampling: Sampling, arguments: argparse.Namespace) -> None:
    """Read lines from stdin until it ends; answers are written to stdout, everything else to stderr."""
    signal.signal(signal.SIGINT, signal.default_int_handler)  # Ctrl-C ends an answer, not the conversation
    chat = Chat(
        loaded,
        sampling,
        seed=arguments.seed,
        max_new_tokens=arguments.max_new_tokens,
        system=arguments.system,
        stop=tuple(arguments.stop),
        lookup=arguments.lookup,
        compiled=arguments.compile,
    )
    plain = 'plain lines ("User: ...", "Assistant: ..."): it has no template'
    _print(f"A conversation in {'its chat template' if chat.format.template else plain}. /help lists the commands.")
    if sys.stdin.isatty():
        import readline  # noqa: F401  # line editing and history for input()
    while True:
        try:
            line = input("> " if sys.stdin.isatty() else "").strip()
        except EOFError:
            return
        except KeyboardInterrupt:
            _print("")
            continue
        if line in ("/quit", "/exit"):
            return
        try:
            question = command(chat, line) if line.startswith("/") else line
            if question:
                _answer(chat, question)
        except UserError as error:
            _print(f"error: {error}")


def command(chat: Chat, line: str) -> str | None:
    """Run a /command; returns the question to ask again after /retry. Raises UserError."""
    name, _, rest = line.partition(" ")
    rest = rest.strip()
    match name:
        case "/help":
            _print(HELP)
        case "/reset":
            chat.messages = [message for message in chat.messages if message["role"] == "system"]
            _print("deleted")
        case "/undo":
            _print(f"deleted: {chat.undo()}")
        case "/retry":
            return chat.undo()
        case "/system":
            chat.set_system(rest or None)
        case "/set":
            setting, _, value = rest.partition(" ")
            if setting:
                chat.set(setting, value.strip())
            _print(", ".join(f"{name} {value}" for name, value in chat.settings().items()))
        case "/history":
            for message in chat.messages:
                _print(f"{message['role']}: {message['content']}")
        case "/save":
            try:
                Path(rest).write_text(json.dumps(chat.messages, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
            except OSError as error:
                raise UserError(f"{rest or 'no file named'}: cannot be written ({error.strerror})") from None
            _print(f"written to {rest}")
        case _:
            raise UserError(f"no command {name}: /help lists them")
    return None


def _answer(chat: Chat, question: str) -> None:
    start = time.perf_counter()
    text = chat.answer(question, lambda piece: print(piece, end="", flush=True))
    seconds = time.perf_counter() - start
    print(flush=True)
    new = len(text.generation.new_ids)
    _print(f"[{new} tokens in {seconds:.2f} s, {new / seconds:,.1f} tokens/s; {text.generation.finish_reason}]")


def _print(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
