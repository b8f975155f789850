"""The metadata of a byte-level BPE tokenizer in a GGUF file, where pre-tokenizers have names instead of patterns."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from megatronish.checkpoint.paths import TOKENIZER_RECORD_FILE
from megatronish.data.tokenizers.formats import BPE_PATTERN
from megatronish.data.tokenizers.tokenizer import HuggingFaceTokenizer
from megatronish.errors import UserError
from megatronish.interop.tokenizer_files import ORIGIN_FILE, chat_template, recorded_tokenizer

# Pattern of the pre-tokenizer in tokenizer.json -> its name in llama.cpp.
_SPLITS: Mapping[str, str] = MappingProxyType(
    {BPE_PATTERN: "dbrx", BPE_PATTERN.replace(r"\p{N}{1,3}", r"\p{N}"): "qwen2"}
)


def add_tokenizer(writer: Any, source: Path, vocab_size: int) -> bool:
    """Write the tokenizer of the model in `source` as metadata; returns False if it has none.

    Texts start with the end-of-document token for a model trained here, and as in its Hugging Face folder for an imported
    one. Raises UserError for any but a byte-level BPE with a pre-tokenizer that llama.cpp has.
    """
    if not (source / TOKENIZER_RECORD_FILE).is_file():
        writer.add_tokenizer_model("no_vocab")
        return False
    tokenizer = recorded_tokenizer(source)
    if not isinstance(tokenizer, HuggingFaceTokenizer) or tokenizer.spec["model"]["type"] != "BPE":
        raise UserError(
            f"{source}: no GGUF of its tokenizer ({tokenizer.kind}): only a byte-level BPE can be exported."
        )
    spec = tokenizer.spec
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(_split_name(spec, source))
    tokens, kinds = _tokens(spec, vocab_size)
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in spec["model"]["merges"]]
    if not merges:
        raise UserError(f"{source}: no GGUF of its tokenizer: llama.cpp does not support a BPE without merges.")
    writer.add_token_merges(merges)
    imported = (source / ORIGIN_FILE).is_file()
    start_id = tokenizer.bos_id if imported else tokenizer.start_id
    writer.add_add_bos_token(start_id is not None)
    if start_id is not None:
        writer.add_bos_token_id(start_id)
    if tokenizer.eod_id is not None:
        writer.add_eos_token_id(tokenizer.eod_id)
    if (template := chat_template(source)) is not None:
        writer.add_chat_template(template)
    return True


def _split_name(spec: Mapping[str, Any], source: Path) -> str:
    """llama.cpp's name of the pre-tokenizer of a tokenizer.json. Raises UserError for an unknown one."""
    steps = spec.get("pre_tokenizer") or {}
    parts = steps.get("pretokenizers", [steps])
    kinds = [part.get("type") for part in parts]
    ends_in_bytes = kinds[-1:] == ["ByteLevel"] and not parts[-1].get("add_prefix_space")
    own_pattern = ends_in_bytes and parts[-1].get("use_regex", True)
    if own_pattern and kinds == ["ByteLevel"]:
        return "gpt-2"
    if own_pattern and kinds == ["Digits", "ByteLevel"] and parts[0].get("individual_digits"):
        return "smollm"
    if ends_in_bytes and not own_pattern and kinds == ["Split", "ByteLevel"]:
        name = _SPLITS.get((parts[0].get("pattern") or {}).get("Regex", ""))
        if name is not None and parts[0].get("behavior") == "Isolated" and not parts[0].get("invert"):
            # "llama-bpe" is the same pre-tokenizer, and looks up complete words before any merge.
            return "llama-bpe" if name == "dbrx" and spec["model"].get("ignore_merges") else name
    raise UserError(f"{source}: no GGUF of its tokenizer: its pre-tokenizer has no name in llama.cpp ({kinds}).")


def _tokens(spec: Mapping[str, Any], vocab_size: int) -> tuple[list[str], list[int]]:
    """Text and type of every token id of the model; ids that the tokenizer does not have are unused."""
    from gguf import TokenType

    tokens = [f"[PAD{number}]" for number in range(vocab_size)]
    kinds = [int(TokenType.UNUSED)] * vocab_size
    for text, number in spec["model"]["vocab"].items():
        tokens[number], kinds[number] = text, int(TokenType.NORMAL)
    for token in spec.get("added_tokens") or []:
        tokens[token["id"]] = token["content"]
        kinds[token["id"]] = int(TokenType.CONTROL if token["special"] else TokenType.USER_DEFINED)
    return tokens, kinds
