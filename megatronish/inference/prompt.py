"""A prompt as the model should read it: behind a document's start, and free to end inside a token."""

from __future__ import annotations

from dataclasses import dataclass

from megatronish.data.tokenizers.tokenizer import Tokenizer
from megatronish.errors import UserError


@dataclass(frozen=True)
class Prompt:
    """ids: what the model reads. first_ids: the tokens that the first new one is drawn from, None for all of them;
    `overlap` bytes of it stand in the prompt's text already.

    A prompt's last token is not read but drawn again among the tokens that begin with its bytes ("token healing",
    Lundberg 2023): "def " ends in a blank that text has inside the next token (" main"), and a model never saw it alone.
    """

    ids: list[int]
    first_ids: list[int] | None = None
    overlap: int = 0


def encode_prompt(tokenizer: Tokenizer, text: str) -> Prompt:
    """Ids of a prompt behind the token that texts start with (`Tokenizer.start_id`), if there is one.

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
