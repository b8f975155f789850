"""Batches as tensors: the same with threads, processes or neither; resuming; document masks; validation."""

import multiprocessing
import threading

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatronish.data.indexed.builder import IndexedWriter
from megatronish.data.indexed.format import IndexedReader
from megatronish.data.loader import MicroBatchLoader, to_tensors
from megatronish.data.samples.packing import PackedDataset
from megatronish.data.samples.rows import SampleRows
from megatronish.data.samples.sampler import MicroBatchSampler
from megatronish.data.samples.validation import ValidationLoader
from megatronish.errors import DataError

EOD = 99_999


def make(folder, lengths: list[int]) -> IndexedReader:
    """Distinct tokens, each document ended by EOD."""
    writer = IndexedWriter(folder / "d", "<i4")
    start = 0
    for length in lengths:
        writer.add_document([*range(start, start + length), EOD])
        start += length
    writer.finalize()
    return IndexedReader(folder / "d")


@pytest.fixture
def dataset(tmp_path):
    lengths = np.random.default_rng(0).integers(1, 30, size=60).tolist()
    return PackedDataset(make(tmp_path, lengths), np.arange(60), 16, seed=5)


def take(loader: MicroBatchLoader, count: int) -> list[dict]:
    with loader:
        return [next(loader) for _ in range(count)]


def same(one: dict, other: dict) -> bool:
    return one.keys() == other.keys() and all(
        torch.equal(v, other[k]) if isinstance(v, torch.Tensor) else v == other[k] for k, v in one.items()
    )


def test_labels_are_the_next_tokens(dataset):
    (batch,) = take(MicroBatchLoader(dataset, MicroBatchSampler(4, 4, 4)), 1)
    assert {key: (value.dtype, tuple(value.shape)) for key, value in batch.items()} == {
        "tokens": (torch.int64, (4, 16)),
        "labels": (torch.int64, (4, 16)),
    }
    for row in range(4):
        expected = dataset.sample(4 + row)[0]
        assert batch["tokens"][row].tolist() == expected[:-1].tolist()
        assert batch["labels"][row].tolist() == expected[1:].tolist()


@pytest.mark.parametrize("document_mask", [False, True])
@pytest.mark.parametrize("options", [{"prefetch": 3}, {"num_workers": 2}, {"num_workers": 1, "prefetch": 0}])
def test_threads_and_processes_give_the_batches_of_neither(dataset, options, document_mask):
    def loader(**options):
        return MicroBatchLoader(dataset, MicroBatchSampler(0, 6, 3, 1, 2), document_mask=document_mask, **options)

    count = 2 * dataset.samples_per_epoch // 6  # beyond the first epoch
    plain = take(loader(prefetch=0), count)
    assert all(same(*pair) for pair in zip(plain, take(loader(**options), count), strict=True))
    assert not multiprocessing.active_children()
    assert not any(thread.name == "batch-prefetch" for thread in threading.enumerate())


@pytest.mark.parametrize("prefetch", [0, 4])
def test_resuming_by_the_consumed_number_is_exact(dataset, prefetch):
    uninterrupted = take(MicroBatchLoader(dataset, MicroBatchSampler(0, 4, 2, 0, 2)), 10)
    first = MicroBatchLoader(dataset, MicroBatchSampler(0, 4, 2, 0, 2), prefetch=prefetch)
    begun = take(first, 4)
    assert first.consumed_samples == 16, "what was prefetched does not count"
    rest = take(MicroBatchLoader(dataset, MicroBatchSampler(first.consumed_samples, 4, 2, 0, 2)), 6)
    assert all(same(*pair) for pair in zip(uninterrupted, begun + rest, strict=True))


def test_resuming_on_another_number_of_ranks_covers_the_same_samples(dataset):
    def rows(consumed: int, micro: int, ranks: int, steps: int) -> list[list[int]]:
        loaders = [
            MicroBatchLoader(dataset, MicroBatchSampler(consumed, 8, micro, rank, ranks)) for rank in range(ranks)
        ]
        taken = [next(loader)["tokens"] for _ in range(steps * 8 // (micro * ranks)) for loader in loaders]
        for loader in loaders:
            loader.close()
        return torch.cat(taken).tolist()

    assert rows(0, 2, 2, 2) + rows(16, 1, 4, 2) == rows(0, 8, 1, 4)


def test_document_mask_by_hand():
    one = (np.array([1, 2, 9, 3, 4]), np.array([0, 3]))  # a document begins at input 3
    two = (np.array([5, 6, 7, 9, 8]), np.array([0, 4]))  # one begins at the last label only
    batch = to_tensors(SampleRows.of([one, two]).batch(document_mask=True))
    assert batch["tokens"].tolist() == [[1, 2, 9, 3], [5, 6, 7, 9]]
    assert batch["labels"].tolist() == [[2, 9, -100, 4], [6, 7, 9, -100]]
    assert batch["positions"].tolist() == [[0, 1, 2, 0], [0, 1, 2, 3]]
    assert batch["cu_seqlens"].tolist() == [0, 3, 4, 8] and batch["cu_seqlens"].dtype == torch.int32
    assert batch["max_seqlen"] == 4


def test_document_mask_agrees_with_the_end_tokens(dataset):
    """Independent of the boundaries: with EOD at every document's end, exactly the EOD inputs have no label."""
    for batch in take(MicroBatchLoader(dataset, MicroBatchSampler(0, 4, 4), document_mask=True), 40):
        ends = batch["tokens"] == EOD
        assert torch.equal(batch["labels"] == -100, ends)
        restarts = torch.zeros_like(ends)
        restarts[:, 0] = True
        restarts[:, 1:] = ends[:, :-1]
        assert torch.equal(batch["positions"] == 0, restarts)
        flat = restarts.flatten().nonzero().flatten().tolist()
        assert batch["cu_seqlens"].tolist() == [*flat, 64]
        assert batch["max_seqlen"] == int(batch["positions"].max()) + 1


def test_failure_in_the_background_reaches_the_caller(dataset, monkeypatch):
    def fail(numbers, document_mask):
        raise OSError(f"disk gone at sample {numbers[0]}")

    monkeypatch.setattr(dataset, "batch", fail)
    with (
        MicroBatchLoader(dataset, MicroBatchSampler(0, 2, 2), prefetch=2) as loader,
        pytest.raises(OSError, match="disk gone at sample 0"),
    ):
        next(loader)
    assert loader.consumed_samples == 0


@settings(max_examples=80, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 15), min_size=1, max_size=10),
    seq_length=st.integers(1, 12),
    micro=st.integers(1, 3),
    ranks=st.integers(1, 3),
    lead=st.booleans(),
    document_mask=st.booleans(),
)
def test_validation_has_every_held_out_token_as_a_label_once(
    tmp_path_factory, lengths, seq_length, micro, ranks, lead, document_mask
):
    reader = make(tmp_path_factory.mktemp("validation"), lengths)
    documents = np.arange(len(lengths))
    if not lead and reader.num_tokens < 2:
        return
    loaders = [
        ValidationLoader(
            reader, documents, seq_length, micro, rank, ranks, eod_id=EOD if lead else None, document_mask=document_mask
        )
        for rank in range(ranks)
    ]
    per_rank = [list(loader) for loader in loaders]
    assert {len(batches) for batches in per_rank} == {len(loaders[0])}
    rows = [
        row
        for step in zip(*per_rank, strict=True)
        for batch in step
        for row in zip(batch["tokens"], batch["labels"], strict=True)
    ]
    labels = [int(label) for _, row in rows for label in row if label != -100]
    stored = reader.tokens_view.tolist()
    expected = stored if lead else stored[1:]
    if document_mask:
        first = set(reader.document_starts[:-1].tolist()) - ({0} if lead else set())
        expected = [token for place, token in enumerate(stored) if place not in first and (lead or place > 0)]
    assert labels == expected
    for tokens, row in rows:  # a label is always the next input
        for place in range(seq_length - 1):
            assert row[place] in (-100, tokens[place + 1])


def test_validation_can_be_limited_to_windows_spread_over_the_text(tmp_path):
    reader = make(tmp_path, [99] * 10)
    limited = ValidationLoader(reader, np.arange(10), 10, 2, eod_id=EOD, max_windows=5)
    starts = [int(row[0]) for batch in limited for row in batch["labels"] if row[0] != -100]
    assert starts == [0, 198, 396, 594, 792]
    assert limited.num_windows == 5 and len(limited) == 3


def test_nothing_held_out_is_refused(tmp_path):
    with pytest.raises(DataError, match="nothing is held out for validation"):
        ValidationLoader(make(tmp_path, [5]), np.empty(0, dtype=np.int64), 4, 1)


def test_bad_sizes_are_refused(dataset):
    with pytest.raises(ValueError, match="rank 2 of 2"):
        ValidationLoader(dataset.reader, [0], 4, 1, 2, 2)
    with pytest.raises(ValueError, match="max_windows 0"):
        ValidationLoader(dataset.reader, np.arange(20), 4, 1, max_windows=0)
    with pytest.raises(ValueError, match="num_workers -1"):
        MicroBatchLoader(dataset, MicroBatchSampler(0, 1, 1), num_workers=-1)
