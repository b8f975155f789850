"""What `tokenizers` JSON holds: properties read from it, and GPT-2's vocab.json with merges.txt and .tiktoken rank files
converted to it. The Tokenizer classes are not used here."""

from __future__ import annotations

import base64
import binascii
import json
import os
from pathlib import Path
from typing import Any

from megatronish.errors import DataError

EOD_TOKEN = "<|endoftext|>"
# Names under which published tokenizers keep their end-of-text token, tried in this order if no configuration names it.
KNOWN_EOD_TOKENS = (EOD_TOKEN, "<|end_of_text|>", "<|end▁of▁sentence|>", "</s>", "<eos>", "<|eos|>", "<|im_end|>")
# What one token may span before merges are learnt, as in GPT-4 and Llama 3 (so that fast back ends know it): an English
# contraction, a word with one leading character, up to three digits, a run of punctuation with the line breaks after it,
# line breaks, other white space (the last blank goes to the next word).
BPE_PATTERN = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
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


def gpt2_json(vocab_file: str, merge_file: str, eod_token: str | None = None) -> str:
    """GPT-2's two files (Megatron's --vocab-file and --merge-file) as `tokenizers` JSON.

    Raises DataError for files of another kind.
    """
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
    return _bpe_json(vocabulary, merges, None, added)


def tiktoken_json(path: str | os.PathLike[str]) -> str:
    """A .tiktoken file named after a published encoding as `tokenizers` JSON.

    Raises DataError for other names or contents.
    """
    name = Path(path).name.removesuffix(".tiktoken")
    if name not in TIKTOKEN_ENCODINGS:
        known = ", ".join(f"{known}.tiktoken" for known in TIKTOKEN_ENCODINGS)
        raise DataError(
            f"tokenizer {path}: a rank file does not contain the split pattern; name it after its encoding ({known}) or give a "
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
    return _bpe_json(vocabulary, merges, pattern, {EOD_TOKEN: end})


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


def _bpe_json(vocabulary: dict[str, int], merges: list[list[str]], pattern: str | None, added: dict[str, int]) -> str:
    """`tokenizers` JSON of a byte-level BPE; a pattern of None is GPT-2's."""
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": pattern is None}
    split = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
    steps = byte_level if pattern is None else {"type": "Sequence", "pretokenizers": [split, byte_level]}
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    spec = {
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
    return json.dumps(spec, ensure_ascii=False)


def byte_alphabet() -> dict[str, int]:
    """Character to byte as in GPT-2: printable Latin-1 stands for itself, the other bytes for U+0100 onwards."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in set(printable)]
    return {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(others)}


def is_byte_level(spec: dict[str, Any], vocabulary: dict[str, int]) -> bool:
    """Whether every token is a string over a complete byte alphabet and nothing alters the text on its way to ids."""
    strips = any(token["lstrip"] or token["rstrip"] for token in spec.get("added_tokens") or [] if not token["special"])
    if spec.get("normalizer") is not None or strips or not all(c in vocabulary for c in byte_alphabet()):
        return False
    decoder = spec.get("decoder") or {}
    steps = spec.get("pre_tokenizer") or {}
    parts = steps.get("pretokenizers", [steps])
    byte_level = [part for part in parts if part.get("type") == "ByteLevel"]
    keeps_text = all(
        part.get("type") in ("ByteLevel", "Digits")
        or (part.get("type") == "Split" and part.get("behavior") != "Removed")
        for part in parts
    )
    prefix_space = any(part.get("add_prefix_space") for part in byte_level)
    return decoder.get("type") == "ByteLevel" and bool(byte_level) and keeps_text and not prefix_space


def split_pattern(spec: dict[str, Any]) -> str | None:
    """The regular expression by which a tokenizer cuts text into words, if it is one."""
    steps = spec.get("pre_tokenizer") or {}
    parts = steps.get("pretokenizers", [steps])
    patterns = []
    for part in parts:
        if part.get("type") == "Split" and part.get("behavior") == "Isolated" and not part.get("invert"):
            patterns.append((part.get("pattern") or {}).get("Regex"))
        elif part.get("type") == "ByteLevel" and not part.get("add_prefix_space"):
            if part.get("use_regex", True):
                patterns.append(GPT2_PATTERN)
        else:
            return None
    return patterns[0] if len(patterns) == 1 else None


def byte_table(vocabulary: dict[str, int], added: dict[int, Any], special: set[int]) -> dict[int, bytes]:
    """Bytes of each id that is not special; added tokens are literal text."""
    alphabet = byte_alphabet()
    table = {}
    for token, i in vocabulary.items():
        if i in special:
            continue
        if i in added:
            table[i] = added[i].content.encode("utf-8")
        else:
            table[i] = bytes(alphabet[c] for c in token) if all(c in alphabet for c in token) else token.encode("utf-8")
    return table
