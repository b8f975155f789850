"""Generation with the key/value cache equals generation without it."""

from functools import partial

import pytest
import torch

from megatronish.config.model import ModelConfig
from megatronish.data.tokenizers.tokenizer import ByteTokenizer, train_bpe
from megatronish.errors import UserError
from megatronish.inference import batch
from megatronish.inference.batch import generate
from megatronish.inference.sampling import GREEDY, Sampling, choose
from megatronish.inference.text import Prompt, encode_prompt
from megatronish.model.kv_cache import KVCache
from megatronish.model.transformer import Transformer
from tests.inference.test_text import pieces

SHAPE = {
    "vocab_size": 61,
    "num_layers": 3,
    "hidden_size": 32,
    "num_attention_heads": 4,
    "num_kv_heads": 2,
    "ffn_hidden_size": 48,
    "seq_length": 40,
    "init_std": 0.3,
}
VARIANTS = {
    "full": {},
    "sliding": {"sliding_window": 7},
    "alternating": {"sliding_window": 7, "full_attention_interval": 2},
}


@torch.no_grad()
def without_cache(model, prompt, count, sampling, seed):
    """`count` tokens, with a forward pass over the full sequence for each."""
    draw, ids = torch.Generator().manual_seed(seed), list(prompt)
    for _ in range(count):
        ids.append(int(choose(model(torch.tensor([ids]))[:, -1], sampling, draw)))
    return ids[len(prompt) :]


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("sampling", [GREEDY, Sampling(0.9), Sampling(1.3, 20, 0.8)], ids=["greedy", "sampled", "top"])
def test_cached_equals_uncached(variant, sampling, monkeypatch):
    monkeypatch.setattr(batch, "KVCache", partial(KVCache, chunk=4))  # prefill in three chunks
    model = Transformer(ModelConfig(**SHAPE, **VARIANTS[variant]), seed=3).eval()
    prompt = [5, 17, 2, 2, 60, 0, 33, 9, 41]
    expected = without_cache(model, prompt, 31, sampling, seed=11)
    written = list(generate(model, prompt, 31, sampling, generator=torch.Generator().manual_seed(11)))
    assert written == expected
    assert len(set(written)) > 3, "a model that repeats one token would hide a wrong cache"


def test_ends_at_end_of_document_and_leaves_it_out(model):
    prompt = [104, 101]
    free = generate(model, prompt, 20, GREEDY)
    written = list(free)
    assert (free.finish_reason, len(free.new_ids)) == ("max new tokens", 20)
    end = written[-1]
    ended = generate(model, prompt, 20, GREEDY, eod_id=end)
    assert list(ended) == written[: written.index(end)]
    assert ended.finish_reason == "end of document"
    assert next(ended, None) is None, "an ended generation stays ended"


def test_stops_when_the_context_is_full(model):
    context = model.config.seq_length
    generation = generate(model, [1] * (context - 3), 100, GREEDY)
    # The last of the 4 is predicted from `context` tokens read; a further one would need context + 1.
    assert len(list(generation)) == 4
    assert generation.finish_reason == "context full"
    exact = generate(model, [1] * context, 1, GREEDY)
    assert len(list(exact)) == 1 and exact.finish_reason == "max new tokens"


def test_ids_beyond_the_tokenizer_are_never_drawn():
    model = Transformer(ModelConfig(**SHAPE), seed=0).eval()
    with torch.no_grad():
        model.head.weight[50:] *= 100  # padded ids with the largest logits by far
    draw = torch.Generator().manual_seed(0)
    assert max(generate(model, [1, 2], 38, Sampling(2.0), generator=draw)) >= 50
    assert max(generate(model, [1, 2], 38, Sampling(2.0), generator=draw, vocab_size=50)) < 50


def test_inference_mode_does_not_leak_to_the_caller(model):
    generation = generate(model, [1], 2, GREEDY)
    next(generation)
    assert not torch.is_inference_mode_enabled() and torch.is_grad_enabled()


@pytest.mark.parametrize(
    ("prompt", "count", "message"),
    [
        ([], 5, "the prompt is empty"),
        ([1] * 33, 5, r"the prompt has 33 tokens, but the model's context is 32"),
        ([1], 0, "max new tokens 0 must be at least 1"),
        ([1, 257], 5, r"prompt ids 1..257 are outside 0..256"),
    ],
)
def test_bad_input(model, prompt, count, message):
    with pytest.raises(UserError, match=message):
        generate(model, prompt, count, GREEDY)


def test_prompts():
    tokenizer = ByteTokenizer()
    assert encode_prompt(tokenizer, "hé") == Prompt([256, *"hé".encode()]), (
        "no token starts with another byte: all are read"
    )
    assert encode_prompt(tokenizer, "") == Prompt([256])
    with pytest.raises(UserError, match="not valid UTF-8 at character 2"):
        encode_prompt(tokenizer, "ab\udcff")
    tokenizer.eod_id = None
    with pytest.raises(UserError, match="no end-of-document token to start from"):
        encode_prompt(tokenizer, "")
    assert encode_prompt(tokenizer, "hé") == Prompt(list("hé".encode()))


def test_token_healing(model):
    """The last token is sampled again among those that start with its bytes, and only its new bytes are shown."""
    tokenizer = train_bpe(["def main(): return name\n"] * 50, 300)
    prompt = encode_prompt(tokenizer, "def ")
    assert prompt.ids == [tokenizer.eod_id, *tokenizer.encode("def").tolist()]
    assert prompt.overlap == 1
    assert all(tokenizer.decode_bytes([token]).startswith(b" ") for token in prompt.first_ids)
    assert tokenizer.encode(" main").tolist()[0] in prompt.first_ids
    assert "".join(pieces(tokenizer, prompt, tokenizer.encode(" main").tolist())) == "main"
    for seed in range(20):
        drawn = generate(
            model, [1, 2], 2, Sampling(), generator=torch.Generator().manual_seed(seed), first_ids=[7, 9, 11]
        )
        assert next(drawn) in (7, 9, 11)
        assert 0 <= next(drawn) < 257, "only the first token is restricted"
