"""Blends: exact shares at the end of each block, every sample of a source in turn, the same whatever is read before."""

import pickle
from fractions import Fraction
from math import ceil

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatronish.data.indexed.builder import IndexedWriter
from megatronish.data.indexed.format import IndexedReader
from megatronish.data.samples.blend import MAX_BLOCK, MIN_BLOCK, BlendedDataset, apportion
from megatronish.data.samples.packing import PackedDataset
from megatronish.data.samples.source import SampleSource
from megatronish.errors import DataError

WEIGHTS = st.lists(st.floats(0.1, 1e3) | st.integers(1, 1000), min_size=1, max_size=6)


def source(folder, name: str, first_token: int, documents: int = 40, dtype: str = "<i4") -> PackedDataset:
    """Documents of distinct tokens from `first_token` on, so that a token shows its source."""
    writer = IndexedWriter(folder / name, dtype)
    for number in range(documents):
        writer.add_document(np.arange(7) + first_token + 7 * number)
    writer.finalize()
    return PackedDataset(IndexedReader(folder / name), np.arange(documents), 5, seed=3)


class Fake(SampleSource):
    """A source that only counts."""

    seq_length, samples_per_epoch, tokens_per_epoch, identity = 5, 10, 51, ""

    def __init__(self, name: str = "x") -> None:
        self.name = self.identity = name

    def rows(self, numbers):
        raise NotImplementedError

    def documents(self, number):
        raise NotImplementedError


@given(st.integers(0, 10**12), st.lists(st.integers(1, 10**9), min_size=1, max_size=8))
def test_apportioned_counts_are_the_shares_rounded_and_sum_up(total, weights):
    shares = [Fraction(weight, sum(weights)) for weight in weights]
    counts = apportion(total, shares)
    assert sum(counts) == total
    assert all(abs(count - total * share) < 1 for count, share in zip(counts, shares, strict=True))


def test_largest_remainders_are_rounded_up_the_first_of_equals():
    assert apportion(10, [Fraction(1, 3)] * 3) == [4, 3, 3]
    assert apportion(7, [Fraction(55, 100), Fraction(25, 100), Fraction(20, 100)]) == [4, 2, 1]  # 3.85, 1.75, 1.4


@settings(max_examples=60, deadline=None)
@given(weights=WEIGHTS, seed=st.integers(0, 3), first=st.integers(0, 3), data=st.data())
def test_blocks_have_their_quotas_and_each_source_is_read_in_turn(weights, seed, first, data):
    blend = BlendedDataset([Fake(str(i)) for i in range(len(weights))], weights, seed)
    size = blend.block_size
    assert size >= MIN_BLOCK and size >= ceil(sum(map(Fraction, weights)) / Fraction(min(weights)))
    begin = first * size
    sources, ordinals = blend.locate(np.arange(begin, begin + 2 * size))
    for i, share in enumerate(blend.shares):
        for end in (size, 2 * size):  # less than one sample off at the end of each block
            assert abs(blend.counts(begin + end)[i] - (begin + end) * share) < 1
        mine = ordinals[sources == i].tolist()
        assert mine == list(range(blend.counts(begin)[i], blend.counts(begin + 2 * size)[i]))
    some = np.array(data.draw(st.lists(st.integers(0, 2 * size - 1), min_size=1, max_size=9)))
    again = pickle.loads(pickle.dumps(BlendedDataset([Fake(str(i)) for i in range(len(weights))], weights, seed)))
    for part, full in zip(again.locate(begin + some), (sources, ordinals), strict=True):
        assert part.tolist() == full[some].tolist()
    stop = int(some[0])  # counts inside a block
    assert blend.counts(begin + stop) == [
        blend.counts(begin)[i] + int((sources[:stop] == i).sum()) for i in range(len(weights))
    ]


def test_far_samples_are_exact():
    """64-bit and exact fractions: 10^15 samples on, shares are still less than one off and numbers still follow."""
    blend = BlendedDataset([Fake("a"), Fake("b"), Fake("c")], [1, 1, 1], seed=0)
    block = 10**15 // blend.block_size
    before, after = (apportion(b * blend.block_size, blend.shares) for b in (block, block + 1))
    assert blend.counts((block + 1) * blend.block_size) == after
    sources, ordinals = blend.locate(np.arange(block * blend.block_size, (block + 1) * blend.block_size))
    assert [ordinals[sources == i].tolist() for i in range(3)] == [
        list(range(b, a)) for b, a in zip(before, after, strict=True)
    ]
    assert min(before) > 3 * 10**14


def test_order_depends_on_the_seed_and_the_block():
    def order(seed: int, block: int) -> list[int]:
        blend = BlendedDataset([Fake("a"), Fake("b")], [1, 1], seed)
        return blend.locate(np.arange(block * blend.block_size, (block + 1) * blend.block_size))[0].tolist()

    assert order(1, 0) == order(1, 0)
    assert order(1, 0) != order(1, 1) and order(1, 0) != order(2, 0)
    # A fair shuffle of 512 + 512: the longest run of one source is 9 or so; 30 would come up once in 10^6 blocks.
    text = "".join(map(str, order(1, 0)))
    assert "0" * 30 not in text and "1" * 30 not in text


def test_rows_are_the_sources_samples(tmp_path):
    """Two data sets, the second of another dtype, through several epochs of the smaller."""
    sources = [source(tmp_path, "a", 0), source(tmp_path, "b", 10_000, documents=9, dtype="<u2")]
    blend = BlendedDataset(sources, [3, 1], seed=1)
    numbers = np.arange(300)
    rows = blend.rows(numbers)
    which, ordinals = blend.locate(numbers)
    assert set(which.tolist()) == {0, 1} and ordinals[which == 1].max() > sources[1].samples_per_epoch
    for row, (i, ordinal) in enumerate(zip(which.tolist(), ordinals.tolist(), strict=True)):
        tokens, starts = rows.sample(row)
        expected, expected_starts = sources[i].sample(ordinal)
        assert tokens.tolist() == expected.tolist() and starts.tolist() == expected_starts.tolist()
        assert (tokens >= 10_000).all() == (i == 1)
    assert blend.lengths(numbers).tolist() == [6] * 300


def test_every_sample_of_every_source_once_per_epoch(tmp_path):
    """By size, sources end their epochs together: the first samples_per_epoch samples are one epoch of each, to a sample."""
    sources = [source(tmp_path, "a", 0, 40), source(tmp_path, "b", 10_000, 120)]
    blend = BlendedDataset(sources, [s.samples_per_epoch for s in sources], seed=1)
    which, ordinals = blend.locate(np.arange(blend.samples_per_epoch))
    for i, one in enumerate(sources):
        assert sorted(ordinals[which == i].tolist())[:-1] == list(range(len(ordinals[which == i]) - 1))
        # within a block, whose order is random, counts differ from the shares by some samples of the block's remainder
        assert abs(len(ordinals[which == i]) - one.samples_per_epoch) <= 40


@pytest.mark.parametrize("weights", [[], [1, 0], [1], [1, -2]])
def test_bad_weights_are_refused(weights):
    with pytest.raises(ValueError, match="positive weight"):
        BlendedDataset([Fake("a"), Fake("b")], weights, 0)


def test_a_share_too_small_for_a_block_is_refused_by_name():
    BlendedDataset([Fake("a"), Fake("b")], [MAX_BLOCK - 1, 1], 0)
    with pytest.raises(DataError, match=r"^b would give .* raise its weight or leave it out"):
        BlendedDataset([Fake("a"), Fake("b")], [MAX_BLOCK, 1], 0)


def test_sources_must_agree_on_the_sequence_length():
    other = Fake("b")
    other.seq_length = 6
    with pytest.raises(ValueError, match=r"\[5, 6\]"):
        BlendedDataset([Fake("a"), other], [1, 1], 0)


def test_identity_follows_what_the_order_depends_on():
    def identity(names: str, weights: list[float], seed: int) -> str:
        return BlendedDataset([Fake(name) for name in names], weights, seed).identity

    base = identity("ab", [1, 2], 0)
    assert base == identity("ab", [2, 4], 0), "only the proportion counts"
    assert len({base, identity("ba", [1, 2], 0), identity("ab", [1, 3], 0), identity("ab", [1, 2], 1)}) == 4
