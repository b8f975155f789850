"""The tokenizer of a model, and what else Hugging Face keeps beside its weights, carried both ways."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatronish.checkpoint.paths import RUN_FILE, TOKENIZER_RECORD_FILE
from megatronish.config.huggingface import CONFIG_JSON
from megatronish.data.tokenizers.formats import EOD_TOKEN, byte_alphabet
from megatronish.data.tokenizers.tokenizer import (
    HuggingFaceTokenizer,
    SentencePieceTokenizer,
    Tokenizer,
    load_tokenizer,
)
from megatronish.errors import UserError

ORIGIN_FILE = "huggingface_config.json"  # config.json of the model that an imported one was
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model")
_SETTINGS, _TEMPLATE = "tokenizer_config.json", "chat_template.jinja"
_BESIDE = (
    _SETTINGS,
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    _TEMPLATE,
    "chat_template.json",
    "generation_config.json",
)


@dataclass(frozen=True)
class Carried:
    """What came along. kind None: no tokenizer. bos_id: the token that texts begin with, where the model wants one.
    from_origin: with all that its Hugging Face folder says about it."""

    kind: str | None
    eod_id: int | None = None
    bos_id: int | None = None
    from_origin: bool = False


@dataclass(frozen=True)
class Origin:
    """The Hugging Face model that a model of ours came from: its config.json, and where its files are; else empty."""

    config: Mapping[str, Any]
    folder: Path | None


def carry_tokenizer(source: Path, target: Path) -> Carried:
    """Copy the tokenizer of a Hugging Face folder, its settings, and config.json as ORIGIN_FILE, into a folder of ours.

    Raises UserError for a tokenizer that cannot be read.
    """
    shutil.copyfile(source / CONFIG_JSON, target / ORIGIN_FILE)
    for name in (*TOKENIZER_FILES, *_BESIDE):
        if (source / name).is_file():
            shutil.copyfile(source / name, target / name)
    if not any((source / name).is_file() for name in TOKENIZER_FILES):
        return Carried(None)
    tokenizer = load_tokenizer(source)
    bos_id = begins_with(source, tokenizer)
    record = {
        "kind": tokenizer.kind,
        "eod_id": tokenizer.eod_id,
        "bos_id": bos_id,
        "sha256": tokenizer.fingerprint,
    }
    (target / TOKENIZER_RECORD_FILE).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    return Carried(tokenizer.kind, tokenizer.eod_id, bos_id, from_origin=True)


def begins_with(source: Path, tokenizer: Tokenizer) -> int | None:
    """The token that AutoTokenizer puts before every text for the model in `source`, None where it puts none.

    A tokenizer.json says so by its template; beside a SentencePiece file `add_bos_token` of tokenizer_config.json does, and
    silence means yes, as in LlamaTokenizer. Raises UserError for settings that cannot be read.
    """
    if isinstance(tokenizer, HuggingFaceTokenizer):
        return tokenizer.template_start()
    settings = _read(source / _SETTINGS) if (source / _SETTINGS).is_file() else {}
    wanted = settings.get("add_bos_token", True) is not False
    return tokenizer.own_bos_id if wanted and isinstance(tokenizer, SentencePieceTokenizer) else None


def fingerprints(source: Path) -> set[str]:
    """SHA-256 of the tokenizer of a Hugging Face folder, in each form that it is there in."""
    return {load_tokenizer(source / name).fingerprint for name in TOKENIZER_FILES if (source / name).is_file()}


def find_origin(source: Path) -> Origin:
    """Where the model in `source` came from: an imported folder says, and the configuration of a run that began there."""
    if (source / ORIGIN_FILE).is_file():
        return Origin(_read(source / ORIGIN_FILE), source)
    if (source / RUN_FILE).is_file():
        model = _read(source / RUN_FILE).get("megatronish", {}).get("model", {})
        folder = Path(model.get("from_hf") or "")
        if model.get("from_hf") and (folder / CONFIG_JSON).is_file():
            return Origin(_read(folder / CONFIG_JSON), folder)
    return Origin({}, None)


def write_tokenizer(source: Path, target: Path, origin: Origin, context: int) -> Carried:
    """Write the tokenizer of a checkpoint so that AutoTokenizer opens it; with its settings where they are at hand.

    context: the model's, in tokens. Raises UserError for a damaged tokenizer.
    """
    tokenizer = recorded_tokenizer(source)
    if tokenizer is None:
        return Carried(None)
    if tokenizer.kind == "bytes":
        (target / "tokenizer.json").write_text(byte_level_json(), encoding="utf-8")
        _write_settings(target, EOD_TOKEN, context)
        return Carried("bytes", tokenizer.eod_id)
    if origin.folder is not None and tokenizer.fingerprint in fingerprints(origin.folder):
        for name in (*TOKENIZER_FILES, *_BESIDE):
            if (origin.folder / name).is_file():
                shutil.copyfile(origin.folder / name, target / name)
        return Carried(tokenizer.kind, tokenizer.eod_id, from_origin=True)
    name = "tokenizer.model" if tokenizer.kind == "sentencepiece" else "tokenizer.json"
    shutil.copyfile(source / name, target / name)
    _write_settings(target, _text_of(tokenizer), context)
    return Carried(tokenizer.kind, tokenizer.eod_id)


def recorded_tokenizer(source: Path) -> Tokenizer | None:
    """The tokenizer of the model in `source`, None where it has none. Raises UserError for a damaged one."""
    if not (source / TOKENIZER_RECORD_FILE).is_file():
        return None
    record = _read(source / TOKENIZER_RECORD_FILE)
    tokenizer = load_tokenizer("bytes" if record.get("kind") == "bytes" else source, eod_id=record.get("eod_id"))
    if tokenizer.fingerprint != record.get("sha256"):
        raise UserError(f"{source}: the tokenizer there is not the one that the model was trained with: restore it.")
    tokenizer.bos_id = record.get("bos_id")
    return tokenizer


def chat_template(source: Path) -> str | None:
    """The Jinja source that an imported model in `source` writes conversations by, if one came with it."""
    if (source / _TEMPLATE).is_file():
        return (source / _TEMPLATE).read_text(encoding="utf-8")
    found = _read(source / _SETTINGS).get("chat_template") if (source / _SETTINGS).is_file() else None
    return found if isinstance(found, str) else None


def special_ids(origin: Origin, carried: Carried) -> dict[str, Any]:
    """bos_token_id, eos_token_id and pad_token_id of config.json: the origin's if its tokenizer stayed."""
    names = ("bos_token_id", "eos_token_id", "pad_token_id")
    if origin.config and (carried.from_origin or carried.kind is None):
        return {name: origin.config.get(name) for name in names}
    return {"bos_token_id": carried.eod_id, "eos_token_id": carried.eod_id, "pad_token_id": None}


def byte_level_json() -> str:
    """The byte tokenizer as a `tokenizers` JSON: 256 bytes, no merges, and the end of a document, id 256."""
    from tokenizers import AddedToken, decoders, models, pre_tokenizers
    from tokenizers import Tokenizer as RawTokenizer

    raw = RawTokenizer(models.BPE(vocab=byte_alphabet(), merges=[]))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    raw.decoder = decoders.ByteLevel()
    raw.add_special_tokens([AddedToken(EOD_TOKEN, special=True, normalized=False)])
    text: str = raw.to_str(pretty=True)
    return text


def _write_settings(target: Path, eod_token: str | None, context: int) -> None:
    is_json = (target / "tokenizer.json").is_file()
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast" if is_json else "LlamaTokenizer",
        "eos_token": eod_token,
        "model_max_length": context,
        "clean_up_tokenization_spaces": False,
    }
    if not is_json:
        settings |= {"add_bos_token": False, "add_eos_token": False, "legacy": False}
    (target / _SETTINGS).write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")


def _text_of(tokenizer: Tokenizer) -> str | None:
    """The token that ends documents, as text."""
    return None if tokenizer.eod_id is None else tokenizer.token_text(tokenizer.eod_id)


def _read(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read ({error}).") from None
    if not isinstance(found, dict):
        raise UserError(f"{path}: holds a {type(found).__name__}, expected one JSON object.")
    return found
