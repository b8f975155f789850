"""Token ids to text as they come, without ever showing half a character."""

from __future__ import annotations

import codecs
from collections.abc import Iterable, Iterator, Sequence

from megatronish.data.tokenizers.tokenizer import Tokenizer
from megatronish.errors import UserError
from megatronish.inference.prompt import Prompt

_INCOMPLETE = "\ufffd"


class TextStream:
    """Turns ids into text piece by piece; the pieces joined are the text of all ids.

    A lossless tokenizer is decoded byte by byte, and bytes wait until their UTF-8 character is whole. Others decode a
    token by its neighbours (a leading blank is dropped at the start of a text): there a piece is what a token adds to
    the text of the tokens before it, `prompt_ids` first. overlap: bytes of the first id of a lossless tokenizer that are
    shown already.
    """

    def __init__(self, tokenizer: Tokenizer, prompt_ids: Sequence[int] = (), overlap: int = 0) -> None:
        self._tokenizer = tokenizer
        self._overlap = overlap
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._ids = list(prompt_ids)
        self._context = 0  # ids from here on give the neighbours
        self._shown = len(self._ids)  # ids before here are shown

    def push(self, token_id: int) -> str:
        """The text that is complete with this id, often empty, at times several characters."""
        if self._tokenizer.lossless:
            skipped, self._overlap = self._overlap, 0
            return self._decoder.decode(self._tokenizer.decode_bytes([token_id])[skipped:])
        self._ids.append(token_id)
        piece = self._added()
        if not piece or piece.endswith(_INCOMPLETE):  # bytes of a character that is not whole yet
            return ""
        self._context, self._shown = self._shown, len(self._ids)
        return piece

    def finish(self) -> str:
        """What is left when no id follows: U+FFFD for bytes that never became a character."""
        if self._tokenizer.lossless:
            return self._decoder.decode(b"", final=True)
        piece = self._added()
        self._context = self._shown = len(self._ids)
        return piece

    def _added(self) -> str:
        before = self._tokenizer.decode(self._ids[self._context : self._shown])
        return self._tokenizer.decode(self._ids[self._context :])[len(before) :]


class StopStrings:
    """Lets text pass up to the first stop string; what may be the beginning of one waits until it is known.

    `found`: a stop string has ended the text.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        """Raises UserError for an empty one, which every text contains."""
        if any(not stop for stop in stops):
            raise UserError("a stop string is empty: leave it out, or give the text to stop at")
        self._stops = tuple(stops)
        self._held = ""
        self.found = False

    def push(self, text: str) -> str:
        """The text that certainly comes before any stop string, with `text` behind what was held back."""
        if self.found:
            return ""
        self._held += text
        places = [place for stop in self._stops if (place := self._held.find(stop)) >= 0]
        if places:
            self.found = True
            passed, self._held = self._held[: min(places)], ""
            return passed
        keep = max((self._overlap(stop) for stop in self._stops), default=0)
        passed = self._held[: len(self._held) - keep]
        self._held = self._held[len(self._held) - keep :]
        return passed

    def finish(self) -> str:
        """What was held back, for no text follows."""
        held, self._held = self._held, ""
        return held

    def _overlap(self, stop: str) -> int:
        """Length of the longest beginning of `stop` that the held text ends in."""
        longest = min(len(stop) - 1, len(self._held))
        return next((n for n in range(longest, 0, -1) if self._held.endswith(stop[:n])), 0)


def text_pieces(tokenizer: Tokenizer, prompt: Prompt, new_ids: Iterable[int]) -> Iterator[str]:
    """The text of `new_ids` behind the prompt's, piece by piece as the ids come."""
    stream = TextStream(tokenizer, prompt.ids, prompt.overlap)
    for token_id in new_ids:
        yield stream.push(token_id)
    yield stream.finish()
