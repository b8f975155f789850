"""Tokenizers from other files: GPT-2's vocab.json with merges.txt, and .tiktoken rank files, as `tokenizers` JSON."""

from __future__ import annotations

import base64
import binascii
import json
import os
from pathlib import Path
from typing import Any

from megatronish.data.tokenizers.tokenizer import BPE_PATTERN, EOD_TOKEN, HuggingFaceTokenizer, byte_alphabet
from megatronish.errors import DataError

GPT2_PATTERN = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_UPPER, _LOWER = r"\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}", r"\p{Ll}\p{Lm}\p{Lo}\p{M}"
_CONTRACTION = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
O200K_PATTERN = "|".join(
    (
        rf"[^\r\n\p{{L}}\p{{N}}]?[{_UPPER}]*[{_LOWER}]+{_CONTRACTION}",
        rf"[^\r\n\p{{L}}\p{{N}}]?[{_UPPER}]+[{_LOWER}]*{_CONTRACTION}",
        r"\p{N}{1,3}",
        r" ?[^\s\p{L}\p{N}]+[\r\n/]*",
        r"\s*[\r\n]+",
        r"\s+(?!\S)",
        r"\s+",
    )
)
# A rank file holds no split pattern: it follows from the published encoding that the file is named after. The second entry
# is the id of <|endoftext|> there.
TIKTOKEN_ENCODINGS = {
    "r50k_base": (GPT2_PATTERN, 50256),
    "gpt2": (GPT2_PATTERN, 50256),
    "cl100k_base": (BPE_PATTERN, 100257),
    "o200k_base": (O200K_PATTERN, 199999),
}


def gpt2_tokenizer(vocab_file: str, merge_file: str, eod_token: str | None = None) -> HuggingFaceTokenizer:
    """GPT-2's two files (Megatron's --vocab-file and --merge-file). Raises DataError for files of another kind."""
    try:
        vocabulary = json.loads(Path(vocab_file).read_bytes())
        lines = Path(merge_file).read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise DataError(f"{error.filename}: cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise DataError(
            f"--vocab-file {vocab_file}, --merge-file {merge_file}: not a vocab.json and a merges.txt: {error}"
        ) from None
    merges = [line.split(" ") for line in lines if line and not line.startswith("#version")]
    if not isinstance(vocabulary, dict) or any(len(pair) != 2 for pair in merges):
        raise DataError(f"--vocab-file {vocab_file}, --merge-file {merge_file}: not a vocab.json and a merges.txt")
    end = eod_token or EOD_TOKEN
    added = {end: vocabulary[end]} if end in vocabulary else {}
    spec = _bpe_spec(vocabulary, merges, None, added)
    return HuggingFaceTokenizer(json.dumps(spec, ensure_ascii=False), eod_token=eod_token, name=vocab_file)


def tiktoken_tokenizer(path: str | os.PathLike[str], eod_token: str | None = None) -> HuggingFaceTokenizer:
    """A .tiktoken file named after a published encoding. Raises DataError for other names or contents."""
    name = Path(path).name.removesuffix(".tiktoken")
    if name not in TIKTOKEN_ENCODINGS:
        known = ", ".join(f"{known}.tiktoken" for known in TIKTOKEN_ENCODINGS)
        raise DataError(
            f"tokenizer {path}: a rank file does not say how text is split; name it after its encoding ({known}) or give a "
            "tokenizer.json"
        )
    try:
        pairs = [line.split() for line in Path(path).read_bytes().splitlines() if line]
        ranks = {base64.b64decode(token, validate=True): int(rank) for token, rank in pairs}
    except OSError as error:
        raise DataError(f"tokenizer {path}: cannot be read: {error.strerror}") from None
    except (ValueError, binascii.Error) as error:
        raise DataError(f"tokenizer {path}: not lines of a base64 token and its rank: {error}") from None
    pattern, end = TIKTOKEN_ENCODINGS[name]
    if end in ranks.values() or not all(bytes([b]) in ranks for b in range(256)):
        raise DataError(f"tokenizer {path}: its ranks are not those of {name}")
    letters = {byte: character for character, byte in byte_alphabet().items()}
    vocabulary = {"".join(letters[b] for b in token): rank for token, rank in ranks.items()}
    merges = []
    for token in sorted(ranks, key=ranks.__getitem__):
        if len(token) > 1:
            left, right = _last_merge(ranks, token, path)
            merges.append(["".join(letters[b] for b in part) for part in (left, right)])
    vocabulary[EOD_TOKEN] = end  # its id may leave a gap, which an added token alone would not keep
    spec = _bpe_spec(vocabulary, merges, pattern, {EOD_TOKEN: end})
    return HuggingFaceTokenizer(json.dumps(spec, ensure_ascii=False), eod_token=eod_token, name=str(path))


def _last_merge(ranks: dict[bytes, int], token: bytes, path: str | os.PathLike[str]) -> tuple[bytes, bytes]:
    """The two parts that make a token when only lower ranks have been merged."""
    parts = [bytes([b]) for b in token]
    limit = ranks[token]
    while len(parts) > 2:
        candidates = [(ranks.get(parts[i] + parts[i + 1], limit), i) for i in range(len(parts) - 1)]
        rank, i = min(candidates)
        if rank >= limit:
            raise DataError(f"tokenizer {path}: the token of rank {limit} cannot be made of lower ones")
        parts[i : i + 2] = [parts[i] + parts[i + 1]]
    return parts[0], parts[1]


def _bpe_spec(
    vocabulary: dict[str, int], merges: list[list[str]], pattern: str | None, added: dict[str, int]
) -> dict[str, Any]:
    """`tokenizers` JSON of a byte-level BPE; a pattern of None is GPT-2's."""
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": pattern is None}
    split = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
    steps = byte_level if pattern is None else {"type": "Sequence", "pretokenizers": [split, byte_level]}
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": i, "content": content, **flags} for content, i in added.items()],
        "normalizer": None,
        "pre_tokenizer": steps,
        "post_processor": None,
        "decoder": {**byte_level, "use_regex": True},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": vocabulary,
            "merges": merges,
        },
    }
