"""One interface over three kinds of tokenizer: Hugging Face `tokenizers` JSON, SentencePiece, and plain bytes.

Text never becomes a special token: the characters `<|endoftext|>` in a document are encoded as text. The end-of-document
token is appended by id, by the code that writes documents.
"""

from __future__ import annotations

import hashlib
import json
import os
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import orjson

from megatronish.data.tokenizers.formats import (
    BPE_PATTERN,
    EOD_TOKEN,
    KNOWN_EOD_TOKENS,
    byte_alphabet,
    byte_table,
    gpt2_json,
    is_byte_level,
    tiktoken_json,
)
from megatronish.errors import DataError

# The files that load_tokenizer looks for in a folder, in this order.
FILE_NAMES = ("tokenizer.json", "tokenizer.model", "spiece.model")


class Tokenizer(ABC):
    """Text to ids and back. `kind` names the back end; `fingerprint` is the SHA-256 of its file.

    `vocab_size` is one more than the largest id; `eod_id` is None where the tokenizer has no end-of-document token.
    `unknown_id` is the token for text that the vocabulary cannot hold, None where there is no such text or token.
    `lossless` is True where `decode_bytes(encode(text)) == text.encode()` for every text. `bos_id` is the token that an
    imported model begins every text with; None for models trained here, whose documents follow the end-of-document token of another.
    """

    kind: str
    vocab_size: int
    eod_id: int | None
    bos_id: int | None = None
    unknown_id: int | None
    fingerprint: str
    lossless: bool

    @property
    def start_id(self) -> int | None:
        """The token that precedes a text: `bos_id`, else `eod_id`."""
        return self.eod_id if self.bos_id is None else self.bos_id

    @abstractmethod
    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Ids of each text, int32[n], without any special token."""

    def encode(self, text: str) -> np.ndarray:
        """Ids of one text, int32[n], without any special token."""
        return self.encode_batch([text])[0]

    @abstractmethod
    def decode_bytes(self, ids: Sequence[int] | np.ndarray) -> bytes:
        """The bytes that ids stand for, special tokens left out."""

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """Text of ids, special tokens left out; bytes that are not UTF-8 become U+FFFD."""
        return self.decode_bytes(ids).decode("utf-8", errors="replace")

    @abstractmethod
    def token_text(self, token_id: int) -> str:
        """The token as the vocabulary names it."""

    @abstractmethod
    def save(self, path_without_suffix: str | os.PathLike[str]) -> Path | None:
        """Writes the tokenizer's file next to a data set (`.tokenizer.json`, `.tokenizer.model`); None if it needs none."""

    def _checked(self, ids: Sequence[int] | np.ndarray) -> np.ndarray:
        array = np.asarray(ids, dtype=np.int64)
        if array.size and (int(array.min()) < 0 or int(array.max()) >= self.vocab_size):
            raise ValueError(f"token ids {int(array.min())}..{int(array.max())} are outside 0..{self.vocab_size - 1}")
        return array


class ByteTokenizer(Tokenizer):
    """256 bytes and one end-of-document token, id 256."""

    kind = "bytes"
    lossless = True

    def __init__(self) -> None:
        self.vocab_size = 257
        self.eod_id = 256
        self.unknown_id = None
        self.fingerprint = hashlib.sha256(
            b"megatronish byte tokenizer: ids 0-255 are bytes, 256 ends a document"
        ).hexdigest()

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        return [np.frombuffer(text.encode("utf-8"), dtype=np.uint8).astype(np.int32) for text in texts]

    def decode_bytes(self, ids: Sequence[int] | np.ndarray) -> bytes:
        array = self._checked(ids)
        return array[array < 256].astype(np.uint8).tobytes()

    def token_text(self, token_id: int) -> str:
        return EOD_TOKEN if token_id == self.eod_id else chr(token_id)

    def save(self, path_without_suffix: str | os.PathLike[str]) -> Path | None:
        return None


class HuggingFaceTokenizer(Tokenizer):
    """A `tokenizers` JSON (byte-level BPE, WordPiece, Unigram). Bytes are recovered exactly where it is byte-level."""

    kind = "huggingface"

    def __init__(self, source: str, *, eod_token: str | None = None, eod_id: int | None = None, name: str = "") -> None:
        from tokenizers import Tokenizer as RawTokenizer

        place = name or "tokenizer"
        try:
            self._tokenizer = RawTokenizer.from_str(source)
        except Exception as error:  # the Rust library raises bare Exception for a file it cannot parse
            raise DataError(f"{place}: not a tokenizers JSON: {error}") from None
        vocabulary = self._tokenizer.get_vocab(with_added_tokens=True)
        if not vocabulary:
            raise DataError(f"{place}: the vocabulary is empty")
        self._source = source
        self.vocab_size = max(vocabulary.values()) + 1
        self.fingerprint = hashlib.sha256(source.encode("utf-8")).hexdigest()
        self.eod_id = eod_id if eod_id is not None else _find_eod(vocabulary, eod_token, place)
        spec = orjson.loads(source)
        self.unknown_id = _find_unknown(spec["model"], vocabulary)
        for token in spec.get("added_tokens") or []:
            if token["id"] == self.eod_id and not token["special"]:
                # Else its characters in a text would be read as the end of a document.
                token["special"] = True
                self._tokenizer = RawTokenizer.from_str(json.dumps(spec))
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._tokenizer.encode_special_tokens = True
        added = self._tokenizer.get_added_tokens_decoder()
        self._special_ids: set[int] = {i for i, token in added.items() if token.special}
        if self.eod_id is not None:
            self._special_ids.add(self.eod_id)
        self.lossless = is_byte_level(spec, vocabulary)
        self._added = added
        self._token_bytes: dict[int, bytes] | None = None

    @property
    def spec(self) -> dict[str, Any]:
        """The JSON, parsed anew: as Python objects it would take tens of megabytes in every worker."""
        return orjson.loads(self._source)

    def template_start(self) -> int | None:
        """The token that the file's own template (its post-processor) puts before a text; None unless it is one."""
        plain = self._tokenizer.encode("a", add_special_tokens=False).ids
        full = self._tokenizer.encode("a", add_special_tokens=True).ids
        begins_with_one = bool(plain) and full[1 : 1 + len(plain)] == plain and full[: len(plain)] != plain
        return int(full[0]) if begins_with_one else None

    def plain_spec(self) -> dict[str, Any]:
        """The JSON with nothing that could turn text into a special token, for libraries that have no option for it."""
        spec = self.spec
        kept = [token for token in spec.get("added_tokens") or [] if token["id"] not in self._special_ids]
        return spec | {"added_tokens": kept, "post_processor": None, "truncation": None, "padding": None}

    def byte_ranks(self) -> dict[bytes, int] | None:
        """Bytes of each token of a byte-level BPE to its id, None where ids do not follow the order of the merges."""
        spec = self.spec
        model = spec["model"]
        if not self.lossless or model.get("type") != "BPE" or any(i not in self._special_ids for i in self._added):
            return None
        vocabulary = model["vocab"]
        pairs = [pair.split(" ", 1) if isinstance(pair, str) else pair for pair in model["merges"]]
        merged = [vocabulary["".join(pair)] for pair in pairs]
        if merged != sorted(merged):
            return None
        alphabet = byte_alphabet()
        special = {token["content"] for token in spec.get("added_tokens") or []}
        return {bytes(alphabet[c] for c in token): i for token, i in vocabulary.items() if token not in special}

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        encodings = self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
        return [np.array(encoding.ids, dtype=np.int32) for encoding in encodings]

    def decode_bytes(self, ids: Sequence[int] | np.ndarray) -> bytes:
        array = self._checked(ids)
        if not self.lossless:
            kept = [i for i in array.tolist() if i not in self._special_ids]
            return self._tokenizer.decode(kept, skip_special_tokens=True).encode("utf-8")
        if (
            self._token_bytes is None
        ):  # made when first needed: encoding, which starts many processes, has no use for it
            vocabulary = self._tokenizer.get_vocab(with_added_tokens=True)
            self._token_bytes = byte_table(vocabulary, self._added, self._special_ids)
        table = self._token_bytes
        return b"".join([table.get(i, b"") for i in array.tolist()])

    def token_text(self, token_id: int) -> str:
        return str(self._tokenizer.id_to_token(token_id))

    def save(self, path_without_suffix: str | os.PathLike[str]) -> Path | None:
        path = Path(f"{os.fspath(path_without_suffix)}.tokenizer.json")
        path.write_bytes(self._source.encode("utf-8"))
        return path


class SentencePieceTokenizer(Tokenizer):
    """A SentencePiece `.model`. Its own normalisation applies, so bytes are recovered only up to that."""

    kind = "sentencepiece"
    lossless = False

    def __init__(self, model: bytes, *, eod_id: int | None = None, name: str = "", threads: int = 1) -> None:
        import sentencepiece

        self._processor: Any = sentencepiece.SentencePieceProcessor()
        try:
            self._processor.LoadFromSerializedProto(model)
        except (RuntimeError, OSError) as error:
            raise DataError(f"{name or 'tokenizer'}: not a SentencePiece model: {error}") from None
        self.model = model
        self._threads = threads
        self.vocab_size = int(self._processor.vocab_size())
        self.fingerprint = hashlib.sha256(model).hexdigest()
        self.unknown_id = int(self._processor.unk_id())
        own_eod = int(self._processor.eos_id())
        self.eod_id = eod_id if eod_id is not None else (own_eod if own_eod >= 0 else None)
        self._control_ids = {i for i in range(self.vocab_size) if self._processor.IsControl(i)}

    @property
    def own_bos_id(self) -> int | None:
        """The token that the file names as the beginning of a text; whether a model uses it is recorded elsewhere."""
        found = int(self._processor.bos_id())
        return found if found >= 0 else None

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        encoded = self._processor.EncodeAsIds(list(texts), num_threads=self._threads)
        return [np.array(ids, dtype=np.int32) for ids in encoded]

    def decode_bytes(self, ids: Sequence[int] | np.ndarray) -> bytes:
        kept = [i for i in self._checked(ids).tolist() if i not in self._control_ids]
        return self._processor.DecodeIds(kept).encode("utf-8")

    def token_text(self, token_id: int) -> str:
        return str(self._processor.IdToPiece(token_id))

    def save(self, path_without_suffix: str | os.PathLike[str]) -> Path | None:
        path = Path(f"{os.fspath(path_without_suffix)}.tokenizer.model")
        path.write_bytes(self.model)
        return path


def load_tokenizer(
    source: str | os.PathLike[str], *, eod_token: str | None = None, eod_id: int | None = None, threads: int = 1
) -> Tokenizer:
    """Opens `bytes`, a tokenizer.json or the folder that holds one, a SentencePiece `.model`, or a `.tiktoken` file.

    The end-of-document token is `eod_id`, else `eod_token`, else the folder's tokenizer_config.json, else a well-known
    name. `threads` is for SentencePiece; `tokenizers` takes its own from RAYON_NUM_THREADS. Raises DataError.
    """
    name = os.fspath(source)
    if name.endswith(".tiktoken"):
        return HuggingFaceTokenizer(tiktoken_json(name), eod_token=eod_token, name=name)
    if name == "bytes":
        return ByteTokenizer()
    path = tokenizer_file_at(Path(name))
    if path != Path(name):
        eod_token = eod_token or _eos_token_of(Path(name))
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        raise DataError(
            f"tokenizer {name}: no such file; give a tokenizer.json, its folder, a SentencePiece .model, or `bytes`"
        ) from None
    except OSError as error:
        raise DataError(f"tokenizer {name}: cannot be read: {error.strerror}") from None
    if content.lstrip()[:1] == b"{":
        try:
            text = content.decode("utf-8")
        except UnicodeDecodeError as error:
            raise DataError(f"tokenizer {path}: not UTF-8 at byte {error.start}") from None
        return HuggingFaceTokenizer(text, eod_token=eod_token, eod_id=eod_id, name=str(path))
    tokenizer = SentencePieceTokenizer(content, eod_id=eod_id, name=str(path), threads=threads)
    if eod_token is not None and eod_id is None:
        piece = tokenizer._processor.PieceToId(eod_token)
        if tokenizer._processor.IdToPiece(piece) != eod_token:
            raise DataError(f"{path}: the vocabulary has no token {eod_token!r} to end documents with")
        tokenizer.eod_id = int(piece)
    return tokenizer


def gpt2_tokenizer(vocab_file: str, merge_file: str, eod_token: str | None = None) -> HuggingFaceTokenizer:
    """Opens GPT-2's vocab.json and merges.txt. Raises DataError for files of another kind."""
    return HuggingFaceTokenizer(gpt2_json(vocab_file, merge_file, eod_token), eod_token=eod_token, name=vocab_file)


def train_bpe(texts: Iterable[str | list[str]], vocab_size: int) -> HuggingFaceTokenizer:
    """Trains a byte-level BPE (Sennrich et al. 2016; byte alphabet as in GPT-2) whose last id is `<|endoftext|>`.

    `vocab_size` counts the 256 bytes and the end-of-document token; a short text may fill less of it. Raises DataError
    below 257.
    """
    from tokenizers import models, pre_tokenizers, trainers

    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - 1,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    return _trained(models.BPE(), trainer, texts, vocab_size)


def train_unigram(texts: Iterable[str | list[str]], vocab_size: int) -> HuggingFaceTokenizer:
    """Trains a Unigram language model (Kudo 2018) over bytes whose last id is `<|endoftext|>`; else as `train_bpe`."""
    from tokenizers import models, pre_tokenizers, trainers

    trainer = trainers.UnigramTrainer(
        vocab_size=vocab_size - 1,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    return _trained(models.Unigram(), trainer, texts, vocab_size)


def _trained(model: Any, trainer: Any, texts: Iterable[str | list[str]], vocab_size: int) -> HuggingFaceTokenizer:
    from tokenizers import AddedToken, Regex, decoders, pre_tokenizers
    from tokenizers import Tokenizer as RawTokenizer

    if vocab_size < 257:
        raise DataError(
            f"a vocabulary of {vocab_size}: at least 257 entries are needed (256 bytes and one token that ends documents)"
        )
    raw = RawTokenizer(model)
    raw.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(BPE_PATTERN), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    raw.decoder = decoders.ByteLevel()
    raw.train_from_iterator(texts, trainer)
    raw.add_special_tokens([AddedToken(EOD_TOKEN, special=True, normalized=False)])
    return HuggingFaceTokenizer(raw.to_str(), eod_token=EOD_TOKEN, name="trained tokenizer")


def tokenizer_file_at(path: Path) -> Path:
    """The tokenizer file of a path: itself, or the one in the folder that it is. Raises DataError for a folder without one."""
    if not path.is_dir():
        return path
    for name in FILE_NAMES:
        if (path / name).is_file():
            return path / name
    raise DataError(f"{path}: no {', '.join(FILE_NAMES[:-1])} or {FILE_NAMES[-1]} in this folder")


def _eos_token_of(folder: Path) -> str | None:
    """The end-of-text token that a folder's tokenizer_config.json names, if any."""
    config = folder / "tokenizer_config.json"
    if not config.is_file():
        return None
    try:
        eos = json.loads(config.read_bytes()).get("eos_token")
    except (ValueError, AttributeError) as error:
        raise DataError(f"{config}: not a JSON object: {error}") from None
    return eos.get("content") if isinstance(eos, dict) else eos


def _find_eod(vocabulary: dict[str, int], eod_token: str | None, name: str) -> int | None:
    if eod_token is not None:
        if eod_token not in vocabulary:
            raise DataError(f"{name or 'tokenizer'}: the vocabulary has no token {eod_token!r} to end documents with")
        return vocabulary[eod_token]
    return next((vocabulary[token] for token in KNOWN_EOD_TOKENS if token in vocabulary), None)


def _find_unknown(model: dict[str, Any], vocabulary: dict[str, int]) -> int | None:
    """A Unigram model names its unknown token by id, the others by text."""
    by_id = model.get("unk_id")
    return by_id if by_id is not None else vocabulary.get(model.get("unk_token") or "")
