"""Packing and sampling: every sample once per epoch, for any ranks, batches, interruptions and length of the run."""

import pickle
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatronish.data.indexed.builder import IndexedWriter
from megatronish.data.indexed.format import IndexedReader
from megatronish.data.samples import token_stream
from megatronish.data.samples.packing import PackedDataset
from megatronish.data.samples.permutation import keyed_permutation
from megatronish.data.samples.rows import GATHERED_TOKENS, SampleRows, join_pieces, positions_in_documents
from megatronish.data.samples.sampler import MicroBatchSampler
from megatronish.data.samples.token_stream import TokenStream
from megatronish.errors import DataError


def make(folder, lengths: list[int]) -> IndexedReader:
    """Every token is distinct, so a sample shows where it came from."""
    writer = IndexedWriter(folder / "d", "<i4")
    start = 0
    for length in lengths:
        writer.add_document(np.arange(start, start + length))
        start += length
    writer.finalize()
    return IndexedReader(folder / "d")


LENGTHS = st.lists(st.integers(0, 12), min_size=1, max_size=25)


@settings(max_examples=120, deadline=None)
@given(lengths=LENGTHS, seq_length=st.integers(1, 20), seed=st.integers(0, 5), epoch=st.integers(0, 4))
def test_an_epoch_is_a_permutation_of_one_stream(tmp_path_factory, lengths, seq_length, seed, epoch):
    """Reconstructs the epoch from its samples: overlapping ends agree, each document is complete and occurs once."""
    reader = make(tmp_path_factory.mktemp("packed"), lengths)
    total = sum(lengths)
    if total < seq_length + 1:
        with pytest.raises(DataError, match=f"hold {total} tokens.*needs {seq_length + 1}"):
            PackedDataset(reader, np.arange(len(lengths)), seq_length, seed)
        return
    dataset = PackedDataset(reader, np.arange(len(lengths)), seq_length, seed)
    count = dataset.samples_per_epoch
    assert count == (total - 1) // seq_length
    samples = [dataset.sample(epoch * count + n) for n in range(count)]
    ends = {int(tokens[-1]): tokens for tokens, _ in samples}
    assert len(ends) == count
    # Chain the samples by their shared token: the sample that nothing leads into comes first.
    starts = {int(tokens[0]): (tokens, marks) for tokens, marks in samples}
    (first,) = set(starts) - set(ends)
    stream, marks_in_stream = [first], set()
    while stream[-1] in starts:
        tokens, marks = starts[stream[-1]]
        marks_in_stream |= {len(stream) - 1 + int(mark) for mark in marks[1:]}
        stream.extend(tokens[1:].tolist())
    assert len(stream) == count * seq_length + 1
    assert len(set(stream)) == len(stream), "a token appears twice in an epoch"
    breaks = {i for i in range(1, len(stream)) if stream[i] in set(reader.document_starts[:-1].tolist())}
    assert all(stream[i] == stream[i - 1] + 1 for i in range(1, len(stream)) if i not in breaks)
    assert breaks == marks_in_stream


def test_samples_do_not_depend_on_what_was_read_before(tmp_path):
    reader = make(tmp_path, [7] * 40)
    one, other = (PackedDataset(reader, np.arange(40), 5, 3) for _ in range(2))
    forward = [one.sample(n)[0].tolist() for n in range(300)]
    assert forward == [other.sample(n)[0].tolist() for n in reversed(range(300))][::-1]


def test_order_changes_with_seed_epoch_and_data_but_not_with_documents_names(tmp_path):
    for name, lengths in (("a", [7] * 40), ("b", [7] * 40), ("c", [7] * 38 + [6, 8])):
        (tmp_path / name).mkdir()
        make(tmp_path / name, lengths)

    def run(name: str, seed: int, epoch: int) -> list[int]:
        dataset = PackedDataset(IndexedReader(tmp_path / name / "d"), np.arange(40), 5, seed)
        return [
            int(dataset.sample(epoch * dataset.samples_per_epoch + n)[0][0]) for n in range(dataset.samples_per_epoch)
        ]

    assert run("a", 1, 0) == run("b", 1, 0)
    different = [run("a", 1, 0), run("a", 2, 0), run("a", 1, 1), run("c", 1, 0)]
    assert len({tuple(order) for order in different}) == 4


def test_permutation_is_pinned():
    """Golden values: a change of NumPy or of this code that reorders every user's run must not pass unseen."""
    assert keyed_permutation(10, "documents", 1234, 0, "x").tolist() == [5, 9, 8, 3, 0, 1, 2, 4, 7, 6]
    assert sorted(keyed_permutation(1000, 1).tolist()) == list(range(1000))


def test_permutation_is_uniform():
    """Over 6000 keys each of the 24 orders of four comes up 250 times on average; 5 standard deviations are 78."""
    counts: dict[tuple[int, ...], int] = {}
    for key in range(6000):
        order = tuple(keyed_permutation(4, key).tolist())
        counts[order] = counts.get(order, 0) + 1
    assert len(counts) == 24
    assert max(abs(count - 250) for count in counts.values()) < 78


@settings(max_examples=150, deadline=None)
@given(lengths=st.lists(st.integers(1, 9) | st.integers(40, 60), min_size=1, max_size=30), data=st.data())
def test_windows_read_what_concatenation_gives(tmp_path_factory, lengths, data):
    """Copied pieces, or a gather of short ones, against plain concatenation."""
    reader = make(tmp_path_factory.mktemp("stream"), lengths)
    order = np.array(data.draw(st.permutations(range(len(lengths)))))
    stored = np.concatenate([reader.document(int(d)) for d in order])
    starts = set(np.cumsum([0] + [lengths[d] for d in order])[:-1].tolist())
    length = data.draw(st.integers(1, len(stored)))
    begins = data.draw(st.lists(st.integers(0, len(stored) - length), min_size=1, max_size=4))
    rows = TokenStream.of(reader, order).rows(begins, length)
    assert rows.tokens.dtype == reader.dtype and rows.valid_lengths is None
    for row, begin in enumerate(begins):
        tokens, marks = rows.sample(row)
        assert tokens.tolist() == stored[begin : begin + length].tolist()
        assert marks.tolist() == sorted({0} | {s - begin for s in starts if begin < s < begin + length})


needs_library = pytest.mark.skipif(token_stream.packed_batch() is None, reason="csrc/data is not built")


def assert_same_batch(one: dict, other: dict) -> None:
    assert one.keys() == other.keys()
    for key, value in one.items():
        assert np.array_equal(value, other[key]), key
        assert getattr(value, "dtype", int) == getattr(other[key], "dtype", int), key
        assert getattr(value, "shape", ()) == getattr(other[key], "shape", ()), key


@needs_library
@settings(max_examples=150, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 9) | st.integers(40, 60), min_size=1, max_size=30),
    dtype=st.sampled_from(["u1", "i1", "<i2", "<i4", "<i8", "<u2"]),
    mask=st.booleans(),
    data=st.data(),
)
def test_the_library_makes_the_batches_that_numpy_makes(lengths, dtype, mask, data):
    order = np.array(data.draw(st.permutations(range(len(lengths)))))
    total = sum(lengths)
    stored = np.random.default_rng(total).integers(0, 120, size=total).astype(dtype)
    starts = np.cumsum([0, *lengths])[:-1].astype(np.int64)
    reader = SimpleNamespace(tokens_view=stored)
    stream = TokenStream(reader, starts[order], np.array(lengths, dtype=np.int64)[order])  # type: ignore[arg-type]
    length = data.draw(st.integers(1, max(1, total - 1)))
    begins = data.draw(st.lists(st.integers(0, max(0, total - length - 1)), min_size=1, max_size=4))
    if begins[0] + length + 1 > total:
        with pytest.raises(IndexError, match="not all within the stream"):
            stream.batch(begins, length, mask)
        return
    assert_same_batch(stream.batch(begins, length, mask), stream.rows(begins, length + 1).batch(mask))


@needs_library
def test_a_window_with_many_more_documents_than_the_average(tmp_path):
    """Room is made for twice the average number of documents, and made again where they are more."""
    reader = make(tmp_path, [40_000, *[1] * 400, 40_000])
    stream = TokenStream.of(reader, np.arange(402))
    batch = stream.batch([39_990, 0], 300, True)
    assert batch["cu_seqlens"].tolist() == [0, *range(10, 301), 600]
    assert batch["max_seqlen"] == 300
    assert_same_batch(batch, stream.rows([39_990, 0], 301).batch(True))


@needs_library
@pytest.mark.parametrize("begins", [[-1], [0, 91], [2**62]])
def test_a_window_outside_the_stream_is_refused(tmp_path, begins):
    stream = TokenStream.of(make(tmp_path, [100]), np.arange(1))
    for mask in (False, True):
        with pytest.raises(IndexError, match="windows of 10 tokens"):
            stream.batch(begins, 9, mask)
        assert stream.batch([90], 9, mask)["tokens"].shape == (1, 9)


def test_without_the_library_the_batches_are_the_same(tmp_path, monkeypatch):
    def batches() -> list[dict]:
        dataset = PackedDataset(reader, np.arange(reader.num_documents), seq_length=16, seed=3)
        return [dataset.batch(np.arange(4) + 4 * i, True) for i in range(5)]

    reader = make(tmp_path, [7, 30, 2, 90, 5, 61])
    usual = batches()
    monkeypatch.setattr(token_stream, "packed_batch", lambda: None)
    for one, other in zip(usual, batches(), strict=True):
        assert_same_batch(one, other)


@pytest.mark.parametrize("mean", [5, GATHERED_TOKENS, 200])
def test_pieces_of_any_length_are_joined(mean):
    draw = np.random.default_rng(mean)
    tokens = draw.integers(0, 60_000, size=5000).astype("<u2")
    lengths = draw.integers(0, 2 * mean, size=20)
    begins = draw.integers(0, 5000 - 2 * mean, size=20)
    joined = join_pieces(tokens, begins, lengths)
    assert joined.dtype == tokens.dtype
    assert joined.tolist() == [t for b, n in zip(begins, lengths, strict=True) for t in tokens[b : b + n].tolist()]


def test_positions_and_labels_at_documents_by_hand():
    def masked(starts: list[int]) -> dict:
        tokens = np.array([[10, 11, 20, 30, 31, 32, 40]])
        return SampleRows(tokens, np.array(starts)).batch(document_mask=True)

    assert positions_in_documents(np.array([2, 1, 3])).tolist() == [0, 1, 0, 0, 1, 2]
    assert masked([0, 2, 3, 6])["positions"].tolist() == [[0, 1, 0, 0, 1, 2]]  # the last label, 40, begins a document
    assert masked([0, 2, 3, 6])["labels"].tolist() == [[11, -100, -100, 31, 32, -100]]
    assert masked([0, 1, 5])["labels"].tolist() == [[-100, 20, 30, 31, -100, 40]]
    assert masked([0])["labels"].tolist() == [[11, 20, 30, 31, 32, 40]]


def test_an_epoch_ends_inside_a_batch(tmp_path):
    dataset = PackedDataset(make(tmp_path, [7] * 40), np.arange(40), 5, 3)
    end = dataset.samples_per_epoch
    numbers = np.array([end - 2, end - 1, end, 3 * end, 0])
    rows = dataset.rows(numbers)
    for row, number in enumerate(numbers.tolist()):
        alone = dataset.sample(number)
        assert [part.tolist() for part in rows.sample(row)] == [part.tolist() for part in alone]
    with pytest.raises(ValueError, match="sample number -1"):
        dataset.sample(-1)


def test_copies_of_a_data_set_for_other_processes_hold_no_order(tmp_path):
    dataset = PackedDataset(make(tmp_path, [7] * 4000), np.arange(4000), 5, 3)
    tokens = dataset.sample(77)[0].tolist()
    copy = pickle.loads(pickle.dumps(dataset))
    assert not copy._epochs
    assert copy.sample(77)[0].tolist() == tokens


LAYOUT = st.tuples(st.integers(1, 4), st.integers(1, 4), st.integers(1, 4))  # micro batch, ranks, accumulation


@settings(max_examples=150, deadline=None)
@given(layout=LAYOUT, consumed=st.integers(0, 50), steps=st.integers(1, 4))
def test_any_layout_gives_the_same_global_order(layout, consumed, steps):
    micro, ranks, accumulation = layout
    batch = micro * ranks * accumulation
    iterators = [iter(MicroBatchSampler(consumed, batch, micro, rank, ranks)) for rank in range(ranks)]
    seen = [int(n) for _ in range(steps * accumulation) for iterator in iterators for n in next(iterator)]
    assert seen == list(range(consumed, consumed + steps * batch))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0, 10, 4, 0, 1), "10 is not a multiple of micro batch 4 x data-parallel size 1 = 4"),
        ((0, 8, 4, 2, 2), r"rank 2 is outside 0\.\.1"),
        ((0, 8, 0, 0, 1), "must be positive"),
        ((-1, 8, 4, 0, 1), "-1 must not be negative"),
    ],
)
def test_sampler_refuses_what_does_not_divide(arguments, message):
    with pytest.raises(ValueError, match=message):
        MicroBatchSampler(*arguments)
