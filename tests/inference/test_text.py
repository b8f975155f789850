"""The concatenated pieces are the text of all tokens, and no piece has an incomplete character."""

import io

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatronish.data.tokenizers.tokenizer import ByteTokenizer, load_tokenizer
from megatronish.inference.text import Detokenizer, Prompt

TEXT = "naïve café 日本語 🙂👩‍👩‍👧 def f(x):\n    return x"


def pieces(tokenizer, prompt, new_ids):
    """The text of `new_ids` after the prompt, id by id."""
    detokenizer = Detokenizer(tokenizer, prompt)
    yield from map(detokenizer.push, new_ids)
    yield detokenizer.finish()


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


def test_pieces_have_complete_characters():
    tokenizer = ByteTokenizer()
    found = list(pieces(tokenizer, Prompt([]), tokenizer.encode(TEXT).tolist()))
    assert "".join(found) == TEXT
    assert all("\ufffd" not in piece for piece in found)
    assert [piece for piece in found if piece][-1] == "x", "nothing is buffered longer than needed"


@given(st.lists(st.integers(0, 256), max_size=30))
def test_any_bytes(ids):
    tokenizer = ByteTokenizer()
    assert "".join(pieces(tokenizer, Prompt([]), ids)) == tokenizer.decode(ids)


@pytest.mark.parametrize("prompt", ["", "the quick", "naïve"])
def test_sentencepiece_keeps_blanks_and_byte_fallback(sentencepiece_tokenizer, prompt):
    tokenizer = sentencepiece_tokenizer
    assert not tokenizer.lossless
    ids = tokenizer.encode(prompt + " fox " + " ".join(TEXT.split())).tolist()
    split = len(tokenizer.encode(prompt))
    assert ids[:split] == tokenizer.encode(prompt).tolist()
    found = list(pieces(tokenizer, Prompt(ids[:split]), ids[split:]))
    assert tokenizer.decode(ids[:split]) + "".join(found) == tokenizer.decode(ids)
    assert all("\ufffd" not in piece for piece in found)


def test_incomplete_last_character(sentencepiece_tokenizer):
    for tokenizer in (ByteTokenizer(), sentencepiece_tokenizer):
        ids = tokenizer.encode("x🙂").tolist()[:-1]
        stream = Detokenizer(tokenizer, Prompt([]))
        assert "".join(stream.push(i) for i in ids) == "x"
        assert "\ufffd" in stream.finish()
        assert stream.finish() == ""
