"""A conversation in the terminal: history, streamed answers, and /commands."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from megatronish.errors import UserError
from megatronish.inference.batch import Batch, Request
from megatronish.inference.chat_format import ChatFormat, Message
from megatronish.inference.generate import TextGeneration
from megatronish.inference.load import Loaded
from megatronish.inference.sampling import Sampling

HELP = """/help            this list
/reset           forget the conversation
/undo            forget the last question and its answer
/retry           another answer to the last question
/system TEXT     what the model is told before the conversation (without TEXT: nothing)
/set NAME VALUE  temperature, top_k, top_p, min_p, repetition_penalty, seed or max_new_tokens (without: show them)
/history         show the conversation
/save FILE       write the conversation as JSON
/quit            leave (or Ctrl-D); Ctrl-C ends an answer"""


class Chat:
    """A model that talks. `messages` is the conversation, the system message first where there is one."""

    def __init__(
        self, loaded: Loaded, sampling: Sampling, *, seed: int = 0, max_new_tokens: int = 200, system: str | None = None,
        stop: tuple[str, ...] = (), lookup: int = 0, compiled: bool = False,
    ) -> None:  # fmt: skip
        model, tokenizer, info = loaded
        self.format = ChatFormat.of_folder(info.folder, tokenizer)
        self.sampling, self.seed, self.max_new_tokens = sampling, seed, max_new_tokens
        self.stop, self.lookup = (*stop, *self.format.stop_texts), lookup
        self.messages: list[Message] = []
        self.tell(system)
        self._tokenizer = tokenizer
        # Turns share their beginning: what the cache holds of the last turn is not read again.
        self._batch = Batch(
            model,
            1,
            eod_id=tokenizer.eod_id,
            vocab_size=tokenizer.vocab_size,
            keep_prefixes=True,
            compiled=compiled,
        )
        self._generator = torch.Generator(self._batch.device).manual_seed(seed)

    def tell(self, system: str | None) -> None:
        """Set or remove the system message."""
        turns = [message for message in self.messages if message["role"] != "system"]
        self.messages = ([Message(role="system", content=system)] if system else []) + turns

    def reseed(self, seed: int) -> None:
        """Draw from the beginning of another seed's numbers."""
        self.seed = seed
        self._generator.manual_seed(seed)

    def answer(self, question: str, show: Callable[[str], object]) -> TextGeneration:
        """Ask; the answer goes to `show` piece by piece, and into the conversation. Ctrl-C ends it where it is.

        The oldest turns are forgotten where the context has no room for the answer. Raises UserError for a question too long.
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
            show(text.take())
        self.messages = [*conversation, Message(role="assistant", content=text.text.strip())]
        return text

    def undo(self) -> str | None:
        """Forget the last question and answer; the question, or None where there is none."""
        if not any(message["role"] == "user" for message in self.messages):
            return None
        self.messages.pop()
        return self.messages.pop()["content"]

    def set(self, name: str, value: str) -> None:
        """Change a setting. Raises UserError for an unknown one or a value out of range."""
        names = [field.name for field in dataclasses.fields(Sampling)]
        try:
            if name == "seed":
                self.reseed(int(value))
            elif name == "max_new_tokens":
                if int(value) < 1:
                    raise UserError(f"max_new_tokens {value} must be at least 1")
                self.max_new_tokens = int(value)
            elif name in names:
                number: Any = int(value) if name == "top_k" else float(value)
                self.sampling = dataclasses.replace(self.sampling, **{name: number})
            else:
                raise UserError(f"no setting {name!r}: there are {', '.join([*names, 'seed', 'max_new_tokens'])}")
        except (ValueError, RuntimeError) as error:
            if isinstance(error, UserError):
                raise
            raise UserError(f"{name}: {value!r} is no number it can have") from None

    def settings(self) -> str:
        """All settings in one line."""
        values = {**dataclasses.asdict(self.sampling), "seed": self.seed, "max_new_tokens": self.max_new_tokens}
        return ", ".join(f"{name} {value}" for name, value in values.items())


def converse(loaded: Loaded, sampling: Sampling, arguments: argparse.Namespace) -> None:
    """Read lines from stdin until it ends; answers go to stdout, all else to stderr."""
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
    shape = (
        "its chat template"
        if chat.format.template
        else 'plain lines ("User: ...", "Assistant: ..."): it has no template'
    )
    _tell(f"A conversation in {shape}. /help lists what else can be typed.")
    if sys.stdin.isatty():
        import readline  # noqa: F401  # line editing and history for input()
    while True:
        try:
            line = input("> " if sys.stdin.isatty() else "").strip()
        except EOFError:
            return
        except KeyboardInterrupt:
            _tell("")
            continue
        if line in ("/quit", "/exit"):
            return
        if not line:
            continue
        try:
            question = command(chat, line) if line.startswith("/") else line
            if question is not None:
                _answer(chat, question)
        except UserError as error:
            _tell(f"error: {error}")


def command(chat: Chat, line: str) -> str | None:
    """Do what a /command says; returns a question to ask again, if it says so. Raises UserError."""
    name, _, rest = line.partition(" ")
    rest = rest.strip()
    if name == "/help":
        _tell(HELP)
    elif name == "/reset":
        chat.messages = [message for message in chat.messages if message["role"] == "system"]
        _tell("forgotten")
    elif name in ("/undo", "/retry"):
        question = chat.undo()
        if question is None:
            raise UserError("nothing has been asked yet")
        if name == "/retry":
            return question
        _tell(f"forgotten: {question}")
    elif name == "/system":
        chat.tell(rest or None)
    elif name == "/set":
        setting, _, value = rest.partition(" ")
        if setting:
            chat.set(setting, value.strip())
        _tell(chat.settings())
    elif name == "/history":
        for message in chat.messages:
            _tell(f"{message['role']}: {message['content']}")
    elif name == "/save":
        try:
            Path(rest).write_text(json.dumps(chat.messages, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        except OSError as error:
            raise UserError(f"{rest or 'no file named'}: cannot be written ({error.strerror})") from None
        _tell(f"written to {rest}")
    else:
        raise UserError(f"no command {name}: /help lists them")
    return None


def _answer(chat: Chat, question: str) -> None:
    start = time.perf_counter()

    def show(piece: str) -> None:
        print(piece, end="", flush=True)

    text = chat.answer(question, show)
    seconds = time.perf_counter() - start
    print(flush=True)
    new = text.generation.new_tokens
    _tell(f"[{new} tokens in {seconds:.2f} s, {new / seconds:,.1f} tokens/s; {text.generation.finish_reason}]")


def _tell(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
