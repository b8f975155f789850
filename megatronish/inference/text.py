"""Text to token ids and back: prompts, incremental detokenization, and stop strings."""

from __future__ import annotations

import codecs
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from megatronish.data.tokenizers.tokenizer import Tokenizer
from megatronish.errors import UserError
from megatronish.inference.batch import FinishReason, Generation, TokenScore

_INCOMPLETE = "\ufffd"


@dataclass(frozen=True)
class Prompt:
    """ids: what the model reads. first_ids: the candidates for the first new token (None: the full vocabulary), of which
    the first `overlap` bytes are already part of the prompt's text.

    The last token of a prompt is sampled again among the tokens that start with its bytes ("token healing", Lundberg
    2023): "def " ends in a space that usually belongs to the next token (" main"), and training never showed it alone.
    """

    ids: list[int]
    first_ids: list[int] | None = None
    overlap: int = 0


def encode_prompt(tokenizer: Tokenizer, text: str) -> Prompt:
    """Token ids of a prompt, preceded by the token that texts start with (`Tokenizer.start_id`), if there is one.

    Raises UserError for text that is not Unicode (a command line in another encoding), and for an empty prompt where
    the tokenizer has no such token.
    """
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise UserError(f"the prompt is not valid UTF-8 at character {error.start}: give it in UTF-8") from None
    start = [] if tokenizer.start_id is None else [tokenizer.start_id]
    ids = start + (tokenizer.encode(text).tolist() if text else [])
    if not ids:
        raise UserError("the prompt is empty, and this tokenizer has no end-of-document token to start from")
    if not text or len(ids) == 1 or not tokenizer.lossless:
        return Prompt(ids)
    last = tokenizer.decode_bytes(ids[-1:])
    longer = [token for token in range(tokenizer.vocab_size) if tokenizer.decode_bytes([token]).startswith(last)]
    return Prompt(ids[:-1], longer, len(last)) if len(longer) > 1 else Prompt(ids)


class Detokenizer:
    """Converts ids to text incrementally; the concatenated pieces are the text of all ids.

    A lossless tokenizer is decoded byte by byte, and the bytes of an incomplete UTF-8 character are buffered. Other
    tokenizers decode a token depending on its neighbors (the space at the start of a text is dropped): a piece is then
    what a token adds to the text of the preceding tokens, starting from those of `prompt`.
    """

    def __init__(self, tokenizer: Tokenizer, prompt: Prompt) -> None:
        self._tokenizer = tokenizer
        self._overlap = prompt.overlap
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._ids = list(prompt.ids)
        self._context = 0  # index of the first id that is decoded as context
        self._shown = len(self._ids)  # number of ids whose text was returned

    def push(self, token_id: int) -> str:
        """The characters that this id completes; often none, sometimes several."""
        if self._tokenizer.lossless:
            skipped, self._overlap = self._overlap, 0
            return self._decoder.decode(self._tokenizer.decode_bytes([token_id])[skipped:])
        self._ids.append(token_id)
        piece = self._added()
        if not piece or piece.endswith(_INCOMPLETE):
            return ""
        self._context, self._shown = self._shown, len(self._ids)
        return piece

    def finish(self) -> str:
        """The remaining text after the last id: U+FFFD for bytes of an incomplete character."""
        if self._tokenizer.lossless:
            return self._decoder.decode(b"", final=True)
        piece = self._added()
        self._context = self._shown = len(self._ids)
        return piece

    def _added(self) -> str:
        before = self._tokenizer.decode(self._ids[self._context : self._shown])
        return self._tokenizer.decode(self._ids[self._context :])[len(before) :]


@dataclass(frozen=True)
class TextDelta:
    """New output of a generation: text, ids and their scores; `finish_reason` with the last delta."""

    text: str = ""
    ids: tuple[int, ...] = ()
    scores: tuple[TokenScore, ...] = ()
    finish_reason: FinishReason | None = None


class TextGeneration(Iterator[str]):
    """Iterator over the text of a generation in pieces of complete characters, ending before the first stop string.

    `text` is the text so far. `finish_reason` of the generation is "stop string" where one ended it.
    """

    def __init__(self, generation: Generation, tokenizer: Tokenizer, prompt: Prompt, stop: Sequence[str] = ()) -> None:
        """Raises UserError for an empty stop string."""
        check_stop(stop)
        self.generation = generation
        self.text = ""
        self.finished = False  # whether `take` has returned all text
        self._detokenizer = Detokenizer(tokenizer, prompt)
        self._stop = tuple(stop)
        self._buffer = ""  # text that may be the start of a stop string
        self._taken = 0  # ids whose text is in `text` or in the buffer

    def take(self) -> TextDelta:
        """The output since the last call, without running the model. Ends the generation at a stop string."""
        generation, start, piece = self.generation, self._taken, ""
        while self._taken < len(generation.new_ids) and not self.finished:
            piece += self._before_stop(self._detokenizer.push(generation.new_ids[self._taken]))
            self._taken += 1
        if generation.finish_reason is not None and not self.finished:
            piece += self._before_stop(self._detokenizer.finish()) + self._buffer
            self._buffer, self.finished = "", True
        self.text += piece
        ids, scores = generation.new_ids[start : self._taken], generation.scores[start : self._taken]
        return TextDelta(piece, tuple(ids), tuple(scores), generation.finish_reason if self.finished else None)

    def _before_stop(self, text: str) -> str:
        """The buffered text and `text` up to a stop string; what may be the start of one remains in the buffer."""
        self._buffer += text
        end = min((index for stop in self._stop if (index := self._buffer.find(stop)) >= 0), default=None)
        if end is not None:
            self.generation.batch.finish(self.generation, "stop string")
            self.generation.finish_reason = "stop string"  # also where the same step ended it for another reason
            piece, self._buffer, self.finished = self._buffer[:end], "", True
            return piece
        partial = (n for stop in self._stop for n in range(1, len(stop)) if self._buffer.endswith(stop[:n]))
        end = len(self._buffer) - max(partial, default=0)
        piece, self._buffer = self._buffer[:end], self._buffer[end:]
        return piece

    def __next__(self) -> str:
        if self.finished:
            raise StopIteration
        if self._taken == len(self.generation.new_ids) and self.generation.finish_reason is None:
            self.generation.batch.step()
        return self.take().text


def check_stop(stop: Sequence[str]) -> None:
    """Raise UserError for an empty stop string, which every text contains."""
    if not all(stop):
        raise UserError("a stop string is empty: leave it out, or give the text to stop at")
