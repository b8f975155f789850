"""Unpacked samples: every token a label once per epoch, little padding, and an order that does not depend on ranks and batches."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatronish.data.indexed.builder import IndexedWriter
from megatronish.data.indexed.format import IndexedReader
from megatronish.data.loader import MicroBatchLoader
from megatronish.data.samples.blend import BlendedDataset
from megatronish.data.samples.bucketing import GROUPS_PER_WINDOW, BucketedDataset, UnpackedDataset
from megatronish.data.samples.sampler import MicroBatchSampler
from megatronish.errors import DataError


def make(folder, lengths: list[int]) -> IndexedReader:
    """Every token is distinct and above 0, so that padding and origin show."""
    writer = IndexedWriter(folder / "d", "<i4")
    start = 1
    for length in lengths:
        writer.add_document(np.arange(start, start + length))
        start += length
    writer.finalize()
    return IndexedReader(folder / "d")


LENGTHS = st.lists(st.integers(0, 23), min_size=1, max_size=20)


@settings(max_examples=120, deadline=None)
@given(lengths=LENGTHS, seq_length=st.integers(1, 9), seed=st.integers(0, 3), epoch=st.integers(0, 2))
def test_an_epoch_has_every_pair_of_neighbours_once(tmp_path_factory, lengths, seq_length, seed, epoch):
    reader = make(tmp_path_factory.mktemp("unpacked"), lengths)
    if max(lengths) < 2:
        with pytest.raises(DataError, match="has two tokens or more"):
            UnpackedDataset(reader, np.arange(len(lengths)), seq_length, seed)
        return
    source = UnpackedDataset(reader, np.arange(len(lengths)), seq_length, seed)
    numbers = np.arange(source.samples_per_epoch) + epoch * source.samples_per_epoch
    rows = source.rows(numbers)
    batch = rows.batch(document_mask=False)
    learnt = [
        (int(token), int(label))
        for row, labels in zip(batch["tokens"], batch["labels"], strict=True)
        for token, label in zip(row, labels, strict=True)
        if label != -100
    ]
    ends = set((reader.document_starts[1:]).tolist())
    expected = [(token, token + 1) for token in range(1, sum(lengths)) if token not in ends]
    assert sorted(learnt) == expected
    known = source.lengths(numbers)
    assert known.tolist() == [int((row > 0).sum()) for row in rows.tokens]
    assert int(known.max()) <= seq_length + 1 and int(known.min()) >= 2
    assert (batch["tokens"][batch["labels"] != -100] > 0).all(), "padding is not learnt from"


def bucketed(folder, group: int = 8, seq_length: int = 32, multiple: int = 8, seed: int = 2) -> BucketedDataset:
    lengths = np.random.default_rng(0).integers(2, 60, size=900).tolist()
    return BucketedDataset(
        UnpackedDataset(make(folder, lengths), np.arange(900), seq_length, seed), group, multiple, seed
    )


def test_windows_permute_the_samples_and_groups_are_of_like_length(tmp_path):
    source = bucketed(tmp_path)
    window = 8 * GROUPS_PER_WINDOW
    for first in (0, window, 5 * window):
        places = source.locate(np.arange(first, first + window))
        assert sorted(places.tolist()) == list(range(first, first + window))
        lengths = source.lengths(np.arange(first, first + window)).reshape(GROUPS_PER_WINDOW, 8)
        edges = sorted((int(group.min()), int(group.max())) for group in lengths)
        assert all(left[1] <= right[0] for left, right in itertools.pairwise(edges))
        firsts = lengths[:, 0].tolist()
        assert firsts != sorted(firsts), "the groups themselves come in random order"


def test_padding_is_to_the_multiple_and_small(tmp_path):
    source, plain = bucketed(tmp_path), bucketed(tmp_path).source
    real = padded = unsorted = 0
    for step in range(100):
        numbers = np.arange(step * 8, step * 8 + 8)
        rows = source.rows(numbers)
        inputs = rows.tokens.shape[1] - 1
        longest = int(source.lengths(numbers).max()) - 1
        assert inputs == min(32, -(-longest // 8) * 8)
        real += int(source.lengths(numbers).sum()) - 8
        padded += inputs * 8
        unsorted += 8 * (int(plain.lengths(numbers).max()) - 1)
    assert padded < 1.25 * real, "lengths 2 to 33 in buckets of 8: an eighth on average, and the spread within a group"
    assert unsorted > 1.4 * real, "what padding costs without sorting"


LAYOUTS = st.sampled_from([(1, 1), (2, 1), (4, 1), (8, 1), (1, 2), (2, 2), (4, 2), (2, 4), (1, 8)])


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    return bucketed(tmp_path_factory.mktemp("layout"))


@settings(max_examples=30, deadline=None)
@given(layout=LAYOUTS, workers=st.sampled_from([0, 0, 0, 0, 0, 2]), step=st.integers(0, 70))
def test_any_layout_reads_the_same_samples_per_step(shared, layout, workers, step):
    """In the global order, rank by rank within a micro step."""
    micro, ranks = layout
    steps = 8 // (micro * ranks)
    batches = []
    for rank in range(ranks):
        sampler = MicroBatchSampler(step * 8, 8, micro, rank, ranks)
        with MicroBatchLoader(shared, sampler, num_workers=workers, prefetch=0) as loader:
            batches.append([next(loader) for _ in range(steps)])
    seen = [
        row[labels != -100].tolist()
        for at in range(steps)
        for rank in range(ranks)
        for row, labels in zip(batches[rank][at]["tokens"], batches[rank][at]["labels"], strict=True)
    ]
    numbers = np.arange(step * 8, step * 8 + 8)
    expected = zip(shared.rows(numbers).tokens, shared.lengths(numbers), strict=True)
    assert seen == [row[: known - 1].tolist() for row, known in expected]


def test_a_blend_of_unpacked_sources_is_padded_and_sorted_too(tmp_path):
    for name in "ab":
        (tmp_path / name).mkdir()
    draw = np.random.default_rng(1)
    sources = [
        UnpackedDataset(make(tmp_path / name, draw.integers(2, 40, size=300).tolist()), np.arange(300), 32, 0)
        for name in "ab"
    ]
    source = BucketedDataset(BlendedDataset(sources, [2, 1], seed=0), 6, 4, seed=0)
    rows = source.rows(np.arange(6))
    for row, place in enumerate(source.locate(np.arange(6)).tolist()):
        which, ordinal = source.source.locate(np.array([place]))
        expected = sources[int(which[0])].rows(ordinal).tokens[0].tolist()
        assert [t for t in rows.tokens[row].tolist() if t] == expected
    assert (rows.tokens.shape[1] - 1) % 4 == 0


def test_identity_and_refusals(tmp_path):
    base = bucketed(tmp_path)
    assert base.identity == bucketed(tmp_path).identity
    assert len({base.identity, bucketed(tmp_path, group=4).identity, bucketed(tmp_path, seed=3).identity}) == 3
    with pytest.raises(ValueError, match="sample number -1"):
        base.rows(np.array([-1]))
    with pytest.raises(ValueError, match="sample number -1"):
        base.source.rows(np.array([-1]))
    with pytest.raises(ValueError, match="pad multiple 0"):
        BucketedDataset(base.source, 8, 0, 0)
