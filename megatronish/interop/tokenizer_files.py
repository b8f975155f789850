"""The tokenizer of a model and its settings, copied from Hugging Face folders to ours and back."""

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

ORIGIN_FILE = "huggingface_config.json"  # config.json of the model that was imported
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model")
SETTINGS_FILE, TEMPLATE_FILE = "tokenizer_config.json", "chat_template.jinja"
_COPIED = (
    *TOKENIZER_FILES,
    SETTINGS_FILE,
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    TEMPLATE_FILE,
    "chat_template.json",
    "generation_config.json",
)


@dataclass(frozen=True)
class TokenizerInfo:
    """The tokenizer of a converted model. kind None: there is none. bos_id: the token that texts begin with, if any.
    from_origin: with all settings of its Hugging Face folder."""

    kind: str | None
    eod_id: int | None = None
    bos_id: int | None = None
    from_origin: bool = False


@dataclass(frozen=True)
class ImportOrigin:
    """The Hugging Face model that a model was imported from: its config.json and its folder; empty if there is none."""

    config: Mapping[str, Any]
    folder: Path | None


def import_tokenizer(source: Path, target: Path) -> TokenizerInfo:
    """Copy the tokenizer of a Hugging Face folder, its settings, and config.json as ORIGIN_FILE, into a folder of ours.

    Raises UserError for a tokenizer that cannot be read.
    """
    shutil.copyfile(source / CONFIG_JSON, target / ORIGIN_FILE)
    _copy_files(source, target)
    if not any((source / name).is_file() for name in TOKENIZER_FILES):
        return TokenizerInfo(None)
    tokenizer = load_tokenizer(source)
    bos_id = begins_with(source, tokenizer)
    record = {
        "kind": tokenizer.kind,
        "eod_id": tokenizer.eod_id,
        "bos_id": bos_id,
        "sha256": tokenizer.fingerprint,
    }
    (target / TOKENIZER_RECORD_FILE).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    return TokenizerInfo(tokenizer.kind, tokenizer.eod_id, bos_id, from_origin=True)


def _copy_files(source: Path, target: Path) -> None:
    for name in _COPIED:
        if (source / name).is_file():
            shutil.copyfile(source / name, target / name)


def begins_with(source: Path, tokenizer: Tokenizer) -> int | None:
    """The token that AutoTokenizer puts before every text for the model in `source`, None where it puts none.

    This is the template of a tokenizer.json; for a SentencePiece file it is `add_bos_token` of tokenizer_config.json, true
    by default as in LlamaTokenizer. Raises UserError for settings that cannot be read.
    """
    if isinstance(tokenizer, HuggingFaceTokenizer):
        return tokenizer.template_start()
    wanted = tokenizer_settings(source).get("add_bos_token", True) is not False
    return tokenizer.own_bos_id if wanted and isinstance(tokenizer, SentencePieceTokenizer) else None


def fingerprints(source: Path) -> set[str]:
    """SHA-256 of each tokenizer file of a Hugging Face folder."""
    return {load_tokenizer(source / name).fingerprint for name in TOKENIZER_FILES if (source / name).is_file()}


def find_origin(source: Path) -> ImportOrigin:
    """The origin of an imported model, or of a run whose configuration has `from_hf`."""
    if (source / ORIGIN_FILE).is_file():
        return ImportOrigin(read_json_object(source / ORIGIN_FILE), source)
    if (source / RUN_FILE).is_file():
        model = read_json_object(source / RUN_FILE).get("megatronish", {}).get("model", {})
        folder = Path(model.get("from_hf") or "")
        if model.get("from_hf") and (folder / CONFIG_JSON).is_file():
            return ImportOrigin(read_json_object(folder / CONFIG_JSON), folder)
    return ImportOrigin({}, None)


def export_tokenizer(source: Path, target: Path, origin: ImportOrigin, context: int) -> TokenizerInfo:
    """Write the tokenizer of a checkpoint for AutoTokenizer, with the settings of `origin` if it is the same tokenizer.

    context: the model's, in tokens. Raises UserError for a damaged tokenizer.
    """
    if not (source / TOKENIZER_RECORD_FILE).is_file():
        return TokenizerInfo(None)
    tokenizer = recorded_tokenizer(source)
    if tokenizer.kind == "bytes":
        (target / "tokenizer.json").write_text(byte_level_json(), encoding="utf-8")
        _write_settings(target, EOD_TOKEN, context)
        return TokenizerInfo("bytes", tokenizer.eod_id)
    if origin.folder is not None and tokenizer.fingerprint in fingerprints(origin.folder):
        _copy_files(origin.folder, target)
        return TokenizerInfo(tokenizer.kind, tokenizer.eod_id, from_origin=True)
    name = "tokenizer.model" if tokenizer.kind == "sentencepiece" else "tokenizer.json"
    shutil.copyfile(source / name, target / name)
    _write_settings(target, None if tokenizer.eod_id is None else tokenizer.token_text(tokenizer.eod_id), context)
    return TokenizerInfo(tokenizer.kind, tokenizer.eod_id)


def recorded_tokenizer(folder: Path) -> Tokenizer:
    """The tokenizer of the model in `folder`, as its record describes it. Raises UserError if it is missing or damaged."""
    path = folder / TOKENIZER_RECORD_FILE
    record = read_json_object(path)
    try:
        kind, eod_id, sha256 = record["kind"], record["eod_id"], record["sha256"]
    except KeyError as error:
        raise UserError(f"{path}: no {error} in it; use another checkpoint, or restore the file") from None
    tokenizer = load_tokenizer("bytes" if kind == "bytes" else folder, eod_id=eod_id)
    if tokenizer.fingerprint != sha256:
        raise UserError(
            f"{folder}: the tokenizer there (SHA-256 {tokenizer.fingerprint[:12]}...) is not the one the model was "
            f"trained with ({sha256[:12]}...): restore it from the data set or another checkpoint of the run"
        )
    bos_id = record.get("bos_id")  # only of imported models
    if bos_id is not None and not (type(bos_id) is int and 0 <= bos_id < tokenizer.vocab_size):
        raise UserError(f"{path}: bos_id {bos_id!r} is not a token id below {tokenizer.vocab_size}; restore the file")
    tokenizer.bos_id = bos_id
    return tokenizer


def tokenizer_settings(folder: Path) -> dict[str, Any]:
    """The contents of tokenizer_config.json, empty if there is none. Raises UserError if it cannot be read."""
    return read_json_object(folder / SETTINGS_FILE) if (folder / SETTINGS_FILE).is_file() else {}


def chat_template(folder: Path) -> str | None:
    """The chat template (Jinja source) of the model in `folder`, None if it has none."""
    if (folder / TEMPLATE_FILE).is_file():
        return (folder / TEMPLATE_FILE).read_text(encoding="utf-8")
    found = tokenizer_settings(folder).get("chat_template")
    if isinstance(found, list):  # several, by name
        found = next((each["template"] for each in found if each.get("name") == "default"), None)
    return found if isinstance(found, str) else None


def special_ids(origin: ImportOrigin, tokenizer: TokenizerInfo) -> dict[str, Any]:
    """bos_token_id, eos_token_id and pad_token_id of config.json: those of the origin if the tokenizer is the same."""
    names = ("bos_token_id", "eos_token_id", "pad_token_id")
    if origin.config and (tokenizer.from_origin or tokenizer.kind is None):
        return {name: origin.config.get(name) for name in names}
    return {"bos_token_id": tokenizer.eod_id, "eos_token_id": tokenizer.eod_id, "pad_token_id": None}


def byte_level_json() -> str:
    """The byte tokenizer as a `tokenizers` JSON: 256 bytes, no merges, and the end-of-document token, id 256."""
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
    (target / SETTINGS_FILE).write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")


def read_json_object(path: Path) -> dict[str, Any]:
    """The JSON object in a file. Raises UserError if it cannot be read."""
    try:
        content = json.loads(path.read_bytes())
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); use a complete checkpoint") from None
    except ValueError as error:
        raise UserError(f"{path}: cannot be read, not JSON ({error}); restore the file") from None
    if not isinstance(content, dict):
        raise UserError(f"{path}: not a JSON object; restore the file")
    return content
