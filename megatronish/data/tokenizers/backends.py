"""Encoders of texts: the library of the tokenizer's own format, or a faster one that is checked against it.

gigatoken and tiktoken read the same tokenizer and are meant to give the same ids, many times faster. Neither is trusted:
a sample of the input is compared before the start, more of it during the run, and gigatoken also on every character
that the input turns out to hold (its disagreements are about characters of new Unicode versions). What differs is encoded
by the tokenizer's own library, so the ids never depend on the back end.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import mmap
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import orjson

from megatronish.data.tokenizers.formats import split_pattern
from megatronish.data.tokenizers.tokenizer import HuggingFaceTokenizer, SentencePieceTokenizer, Tokenizer
from megatronish.errors import DataError

BACKENDS = ("auto", "hf", "gigatoken", "tiktoken", "sentencepiece")
NATIVE_NAMES = {"huggingface": "hf", "sentencepiece": "sentencepiece", "bytes": "bytes"}
ASCII_BYTES = bytes(range(128))
# gigatoken remembers every word it has seen; a worker whose memory has grown by this much loads it again.
CACHE_BYTES = 64 << 20
MEMORY_CHECK_BYTES = 1 << 20
PROBED_AT_ONCE = 64
# Hugging Face tokenizers take 100 bytes of memory for one of text; after a long document the C library keeps these until malloc_trim.
LONG_TEXT = 1 << 18


class Encoder(ABC):
    """Encodes texts. `name` is that of --backend; `checked`: results of another library, to be compared from time to time.

    `batch_bytes`: how much text to give at a time, so that what the library needs for it stays small.
    """

    name: str
    checked = False
    batch_bytes = 1 << 17

    def __init__(self, reference: Tokenizer) -> None:
        self.reference = reference

    @abstractmethod
    def encode(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Ids of each text: one-dimensional arrays of one integer dtype."""

    def agrees(self, text: str) -> bool:
        """Whether a text gets the ids that the tokenizer's own library gives it."""
        return np.array_equal(self.encode([text])[0], self.reference.encode(text))


class NativeEncoder(Encoder):
    """The library of the tokenizer's own format."""

    def __init__(self, reference: Tokenizer) -> None:
        super().__init__(reference)
        self.name = NATIVE_NAMES[reference.kind]

    def encode(self, texts: Sequence[str]) -> list[np.ndarray]:
        ids = self.reference.encode_batch(texts)
        if max(map(len, texts), default=0) > LONG_TEXT:
            release_memory()
        return ids


class TiktokenEncoder(Encoder):
    """tiktoken on a byte-level BPE whose ids follow the order of its merges (GPT-2 and most later ones)."""

    name = "tiktoken"
    checked = True

    def __init__(self, reference: HuggingFaceTokenizer) -> None:
        super().__init__(reference)
        import tiktoken

        pattern = split_pattern(reference.spec)
        ranks = reference.byte_ranks()
        if pattern is None or ranks is None:
            raise DataError("it is not a byte-level BPE with one split pattern, which is what tiktoken reads")
        self._encoding = tiktoken.Encoding(
            name="from tokenizer.json", pat_str=pattern, mergeable_ranks=ranks, special_tokens={}
        )

    def encode(self, texts: Sequence[str]) -> list[np.ndarray]:
        encode = self._encoding.encode_to_numpy
        return [encode(text, disallowed_special=()) for text in texts]


class GigatokenEncoder(Encoder):
    """gigatoken, with every character that occurs checked once, and memory kept within bounds."""

    name = "gigatoken"
    checked = True
    batch_bytes = 1 << 20

    def __init__(self, reference: HuggingFaceTokenizer | SentencePieceTokenizer) -> None:
        super().__init__(reference)
        import gigatoken

        try:
            if isinstance(reference, HuggingFaceTokenizer):
                source = orjson.dumps(reference.plain_spec()).decode()
                self._load: Callable[[], Any] = lambda: gigatoken.Tokenizer.from_json(source).backend
            else:
                # Control pieces would be found in texts; without their definition they stay text.
                spec = json.loads(gigatoken.Tokenizer.from_sentencepiece(reference.model)._hf_json or "{}")
                spec["added_tokens"] = [token for token in spec["added_tokens"] if not token["special"]]
                plain = json.dumps(spec)
                self._load = lambda: gigatoken.Tokenizer.from_json(plain).backend
            self._raw: Any = self._load()
        except (
            Exception
        ) as error:  # the Rust library raises RuntimeError, ValueError and others for what it cannot read
            raise DataError(str(error).splitlines()[0][:200]) from None
        self._seen: set[str] = set()
        self._differing: set[str] = set()
        # One byte per character, shared by the processes forked from here on: each character is compared once.
        self._agreed = mmap.mmap(-1, sys.maxunicode + 1)
        self._encoded_bytes = 0
        self._memory_limit: int | None = None

    def encode(self, texts: Sequence[str]) -> list[np.ndarray]:
        self._bound_memory()
        encode, found = self._raw.encode, []
        for text in texts:
            if text.isascii():
                self._encoded_bytes += len(text)
                found.append(encode(text))
                continue
            raw = text.encode("utf-8")
            self._encoded_bytes += len(raw)
            characters = set(raw.translate(None, delete=ASCII_BYTES).decode("utf-8"))
            if not characters <= self._seen:
                self._probe(characters - self._seen)
            if self._differing and not characters.isdisjoint(self._differing):
                found.append(self.reference.encode(text).astype(np.uint32))
            else:
                found.append(encode(raw))
        return found

    def _probe(self, characters: set[str]) -> None:
        """Compares each new character next to letters, digits, blanks and itself, where its class decides how text is split.

        Many at once, as most calls would otherwise be for a single character; one by one where those differ.
        """
        self._seen |= characters
        order = sorted(character for character in characters if not self._agreed[ord(character)])
        for begin in range(0, len(order), PROBED_AT_ONCE):
            group = order[begin : begin + PROBED_AT_ONCE]
            if self._same("".join(map(_probe_of, group))):
                for character in group:
                    self._agreed[ord(character)] = 1
                continue
            alone = group if len(group) > 1 else []
            self._differing |= {character for character in alone if not self._same(_probe_of(character))} or set(group)

    def _same(self, text: str) -> bool:
        return np.array_equal(self._raw.encode(text), self.reference.encode(text))

    def _bound_memory(self) -> None:
        if self._memory_limit is None:
            self._memory_limit = _resident_bytes() + CACHE_BYTES
        if self._encoded_bytes < MEMORY_CHECK_BYTES:
            return
        self._encoded_bytes = 0
        if _resident_bytes() > self._memory_limit:
            self._raw = None
            self._raw = self._load()
            # What is resident now cannot be given back; grow from here, by at least a quarter of the allowance.
            self._memory_limit = max(self._memory_limit, _resident_bytes() + CACHE_BYTES // 4)


def release_memory() -> None:
    """Return free memory that malloc holds to the system (glibc only)."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)


def _probe_of(character: str) -> str:
    c = character
    return f"a{c}b {c}1{c} {c}{c}\n{c}\n"


def _resident_bytes() -> int:
    import psutil

    return int(psutil.Process().memory_info().rss)


def choose_encoder(name: str, tokenizer: Tokenizer, sample: Sequence[str], warn: Callable[[str], None]) -> Encoder:
    """The encoder that --backend `name` means for a tokenizer; a fast one only if it gives the sample the same ids.

    `auto` takes gigatoken if possible, and calls `warn` with the reason if not. Raises DataError if a named one is not available.
    """
    assert name in BACKENDS, name
    native = NativeEncoder(tokenizer)
    if name == native.name or tokenizer.kind == "bytes":
        return native
    if name in ("hf", "sentencepiece"):
        raise DataError(
            f"--backend {name}: this is a {tokenizer.kind} tokenizer, which it does not read; leave --backend out"
        )
    wanted = "gigatoken" if name == "auto" else name
    try:
        encoder = _fast_encoder(wanted, tokenizer)
        different = next((text for text in sample if not encoder.agrees(text)), None)
        if different is None:
            return encoder
        problem = f"its ids differ from those of {native.name} for the text {different[:60]!r}"
    except ImportError:
        problem = "it is not installed (pip install 'megatronish[data]')"
    except DataError as error:
        problem = f"it cannot read this tokenizer: {error}"
    if name != "auto":
        raise DataError(f"--backend {name}: {problem}; use --backend {native.name}")
    warn(f"encoding with {native.name}, the slow way: gigatoken is not used, because {problem}")
    return native


def _fast_encoder(name: str, tokenizer: Tokenizer) -> Encoder:
    if name == "gigatoken" and isinstance(tokenizer, HuggingFaceTokenizer | SentencePieceTokenizer):
        return GigatokenEncoder(tokenizer)
    if name == "tiktoken" and isinstance(tokenizer, HuggingFaceTokenizer):
        return TiktokenEncoder(tokenizer)
    raise DataError(f"it does not read {tokenizer.kind} tokenizers")
