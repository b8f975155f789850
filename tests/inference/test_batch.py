"""Sequences side by side write what each writes alone; guesses, kept prefixes and cancelled neighbours change nothing."""

import pytest
import torch

from megatronish.config.model import ModelConfig
from megatronish.data.tokenizers.tokenizer import ByteTokenizer
from megatronish.errors import UserError
from megatronish.inference.batch import Batch, Request
from megatronish.inference.generate import TextGeneration, generate
from megatronish.inference.lookup import PromptLookup
from megatronish.inference.prompt import Prompt, encode_prompt
from megatronish.inference.sampling import GREEDY, Sampling
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
def test_a_batch_has_the_very_numbers_of_its_rows():
    """In bf16, where another order of a sum would show in the scores: the kernels compute every row for itself."""
    model = build("alternating", torch.bfloat16)
    batch = Batch(model, 4)
    together = [batch.add(Request(ids, 20, Sampling(1.3), draw(i), logprobs=0)) for i, ids in enumerate(PROMPTS)]
    for i, (generation, ids) in enumerate(zip(together, PROMPTS)):
        single = Batch(model, 1).add(Request(ids, 20, Sampling(1.3), draw(i), logprobs=0))
        assert list(generation) == list(single)
        assert [score.logprob for score in generation.scores] == [score.logprob for score in single.scores]


@pytest.mark.skipif(not EXTENSION.cpu, reason=EXTENSION.cpu_problem)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_short_prompts_are_read_together_and_have_their_very_numbers(dtype):
    """Of unequal lengths, in slots that are not neighbours, longer ones (read by themselves) and kept prefixes between."""
    model = Transformer(ModelConfig(**{**SHAPE, "seq_length": 1024}), seed=3).eval().to(dtype)
    lengths = [17, 64, 30, 20, 5, 16, 2, 40, 64, 65, 33, 28, 100, 32]
    prompts = [[(7 * number + place * place) % 61 for place in range(length)] for number, length in enumerate(lengths)]
    batch, passes, read = Batch(model, 14, keep_prefixes=True), [], model.last_hidden
    held = [batch.add(Request(ids[:10], 100, GREEDY)) for ids in prompts[:5]]
    batch.step()
    batch.finish(held[1], "cancelled")
    batch.finish(held[3], "cancelled")  # slots 1 and 3 are free, and hold what other prompts begin with
    model.last_hidden = lambda tokens, *rest: passes.append(tuple(tokens.shape)) or read(tokens, *rest)
    together = [batch.add(Request(ids, 6, Sampling(1.3), draw(i), logprobs=0)) for i, ids in enumerate(prompts)]
    texts = [list(each) for each in together]
    model.last_hidden = read
    assert max(count for count, _ in passes) >= 3 and len(passes) < len(prompts)
    for i, (generation, ids) in enumerate(zip(together, prompts)):
        if i in (1, 3):
            continue  # read in two pieces, whose numbers differ in rounding from those of one
        single = Batch(model, 1).add(Request(ids, 6, Sampling(1.3), draw(i), logprobs=0))
        assert texts[i] == list(single)
        assert [score.logprob for score in generation.scores] == [score.logprob for score in single.scores]


@pytest.mark.skipif(not EXTENSION.cpu, reason=EXTENSION.cpu_problem)
def test_forty_rows_are_still_by_themselves():
    """As many as a server writes side by side; their first tokens come from one product with the head."""
    model = build("full", torch.bfloat16)
    prompts = [[number, *range(2 + number % 13)] for number in range(40)]
    batch, rows = Batch(model, 40), []
    forward = model.head.forward
    model.head.forward = lambda hidden: (hidden.ndim == 2 and rows.append(len(hidden))) or forward(hidden)
    together = [batch.add(Request(ids, 8, Sampling(1.3), draw(i), logprobs=0)) for i, ids in enumerate(prompts)]
    texts = [list(each) for each in together]
    assert rows == [40]  # their prompts are read in one step
    for i, (generation, ids) in enumerate(zip(together, prompts)):
        single = Batch(model, 1).add(Request(ids, 8, Sampling(1.3), draw(i), logprobs=0))
        assert texts[i] == list(single)
        assert [score.logprob for score in generation.scores] == [score.logprob for score in single.scores]


class HalfRight:
    """Guesses the text that will come, every fifth id of it wrong."""

    def __init__(self, text):
        self.text, self.place = text, 0

    def push(self, token):
        self.place += 1

    def guess(self, limit):
        places = range(self.place, min(self.place + min(limit, 4), len(self.text)))
        return [(self.text[i] + (i % 5 == 4)) % 61 for i in places]


@pytest.mark.parametrize("sampling", [GREEDY, Sampling(1.1)], ids=["greedy", "sampled"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_guesses_change_nothing_but_the_number_of_passes(variant, sampling):
    model = build(variant)
    prompt = [7, 8, 9, 10, 11, 7, 8, 9, 10, 11, 7, 8]
    plain = list(generate(model, prompt, 50, sampling, generator=draw(1)))
    batch = Batch(model, 2)
    guessing = batch.add(Request(prompt, 50, sampling, draw(1), lookup=5))
    guessing.lookup = HalfRight(plain)
    other = batch.add(Request(PROMPTS[0], 40, sampling, draw(2)))  # a row without guesses beside it
    assert list(guessing) == plain
    assert list(other) == list(generate(model, PROMPTS[0], 40, sampling, generator=draw(2)))
    assert 30 < guessing.accepted < guessing.guessed, "most guesses are right, some are not"


def test_a_text_that_repeats_itself_is_guessed():
    model = build()
    with torch.no_grad():
        for block in model.blocks:  # nothing but the embedding is left: a token decides the next
            block.attention.out.weight.zero_()
            block.mlp.down.weight.zero_()
    plain = list(generate(model, [3], 60, GREEDY))
    guessing = generate(model, [3], 60, GREEDY, lookup=4)
    assert list(guessing) == plain
    assert guessing.accepted > 20


def test_what_is_guessed():
    lookup = PromptLookup([1, 2, 3, 4, 9, 2, 3], 3)
    assert lookup.guess(10) == [4, 9, 2]
    assert lookup.guess(2) == [4, 9] and lookup.guess(0) == [] and lookup.guess(-1) == []
    lookup.push(7)
    assert lookup.guess(10) == []
    for token in (2, 3):
        lookup.push(token)
    assert lookup.guess(10) == [7, 2, 3], "the latest place wins"
    assert PromptLookup([1], 3).guess(5) == []


@pytest.mark.parametrize("variant", VARIANTS)
def test_kept_prefixes(variant):
    model = build(variant)
    batch = Batch(model, 1, keep_prefixes=True)
    first = batch.add(Request(PROMPTS[2], 10, GREEDY))
    written = list(first)
    follow_up = PROMPTS[2] + written + [3, 4]
    second = batch.add(Request(follow_up, 10, GREEDY))
    batch.step()
    kept = len(follow_up) - 2 - 1  # the last id written was never read
    assert second.read - kept == 3 or second.read == len(follow_up), "only what is new was read"
    assert list(second) == list(generate(model, follow_up, 10, GREEDY))
    unrelated = batch.add(Request([50, 51, 52], 10, GREEDY))
    assert list(unrelated) == list(generate(model, [50, 51, 52], 10, GREEDY))


def test_cancelled_and_finished_neighbours_leave_the_others_alone():
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


def test_log_probabilities_are_the_model_s_own():
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


def test_a_limit_below_the_context_is_named():
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
    whole = "".join(TextGeneration(_finished(free), tokenizer, prompt))
    assert whole == tokenizer.decode(ids)
    middle = len(whole) // 2
    stop = whole[middle : middle + chunk]
    batch = Batch(model, 1)
    text = TextGeneration(
        batch.add(Request(prompt.ids, 20, Sampling(2.0), draw(8))), tokenizer, prompt, ["never there", stop]
    )
    assert "".join(text) == whole[: whole.index(stop)] == text.text
    assert text.finished and text.generation.finish_reason == "stop string" and not batch.running
    with pytest.raises(UserError, match="a stop string is empty"):
        TextGeneration(free, tokenizer, Prompt([]), [""])


def _finished(generation):
    assert generation.finish_reason is not None
    return generation
