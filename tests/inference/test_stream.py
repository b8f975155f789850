"""Streamed pieces joined are the text of all tokens, and no piece holds half a character."""

import io

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatronish.data.tokenizers.tokenizer import ByteTokenizer, load_tokenizer
from megatronish.inference.prompt import Prompt
from megatronish.inference.stream import TextStream, text_pieces

TEXT = "naïve café 日本語 🙂👩‍👩‍👧 def f(x):\n    return x"


@pytest.fixture(scope="module")
def sentencepiece_tokenizer(tmp_path_factory):
    import sentencepiece

    path = tmp_path_factory.mktemp("sp") / "m.model"
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["the quick brown fox", "a naive fox returns the box"] * 20),
        model_writer=model,
        vocab_size=320,
        model_type="bpe",
        byte_fallback=True,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    path.write_bytes(model.getvalue())
    return load_tokenizer(path)


def test_characters_come_whole():
    tokenizer = ByteTokenizer()
    pieces = list(text_pieces(tokenizer, Prompt([]), tokenizer.encode(TEXT).tolist()))
    assert "".join(pieces) == TEXT
    assert all("\ufffd" not in piece for piece in pieces)
    assert [piece for piece in pieces if piece][-1] == "x", "nothing is held back longer than needed"


@given(st.lists(st.integers(0, 256), max_size=30))
def test_any_bytes(ids):
    tokenizer = ByteTokenizer()
    assert "".join(text_pieces(tokenizer, Prompt([]), ids)) == tokenizer.decode(ids)


@pytest.mark.parametrize("prompt", ["", "the quick", "naïve"])
def test_sentencepiece_keeps_blanks_and_byte_fallback(sentencepiece_tokenizer, prompt):
    tokenizer = sentencepiece_tokenizer
    assert not tokenizer.lossless
    ids = tokenizer.encode(prompt + " fox " + " ".join(TEXT.split())).tolist()
    split = len(tokenizer.encode(prompt))
    assert ids[:split] == tokenizer.encode(prompt).tolist()
    pieces = list(text_pieces(tokenizer, Prompt(ids[:split]), ids[split:]))
    assert tokenizer.decode(ids[:split]) + "".join(pieces) == tokenizer.decode(ids)
    assert all("\ufffd" not in piece for piece in pieces)


def test_a_character_that_never_becomes_whole(sentencepiece_tokenizer):
    for tokenizer in (ByteTokenizer(), sentencepiece_tokenizer):
        ids = tokenizer.encode("x🙂").tolist()[:-1]
        stream = TextStream(tokenizer)
        assert "".join(stream.push(i) for i in ids) == "x"
        assert "\ufffd" in stream.finish()
        assert stream.finish() == ""
