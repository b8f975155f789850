"""Tokenizers are converted with their models, and AutoTokenizer has the ids of ours."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
import sentencepiece
import torch
from tokenizers import Tokenizer as RawTokenizer
from tokenizers import processors
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from megatronish.checkpoint.paths import RUN_FILE, TOKENIZER_RECORD_FILE
from megatronish.checkpoint.weights import save_model
from megatronish.config.model import ModelConfig
from megatronish.data.tokenizers.formats import EOD_TOKEN
from megatronish.data.tokenizers.tokenizer import ByteTokenizer, Tokenizer, load_tokenizer, train_bpe
from megatronish.errors import UserError
from megatronish.inference.batch import generate
from megatronish.inference.load import load_for_inference
from megatronish.inference.sampling import GREEDY
from megatronish.inference.text import encode_prompt
from megatronish.interop.agreement import PROBE_TEXTS, compare
from megatronish.interop.huggingface import export_model, import_model
from megatronish.interop.tokenizer_files import ORIGIN_FILE, fingerprints
from megatronish.model.transformer import Transformer
from tests.hf_models import build

SAMPLE = ["def main():\n    return 2026 + 1\n", "The quick brown fox. naïve café, 中文字符 \U0001f600\n\n\ta  b"] * 20


def save(folder: Path, tokenizer: Tokenizer) -> Path:
    """Model and tokenizer of a checkpoint, as written by training."""
    config = ModelConfig(
        vocab_size=512, num_layers=1, hidden_size=16, num_attention_heads=2, ffn_hidden_size=16, seq_length=128
    )
    save_model(folder, Transformer(config).state_dict(), config)
    written = tokenizer.save(folder / "t")
    if written is not None:
        written.rename(folder / f"tokenizer{written.suffix}")
    record = {"kind": tokenizer.kind, "eod_id": tokenizer.eod_id, "sha256": tokenizer.fingerprint}
    (folder / TOKENIZER_RECORD_FILE).write_text(json.dumps(record))
    return folder


def ids(tokenizer: object, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]


@pytest.mark.parametrize("kind", ["bytes", "bpe"])
def test_auto_tokenizer_gives_our_ids(kind: str, tmp_path: Path) -> None:
    own = ByteTokenizer() if kind == "bytes" else train_bpe(SAMPLE, 400)
    export_model(save(tmp_path / "run", own), tmp_path / "hf")
    theirs = AutoTokenizer.from_pretrained(tmp_path / "hf")
    for text in PROBE_TEXTS:
        assert ids(theirs, text) == own.encode(text).tolist()
        assert theirs.decode(ids(theirs, text)) == text
    assert (theirs.eos_token, theirs.eos_token_id) == (EOD_TOKEN, own.eod_id)
    assert theirs.model_max_length == 128
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert (config["bos_token_id"], config["eos_token_id"], config["pad_token_id"]) == (own.eod_id, own.eod_id, None)
    agreement = compare(tmp_path / "run", tmp_path / "hf")
    assert agreement.texts == len(PROBE_TEXTS)
    assert agreement.same_best == agreement.tokens == 128 and agreement.difference < 1e-5


def test_sentencepiece_agrees_except_for_leading_spaces(tmp_path: Path) -> None:
    """SentencePiece adds a second space before text that starts with one; transformers does not."""
    sentence_piece(tmp_path)
    own = load_tokenizer(tmp_path / "tokenizer.model")
    export_model(save(tmp_path / "run", own), tmp_path / "hf")
    theirs = AutoTokenizer.from_pretrained(tmp_path / "hf")
    for text in PROBE_TEXTS:
        assert (ids(theirs, text) == own.encode(text).tolist()) == (not text.startswith(" "))
    assert theirs.eos_token_id == own.eod_id
    assert compare(tmp_path / "run", tmp_path / "hf").texts == len(PROBE_TEXTS) - 1


@pytest.fixture
def hf_folder(tmp_path: Path) -> Path:
    """A Llama with a tokenizer and a chat template."""
    folder = tmp_path / "hf"
    model = build("llama")
    model.config.eos_token_id = 7
    model.save_pretrained(folder)
    tokenizer = train_bpe([], 257)
    text = tokenizer._source.replace('"id": 256', '"id": 96')
    vocabulary = {token: i for token, i in tokenizer.spec["model"]["vocab"].items() if i < 96}
    text = json.dumps({**json.loads(text), "model": {**tokenizer.spec["model"], "vocab": vocabulary, "merges": []}})
    (folder / "tokenizer.json").write_text(text)
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": EOD_TOKEN, "chat_template": "{{ messages }}"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    (folder / "generation_config.json").write_text('{"temperature": 0.5}')
    return folder


def test_all_other_files_are_restored(hf_folder: Path, tmp_path: Path) -> None:
    result = import_model(hf_folder, tmp_path / "ours")
    assert (result.tokenizer.kind, result.tokenizer.eod_id) == ("huggingface", 96)
    _, tokenizer, info = load_for_inference(tmp_path / "ours")
    assert tokenizer.eod_id == 96 and info.step is None
    export_model(tmp_path / "ours", tmp_path / "out")
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        assert (tmp_path / "out" / name).read_bytes() == (hf_folder / name).read_bytes()
    assert json.loads((tmp_path / "out" / "config.json").read_text())["eos_token_id"] == 7
    assert not (tmp_path / "out" / ORIGIN_FILE).exists()


def test_run_from_hf_exports_its_settings(hf_folder: Path, tmp_path: Path) -> None:
    """A checkpoint has only tokenizer.json; the folder of from_hf has the other files, if the tokenizer is the same."""
    import_model(hf_folder, tmp_path / "run")
    for name in (ORIGIN_FILE, "tokenizer_config.json", "generation_config.json"):
        (tmp_path / "run" / name).unlink()
    (tmp_path / "run" / RUN_FILE).write_text(json.dumps({"megatronish": {"model": {"from_hf": str(hf_folder)}}}))
    assert export_model(tmp_path / "run", tmp_path / "a").tokenizer.from_origin
    assert (tmp_path / "a" / "tokenizer_config.json").read_bytes() == (hf_folder / "tokenizer_config.json").read_bytes()
    (hf_folder / "tokenizer.json").write_bytes((hf_folder / "tokenizer.json").read_bytes() + b"\n")
    assert not export_model(tmp_path / "run", tmp_path / "b").tokenizer.from_origin
    assert "chat_template" not in (tmp_path / "b" / "tokenizer_config.json").read_text()
    assert json.loads((tmp_path / "b" / "config.json").read_text())["eos_token_id"] == 96


BEGIN = "<|begin|>"


def save_llama(folder: Path) -> LlamaForCausalLM:
    """A Llama of 512 tokens whose texts matter."""
    torch.manual_seed(3)
    config = LlamaConfig(
        vocab_size=512, hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=64, initializer_range=0.3, bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    model.save_pretrained(folder)
    return model


def byte_level(folder: Path, begins: bool) -> None:
    """A byte-level BPE in `folder`, with Llama 3's template or with none, as Qwen's."""
    raw = RawTokenizer.from_str(train_bpe(SAMPLE, 400)._source)
    raw.add_special_tokens([BEGIN])
    if begins:
        number = raw.token_to_id(BEGIN)
        raw.post_processor = processors.TemplateProcessing(single=f"{BEGIN} $A", special_tokens=[(BEGIN, number)])
    raw.save(str(folder / "tokenizer.json"))


def sentence_piece(folder: Path) -> None:
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.Train(
        sentence_iterator=iter(line for text in SAMPLE for line in text.splitlines() if line.strip()),
        model_writer=model, vocab_size=380, model_type="bpe", byte_fallback=True, character_coverage=1.0,
        normalization_rule_name="identity", remove_extra_whitespaces=False, minloglevel=2,
    )  # fmt: skip
    (folder / "tokenizer.model").write_bytes(model.getvalue())


@pytest.mark.parametrize(
    ("kind", "settings", "begins"),
    [
        ("byte level", {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": BEGIN}, True),
        ("byte level", {"tokenizer_class": "PreTrainedTokenizerFast", "add_bos_token": False}, True),
        ("no template", {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": BEGIN}, False),
        ("sentencepiece", {"tokenizer_class": "LlamaTokenizer", "add_bos_token": True}, True),
        ("sentencepiece", {"tokenizer_class": "LlamaTokenizer", "add_bos_token": False}, False),
    ],
)
def test_texts_start_as_with_autotokenizer(
    kind: str, settings: dict[str, object], begins: bool, tmp_path: Path
) -> None:
    """Prompts of an imported model have the ids of transformers, and the same continuation."""
    folder = tmp_path / "hf"
    theirs = save_llama(folder)
    if kind == "sentencepiece":
        sentence_piece(folder)
    else:
        byte_level(folder, begins)
    (folder / "tokenizer_config.json").write_text(
        json.dumps({**settings, "eos_token": "</s>"} if kind == "sentencepiece" else settings)
    )
    carried = import_model(folder, tmp_path / "ours").tokenizer
    model, tokenizer, _ = load_for_inference(tmp_path / "ours")
    assert (carried.bos_id is not None) == begins and tokenizer.bos_id == carried.bos_id
    wanted = AutoTokenizer.from_pretrained(folder)("return the fox")["input_ids"]
    plain = tokenizer.encode("return the fox").tolist()
    assert wanted == ([tokenizer.bos_id, *plain] if begins else plain)
    if not begins:
        assert encode_prompt(tokenizer, "return the fox").ids[0] == tokenizer.eod_id
        return
    prompt = encode_prompt(tokenizer, "return the fox")
    assert prompt.ids == wanted[: len(prompt.ids)] and len(prompt.ids) >= len(wanted) - 1
    expected = theirs.generate(torch.tensor([wanted]), max_new_tokens=12, do_sample=False, pad_token_id=0)[0]
    assert list(generate(model, wanted, 12, GREEDY)) == expected[len(wanted) :].tolist()
    assert encode_prompt(tokenizer, "").ids == [tokenizer.bos_id]


def test_record_with_invalid_bos_id(tmp_path: Path) -> None:
    save_llama(tmp_path / "hf")
    byte_level(tmp_path / "hf", True)
    import_model(tmp_path / "hf", tmp_path / "ours")
    path = tmp_path / "ours" / TOKENIZER_RECORD_FILE
    path.write_text(json.dumps({**json.loads(path.read_text()), "bos_id": 512}))
    with pytest.raises(UserError, match="bos_id 512 is not a token id below"):
        load_for_inference(tmp_path / "ours")


def test_damaged_and_missing_tokenizers(hf_folder: Path, tmp_path: Path) -> None:
    assert len(fingerprints(hf_folder)) == 1
    import_model(hf_folder, tmp_path / "ours")
    (tmp_path / "ours" / "tokenizer.json").write_bytes((hf_folder / "tokenizer.json").read_bytes() + b" ")
    with pytest.raises(UserError, match="not the one the model was trained with"):
        export_model(tmp_path / "ours", tmp_path / "out")
    (hf_folder / "tokenizer.json").write_text("{}")
    with pytest.raises(UserError, match="not a tokenizers JSON"):
        import_model(hf_folder, tmp_path / "bad")
    (hf_folder / "tokenizer.json").unlink()
    assert import_model(hf_folder, tmp_path / "none").tokenizer.kind is None
    assert export_model(tmp_path / "none", tmp_path / "back").tokenizer.kind is None
    assert torch.equal(
        *(load_weights(folder)["model.embed_tokens.weight"] for folder in (hf_folder, tmp_path / "back"))
    )


def load_weights(folder: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(folder / "model.safetensors")
