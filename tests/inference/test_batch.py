"""A batch generates what its sequences generate alone, with draft tokens, kept prefixes and cancelled neighbors."""

import pytest
import torch

from megatronish.config.model import ModelConfig
from megatronish.data.tokenizers.tokenizer import ByteTokenizer
from megatronish.errors import UserError
from megatronish.inference.batch import Batch, Request, generate
from megatronish.inference.prompt_lookup import PromptLookup
from megatronish.inference.sampling import GREEDY, Sampling
from megatronish.inference.text import Prompt, TextGeneration, encode_prompt
from megatronish.model.transformer import Transformer
from megatronish.ops.extension import EXTENSION

SHAPE = {
    "vocab_size": 61,
    "num_layers": 3,
    "hidden_size": 64,
    "num_attention_heads": 4,
    "num_kv_heads": 2,
    "ffn_hidden_size": 48,
    "seq_length": 64,
    "init_std": 0.3,
}
VARIANTS = {
    "full": {},
    "rolling": {"sliding_window": 7},
    "alternating": {"sliding_window": 7, "full_attention_interval": 2},
    "heads_of_8": {"num_attention_heads": 8, "sliding_window": 5},  # too narrow for the kernel: torch's attention
}
PROMPTS = [[5, 17, 2, 2, 60, 0, 33], [9], [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18, 19], [40, 41]]


def draw(seed):
    return torch.Generator().manual_seed(seed)


def build(variant="full", dtype=torch.float32, seed=3):
    return Transformer(ModelConfig(**{**SHAPE, **VARIANTS[variant]}), seed=seed).eval().to(dtype)


def alone(model, sampling, count=30, **options):
    return [list(generate(model, ids, count, sampling, generator=draw(i), **options)) for i, ids in enumerate(PROMPTS)]


@pytest.mark.parametrize("sampling", [GREEDY, Sampling(1.1, 30, 0.9)], ids=["greedy", "sampled"])
@pytest.mark.parametrize("slots", [1, 3, 4])
@pytest.mark.parametrize("variant", VARIANTS)
def test_batched_equals_one_at_a_time(variant, slots, sampling):
    model = build(variant)
    batch = Batch(model, slots)
    together = [batch.add(Request(ids, 30, sampling, draw(i))) for i, ids in enumerate(PROMPTS)]
    assert [list(each) for each in reversed(together)][::-1] == alone(model, sampling)
    assert not batch.running and not batch.waiting and len(set(map(tuple, alone(model, sampling)))) == len(PROMPTS)


@pytest.mark.skipif(not EXTENSION.cpu, reason=EXTENSION.cpu_problem)
def test_batched_scores_are_bitwise_those_of_single_sequences():
    """In bf16, where another order of a sum would change the scores: the kernels compute rows independently."""
    model = build("alternating", torch.bfloat16)
    batch = Batch(model, 4)
    together = [batch.add(Request(ids, 20, Sampling(1.3), draw(i), logprobs=0)) for i, ids in enumerate(PROMPTS)]
    for i, (generation, ids) in enumerate(zip(together, PROMPTS)):
        single = Batch(model, 1).add(Request(ids, 20, Sampling(1.3), draw(i), logprobs=0))
        assert list(generation) == list(single)
        assert [score.logprob for score in generation.scores] == [score.logprob for score in single.scores]


@pytest.mark.skipif(not EXTENSION.cpu, reason=EXTENSION.cpu_problem)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_batched_prefill_is_bitwise_equal_to_single_prefill(dtype):
    """Prompts of unequal lengths in slots that are not adjacent, with long prompts and kept prefixes among them."""
    model = Transformer(ModelConfig(**{**SHAPE, "seq_length": 1024}), seed=3).eval().to(dtype)
    lengths = [17, 64, 30, 20, 5, 16, 2, 40, 64, 65, 33, 28, 100, 32]
    prompts = [[(7 * number + place * place) % 61 for place in range(length)] for number, length in enumerate(lengths)]
    batch, passes, read = Batch(model, 14, keep_prefixes=True), [], model.last_hidden
    held = [batch.add(Request(ids[:10], 100, GREEDY)) for ids in prompts[:5]]
    batch.step()
    batch.finish(held[1], "cancelled")
    batch.finish(held[3], "cancelled")  # slots 1 and 3 are free, and hold prefixes of other prompts
    model.last_hidden = lambda tokens, *rest: passes.append(tuple(tokens.shape)) or read(tokens, *rest)
    together = [batch.add(Request(ids, 6, Sampling(1.3), draw(i), logprobs=0)) for i, ids in enumerate(prompts)]
    texts = [list(each) for each in together]
    model.last_hidden = read
    assert max(count for count, _ in passes) >= 3 and len(passes) < len(prompts)
    for i, (generation, ids) in enumerate(zip(together, prompts)):
        if i in (1, 3):
            continue  # prefilled in two chunks, which rounds differently
        single = Batch(model, 1).add(Request(ids, 6, Sampling(1.3), draw(i), logprobs=0))
        assert texts[i] == list(single)
        assert [score.logprob for score in generation.scores] == [score.logprob for score in single.scores]


@pytest.mark.skipif(not EXTENSION.cpu, reason=EXTENSION.cpu_problem)
def test_forty_rows_are_computed_independently():
    """A server's batch size; their first tokens come from one product with the head."""
    model = build("full", torch.bfloat16)
    prompts = [[number, *range(2 + number % 13)] for number in range(40)]
    batch, rows = Batch(model, 40), []
    forward = model.head.forward
    model.head.forward = lambda hidden: (hidden.ndim == 2 and rows.append(len(hidden))) or forward(hidden)
    together = [batch.add(Request(ids, 8, Sampling(1.3), draw(i), logprobs=0)) for i, ids in enumerate(prompts)]
    texts = [list(each) for each in together]
    assert rows == [40]  # all prefilled in one step
    for i, (generation, ids) in enumerate(zip(together, prompts)):
        single = Batch(model, 1).add(Request(ids, 8, Sampling(1.3), draw(i), logprobs=0))
        assert texts[i] == list(single)
        assert [score.logprob for score in generation.scores] == [score.logprob for score in single.scores]


class InaccurateDraft:
    """Drafts the text that follows, with every fifth id wrong."""

    def __init__(self, text):
        self.text, self.place = text, 0

    def push(self, token):
        self.place += 1

    def draft(self, limit):
        places = range(self.place, min(self.place + min(limit, 4), len(self.text)))
        return [(self.text[i] + (i % 5 == 4)) % 61 for i in places]


@pytest.mark.parametrize("sampling", [GREEDY, Sampling(1.1)], ids=["greedy", "sampled"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_draft_tokens_change_only_the_number_of_passes(variant, sampling):
    model = build(variant)
    prompt = [7, 8, 9, 10, 11, 7, 8, 9, 10, 11, 7, 8]
    plain = list(generate(model, prompt, 50, sampling, generator=draw(1)))
    batch = Batch(model, 2)
    drafting = batch.add(Request(prompt, 50, sampling, draw(1), lookup=5))
    drafting.lookup = InaccurateDraft(plain)
    other = batch.add(Request(PROMPTS[0], 40, sampling, draw(2)))  # a row without draft tokens
    assert list(drafting) == plain
    assert list(other) == list(generate(model, PROMPTS[0], 40, sampling, generator=draw(2)))
    assert 30 < drafting.accepted < drafting.drafted, "most draft tokens are accepted, some are not"


def test_repetitive_text_is_drafted():
    model = build()
    with torch.no_grad():
        for block in model.blocks:  # only the embedding remains: each token determines the next
            block.attention.out.weight.zero_()
            block.mlp.down.weight.zero_()
    plain = list(generate(model, [3], 60, GREEDY))
    drafting = generate(model, [3], 60, GREEDY, lookup=4)
    assert list(drafting) == plain
    assert drafting.accepted > 20


def test_prompt_lookup():
    lookup = PromptLookup([1, 2, 3, 4, 9, 2, 3], 3)
    assert lookup.draft(10) == [4, 9, 2]
    assert lookup.draft(2) == [4, 9] and lookup.draft(0) == [] and lookup.draft(-1) == []
    lookup.push(7)
    assert lookup.draft(10) == []
    for token in (2, 3):
        lookup.push(token)
    assert lookup.draft(10) == [7, 2, 3], "the last occurrence wins"
    assert PromptLookup([1], 3).draft(5) == []


@pytest.mark.parametrize("variant", VARIANTS)
def test_kept_prefixes(variant):
    model = build(variant)
    batch = Batch(model, 1, keep_prefixes=True)
    first = batch.add(Request(PROMPTS[2], 10, GREEDY))
    written = list(first)
    follow_up = PROMPTS[2] + written + [3, 4]
    second = batch.add(Request(follow_up, 10, GREEDY))
    batch.step()
    kept = len(follow_up) - 2 - 1  # the last new id was never read
    assert second.read - kept == 3 or second.read == len(follow_up), "only the new ids were read"
    assert list(second) == list(generate(model, follow_up, 10, GREEDY))
    unrelated = batch.add(Request([50, 51, 52], 10, GREEDY))
    assert list(unrelated) == list(generate(model, [50, 51, 52], 10, GREEDY))


def test_cancelled_neighbors_do_not_change_the_others():
    model = build()
    expected = alone(model, GREEDY)
    batch = Batch(model, 2)
    generations = [batch.add(Request(ids, 30, GREEDY)) for ids in PROMPTS]
    for _ in range(6):
        batch.step()
    batch.finish(generations[0], "cancelled")
    batch.finish(generations[3], "cancelled")  # while it waits
    assert list(generations[1]) == expected[1] and list(generations[2]) == expected[2]
    written = list(generations[0])
    assert 0 < len(written) < 30 and written == expected[0][: len(written)]
    assert (generations[0].finish_reason, generations[3].new_ids) == ("cancelled", [])


def test_log_probabilities_are_those_of_the_model():
    model = build()
    prompt = [4, 5, 6]
    generation = Batch(model, 1).add(Request(prompt, 5, Sampling(0.7, 3), draw(0), logprobs=2))
    ids = list(generation)
    with torch.no_grad():
        expected = model(torch.tensor([prompt + ids])).log_softmax(-1)[0, 2:]
    for place, (token, score) in enumerate(zip(ids, generation.scores, strict=True)):
        assert score.logprob == pytest.approx(expected[place, token].item(), abs=1e-5)  # another order of fp32 sums
        values, best = expected[place].topk(2)
        assert [i for i, _ in score.best] == best.tolist()
        assert [value for _, value in score.best] == pytest.approx(values.tolist(), abs=1e-5)


def test_limit_below_the_context():
    with pytest.raises(
        UserError, match=r"context is 8: shorten the prompt, or raise the limit \(the model's own is 64\)"
    ):
        Batch(build(), 1, 8).add(Request([1] * 9, 1, GREEDY))


@pytest.mark.parametrize("chunk", [1, 3])
def test_text_ends_before_a_stop_string(model, chunk):
    tokenizer = ByteTokenizer()
    prompt = encode_prompt(tokenizer, "the layer ")
    free = Batch(model, 1).add(Request(prompt.ids, 20, Sampling(2.0), draw(8)))
    ids = list(free)
    full = "".join(TextGeneration(_finished(free), tokenizer, prompt))
    assert full == tokenizer.decode(ids)
    middle = len(full) // 2
    stop = full[middle : middle + chunk]
    batch = Batch(model, 1)
    text = TextGeneration(
        batch.add(Request(prompt.ids, 20, Sampling(2.0), draw(8))), tokenizer, prompt, ["never there", stop]
    )
    assert "".join(text) == full[: full.index(stop)] == text.text
    assert text.finished and text.generation.finish_reason == "stop string" and not batch.running
    with pytest.raises(UserError, match="a stop string is empty"):
        TextGeneration(free, tokenizer, Prompt([]), [""])


def _finished(generation):
    assert generation.finish_reason is not None
    return generation
