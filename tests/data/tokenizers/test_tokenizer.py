"""Tokenizers: losslessness, special tokens as plain text, end-of-document tokens, broken files."""

import io
import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatronish.data.tokenizers.formats import EOD_TOKEN
from megatronish.data.tokenizers.tokenizer import ByteTokenizer, load_tokenizer, train_bpe
from megatronish.errors import DataError

SAMPLE = [
    "def main():\n    return 2026 + 1\n",
    "The quick brown fox jumps over the lazy dog. Straße, naïve, 日本語, \U0001f600\n\n\tindented",
    "for i in range(100):\r\n        print(i, 'don''t')\n",
] * 20
# Everything UTF-8 can hold: surrogates cannot be in a document (the readers refuse them).
ANY_TEXT = st.text(alphabet=st.characters(exclude_categories=("Cs",)), max_size=200)


@pytest.fixture(scope="module")
def bpe():
    return train_bpe(SAMPLE, 400)


@pytest.fixture(scope="module")
def sentencepiece_model():
    import sentencepiece

    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.Train(
        sentence_iterator=iter(line for text in SAMPLE for line in text.splitlines() if line.strip()),
        model_writer=model,
        vocab_size=400,
        model_type="bpe",
        byte_fallback=True,
        character_coverage=1.0,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        minloglevel=2,
    )
    return model.getvalue()


@settings(max_examples=200, deadline=None)
@given(text=ANY_TEXT)
def test_bpe_gives_back_every_byte(bpe, text):
    ids = bpe.encode(text)
    assert bpe.decode_bytes(ids) == text.encode("utf-8")
    assert bpe.decode(ids) == text


@settings(max_examples=100, deadline=None)
@given(text=ANY_TEXT)
def test_byte_tokenizer_is_utf8(text):
    tokenizer = ByteTokenizer()
    assert tokenizer.encode(text).tolist() == list(text.encode("utf-8"))
    assert tokenizer.decode_bytes([*tokenizer.encode(text), 256]) == text.encode("utf-8")


def test_vocabulary_and_end_of_document(bpe):
    assert bpe.lossless
    assert 257 < bpe.vocab_size <= 400
    assert bpe.eod_id == bpe.vocab_size - 1
    assert bpe.decode_bytes([bpe.eod_id]) == b""
    assert ByteTokenizer().eod_id == 256 and ByteTokenizer().vocab_size == 257


def test_training_compresses_and_is_deterministic(bpe):
    text = "".join(SAMPLE)
    assert len(bpe.encode(text)) < len(text.encode("utf-8")) / 2
    assert train_bpe(iter(SAMPLE), 400).fingerprint == bpe.fingerprint


@pytest.mark.parametrize("text", [EOD_TOKEN, f"a{EOD_TOKEN}b", f"{EOD_TOKEN}{EOD_TOKEN}", "</s>", "<s>", "<unk>"])
def test_special_tokens_in_text_are_text(bpe, sentencepiece_model, tmp_path, text):
    (tmp_path / "m.model").write_bytes(sentencepiece_model)
    for tokenizer in (bpe, ByteTokenizer(), load_tokenizer(tmp_path / "m.model")):
        ids = tokenizer.encode(text)
        assert tokenizer.eod_id not in ids
        assert len(ids) > 1
        assert tokenizer.decode(ids) == text


def test_end_token_that_its_file_does_not_mark_as_special_is_still_not_read_from_text(bpe, tmp_path):
    spec = json.loads(bpe._source)
    spec["added_tokens"][0]["special"] = False
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(spec))
    tokenizer = load_tokenizer(path)
    assert tokenizer.eod_id == bpe.eod_id
    assert tokenizer.eod_id not in tokenizer.encode(f"x{EOD_TOKEN}")
    assert tokenizer.decode(tokenizer.encode(f"x{EOD_TOKEN}")) == f"x{EOD_TOKEN}"


def test_save_and_load_give_the_same_tokenizer(bpe, tmp_path):
    path = bpe.save(tmp_path / "d")
    assert path == tmp_path / "d.tokenizer.json"
    again = load_tokenizer(path)
    assert (again.fingerprint, again.vocab_size, again.eod_id) == (bpe.fingerprint, bpe.vocab_size, bpe.eod_id)
    assert np.array_equal(again.encode(SAMPLE[1]), bpe.encode(SAMPLE[1]))


def test_folder_with_configuration_names_the_end_token(bpe, tmp_path):
    spec = json.loads(bpe._source)
    spec["added_tokens"][0]["content"] = "<stop>"
    (tmp_path / "tokenizer.json").write_text(json.dumps(spec))
    assert load_tokenizer(tmp_path).eod_id is None
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": {"content": "<stop>"}}))
    assert load_tokenizer(tmp_path).eod_id == bpe.eod_id
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<stop>"}))
    assert load_tokenizer(tmp_path).eod_id == bpe.eod_id
    assert load_tokenizer(tmp_path / "tokenizer.json", eod_token="<stop>").eod_id == bpe.eod_id
    with pytest.raises(DataError, match="no token '<end>'"):
        load_tokenizer(tmp_path / "tokenizer.json", eod_token="<end>")


def test_sentencepiece(sentencepiece_model, tmp_path):
    path = tmp_path / "m.model"
    path.write_bytes(sentencepiece_model)
    tokenizer = load_tokenizer(path, threads=2)
    assert (tokenizer.kind, tokenizer.vocab_size, tokenizer.eod_id) == ("sentencepiece", 400, 2)
    for text in ["The quick brown fox", "日本語 \U0001f600", "def main():"]:
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        assert tokenizer.decode([*ids, tokenizer.eod_id]) == text
    assert [ids.tolist() for ids in tokenizer.encode_batch(SAMPLE[:3])] == [
        tokenizer.encode(text).tolist() for text in SAMPLE[:3]
    ]
    saved = tokenizer.save(tmp_path / "d")
    assert saved is not None and load_tokenizer(saved).fingerprint == tokenizer.fingerprint


def test_ids_outside_the_vocabulary_are_refused(bpe):
    for tokenizer in (bpe, ByteTokenizer()):
        with pytest.raises(ValueError, match=f"outside 0..{tokenizer.vocab_size - 1}"):
            tokenizer.decode_bytes([0, tokenizer.vocab_size])


def test_tokenizer_that_alters_text_is_not_called_lossless(bpe, tmp_path):
    for key, value in (("normalizer", {"type": "Lowercase"}), ("decoder", {"type": "Fuse"})):
        spec = json.loads(bpe._source) | {key: value}
        (tmp_path / "tokenizer.json").write_text(json.dumps(spec))
        assert not load_tokenizer(tmp_path).lossless


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"{", "not a tokenizers JSON"),
        (b'{"a": "\xff"}', "not UTF-8 at byte 7"),
        (b"nonsense", "not a SentencePiece model"),
    ],
)
def test_broken_file_is_named(tmp_path, content, message):
    path = tmp_path / "broken"
    path.write_bytes(content)
    with pytest.raises(DataError, match=message) as caught:
        load_tokenizer(path)
    assert str(path) in str(caught.value)


def test_missing_file_and_empty_folder_are_named(tmp_path):
    with pytest.raises(DataError, match="nowhere: no such file"):
        load_tokenizer(tmp_path / "nowhere")
    with pytest.raises(DataError, match="no tokenizer.json"):
        load_tokenizer(tmp_path)


def test_too_small_a_vocabulary_is_refused():
    with pytest.raises(DataError, match="at least 257"):
        train_bpe(SAMPLE, 256)
