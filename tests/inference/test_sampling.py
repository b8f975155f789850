"""The distribution is that of transformers' logits processors, and samples follow it."""

import math

import pytest
import torch
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from megatronish.errors import UserError
from megatronish.inference.sampling import FIRST_SORTED, GREEDY, Sampling, choose, filtered_logits, penalized


@pytest.mark.parametrize("temperature", [0.3, 1.0, 1.7])
@pytest.mark.parametrize("top_k", [0, 1, 5, 60, 10_000])
@pytest.mark.parametrize("top_p", [1e-9, 0.3, 0.9, 0.999, 1.0])
def test_equals_transformers(temperature, top_k, top_p):
    logits = 3 * torch.randn(16, 500, generator=torch.Generator().manual_seed(0))
    processors = LogitsProcessorList([TemperatureLogitsWarper(temperature)])
    if top_k:
        processors.append(TopKLogitsWarper(top_k))
    if top_p < 1:
        processors.append(TopPLogitsWarper(top_p))
    expected = processors(None, logits).softmax(-1)
    actual = filtered_logits(logits, Sampling(temperature, top_k, top_p)).softmax(-1)
    assert torch.equal(actual > 0, expected > 0)
    # The best logit is subtracted before the division here and inside softmax there: a few roundings of fp32 apart, of
    # exponents up to |logit| / temperature = 60 (relative error of exp: 60 * 2^-23 = 7e-6).
    torch.testing.assert_close(actual, expected, rtol=2e-5, atol=1e-9)


@pytest.mark.parametrize("min_p", [0.001, 0.05, 0.5, 1.0])
@pytest.mark.parametrize("top_p", [0.7, 1.0])
def test_min_p_equals_transformers(min_p, top_p):
    logits = 3 * torch.randn(16, 500, generator=torch.Generator().manual_seed(0))
    processors = LogitsProcessorList([TemperatureLogitsWarper(1.4)])
    if top_p < 1:
        processors.append(TopPLogitsWarper(top_p))
    processors.append(MinPLogitsWarper(min_p))
    expected = processors(None, logits).softmax(-1)
    actual = filtered_logits(logits, Sampling(1.4, top_p=top_p, min_p=min_p)).softmax(-1)
    assert torch.equal(actual > 0, expected > 0)
    torch.testing.assert_close(actual, expected, rtol=2e-5, atol=1e-9)  # see above


@pytest.mark.parametrize("penalty", [0.5, 1.3])
def test_repetition_penalty_equals_transformers(penalty, generator):
    logits, seen = torch.randn(2, 100, generator=generator), [3, 99, 3, 41, 0]
    expected = RepetitionPenaltyLogitsProcessor(penalty)(torch.tensor([seen, seen]), logits.clone())
    sampling = Sampling(repetition_penalty=penalty)
    for row, right in zip(logits, expected):
        assert torch.equal(penalized(row, sampling, seen), right)
    # Among other options: it comes first.
    among = Sampling(0.5, 10, repetition_penalty=penalty)
    draws = choose(logits[:1].expand(500, -1), among, generator, seen)
    assert set(draws.tolist()) <= set(filtered_logits(expected[0], among).isfinite().nonzero()[:, 0].tolist())


@pytest.mark.parametrize("spread", [0.1, 3.0])
def test_top_p_of_a_large_vocabulary(spread, generator):
    """Whether the first sorted tokens hold p or not."""
    logits = spread * torch.randn(3, 5 * FIRST_SORTED, generator=generator)
    expected = TopPLogitsWarper(0.8)(None, logits).softmax(-1)
    actual = filtered_logits(logits, Sampling(top_p=0.8)).softmax(-1)
    assert (int((expected > 0).sum(-1).min()) > FIRST_SORTED) == (spread < 1)
    # A token at the edge may fall on either side: sums of thousands of fp32 probabilities in two orders.
    assert int(((actual > 0) != (expected > 0)).sum()) <= 2
    torch.testing.assert_close(actual, expected, rtol=1e-3, atol=1e-3)


def test_ties_at_the_kth_token_are_kept_and_top_p_counts_them_once():
    logits = torch.tensor([[2.0, 1.0, 1.0, 1.0, -1.0]])
    assert torch.isfinite(filtered_logits(logits, Sampling(top_k=2))).tolist() == [[True, True, True, True, False]]
    uniform = torch.zeros(1, 8)
    assert int(torch.isfinite(filtered_logits(uniform, Sampling(top_p=0.5))).sum()) == 4


def test_tiny_top_p_and_top_k_of_one_are_greedy(generator):
    logits = torch.randn(64, 300, generator=generator)
    best = logits.argmax(-1)
    for sampling in (Sampling(top_p=1e-30), Sampling(top_k=1, temperature=5.0), GREEDY, Sampling(temperature=1e-300)):
        assert torch.equal(choose(logits, sampling, generator), best)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_small_temperatures_and_excluded_tokens_stay_finite(dtype, generator):
    logits = torch.tensor([[60_000.0, -math.inf, 59_000.0, -60_000.0]], dtype=dtype)
    for temperature in (1e-6, 1e-3, 1.0):
        assert choose(logits, Sampling(temperature, top_k=3, top_p=0.9), generator).tolist() == [0]


def test_draws_follow_the_distribution(generator):
    logits = torch.tensor([0.0, 1.0, -1.0, 2.0, 0.5])
    sampling = Sampling(temperature=0.7, top_k=4, top_p=0.95)
    expected = filtered_logits(logits, sampling).softmax(-1)
    draws = 20_000
    counts = choose(logits.expand(draws, -1), sampling, generator).bincount(minlength=5).double()
    assert counts[expected == 0].sum() == 0
    kept = expected > 0
    chi_squared = ((counts - draws * expected).square()[kept] / (draws * expected[kept])).sum()
    assert 2 <= int(kept.sum()) <= 4
    assert chi_squared < 16.3  # 3 degrees of freedom or fewer: exceeded once in 1,000 seeds; this one is fixed


def test_a_generator_alone_decides():
    logits = torch.randn(1, 1000, generator=torch.Generator().manual_seed(1)).expand(50, -1)
    draws = []
    for noise in range(2):
        torch.manual_seed(noise)
        draws.append(choose(logits, Sampling(), torch.Generator().manual_seed(5)))
    assert torch.equal(*draws)
    assert not torch.equal(draws[0], choose(logits, Sampling(), torch.Generator().manual_seed(6)))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"temperature": -0.1}, "temperature -0.1 must be a number of at least 0"),
        ({"temperature": math.nan}, "temperature nan"),
        ({"temperature": math.inf}, "temperature inf"),
        ({"top_k": -1}, "top-k -1 must be at least 0"),
        ({"top_p": 0.0}, "top-p 0.0 must be above 0 and at most 1"),
        ({"top_p": 1.01}, "top-p 1.01"),
        ({"top_p": math.nan}, "top-p nan"),
        ({"min_p": -0.1}, "min-p -0.1 must be at least 0"),
        ({"min_p": 1.5}, "min-p 1.5"),
        ({"repetition_penalty": 0.0}, "repetition penalty 0.0 must be a number above 0"),
    ],
)
def test_bad_values(values, message):
    with pytest.raises(UserError, match=message):
        Sampling(**values)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_non_finite_logits(bad):
    for sampling in (GREEDY, Sampling()):
        with pytest.raises(UserError, match="logits are non-finite"):
            choose(torch.tensor([[0.0, bad, 1.0]]), sampling)
