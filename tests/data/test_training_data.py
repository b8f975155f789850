"""A run's data as the training loop opens it: one data set, several, without packing, without a manifest; and its description."""

from pathlib import Path

import numpy as np
import pytest

from megatronish.config.data import DataConfig
from megatronish.data.indexed.builder import IndexedWriter
from megatronish.data.indexed.manifest import manifest_path
from megatronish.data.samples.blend import BlendedDataset
from megatronish.data.samples.bucketing import BucketedDataset
from megatronish.data.samples.packing import PackedDataset
from megatronish.data.samples.splits import split_documents
from megatronish.data.training_data import TrainingData, open_training_data
from megatronish.errors import DataError
from tests.runs import make_dataset


def opened(config: DataConfig, samples: int = 100, group: int = 4, vocab_size: int = 257) -> TrainingData:
    return open_training_data(config, seq_length=16, vocab_size=vocab_size, seed=9, samples=samples, group=group)


@pytest.fixture(scope="module")
def sets(tmp_path_factory) -> list[str]:
    """Two data sets of bytes, the second about three times the first."""
    folders = [tmp_path_factory.mktemp(f"set{seed}") for seed in (0, 1)]
    return [make_dataset(folder, documents=60 * (1 + 2 * seed), seed=seed) for seed, folder in enumerate(folders)]


def test_one_data_set_is_read_as_ever(sets):
    """The order of runs made before there were blends."""
    data = opened(DataConfig(path=sets[0], validation_fraction=0.1))
    expected = PackedDataset(data.datasets[0].reader, split_documents(60, 0.1).train, 16, 9)
    numbers = np.arange(200)
    assert data.train.rows(numbers).tokens.tolist() == expected.rows(numbers).tokens.tolist()
    assert data.fingerprint == data.datasets[0].fingerprint
    assert data.train.num_inputs(30, 8) == 8 * 16
    (line,) = data.describe(2 * expected.samples_per_epoch)
    assert f"{expected.tokens_per_epoch:,} training tokens, 2.00 epochs" in line and "6 documents held out" in line


def test_several_data_sets_in_proportion_to_their_tokens(sets):
    data = opened(DataConfig(path=sets))
    assert isinstance(data.train, BlendedDataset)
    tokens = [source.tokens_per_epoch for source in data.sources]
    assert [float(share) for share in data.train.shares] == pytest.approx([t / sum(tokens) for t in tokens], rel=1e-15)
    lines = data.describe(1024)
    counts = data.train.counts(1024)
    assert len(lines) == 3 and "1,024 samples from 2 data sets" in lines[0]
    for line, source, count in zip(lines[1:], data.sources, counts, strict=True):
        assert source.name in line and f"{count / 1024:.2%} of the samples" in line
        assert f"{source.tokens_per_epoch:,} training tokens" in line
        assert f"{count / source.samples_per_epoch:.2f} epochs" in line


def test_weights_and_the_order_of_data_sets_are_part_of_what_a_run_is(sets):
    def order(path) -> tuple[str, dict[str, str]]:
        data = opened(DataConfig(path=path))
        return data.fingerprint, data.order

    assert order([1, sets[0], 3, sets[1]])[1]["weights in data.path"] == "1, 3"
    assert order(sets)[1]["weights in data.path"] == "by tokens"
    assert order(sets)[0] != order(sets[::-1])[0]
    long = opened(DataConfig(path=[x for i in range(90) for x in (1 + i, sets[0])])).order["weights in data.path"]
    assert len(long) < 60, "the state of a run stays small however many data sets it has"


@pytest.mark.parametrize(
    ("changes", "name", "value"),
    [
        ({"validation_fraction": 0.2}, "data.validation_fraction", "0.2"),
        ({"test_fraction": 0.2}, "data.test_fraction", "0.2"),
        ({"split": "9,1"}, "data.split", "9,1"),
        ({"pack": False}, "samples of an optimizer step", "4"),
        ({"order": "megatron"}, "samples of the run", "100"),
    ],
)
def test_settings_that_change_the_order_are_named(sets, changes, name, value):
    base, changed = (opened(DataConfig(path=sets[0], **c)).order for c in ({}, changes))
    assert base.get(name) != changed[name] == value


def test_validation_reads_every_data_sets_held_out_documents(sets):
    data = opened(DataConfig(path=sets, validation_fraction=0.1))
    assert data.num_held_out == 6 + 18
    per_rank = [list(data.validation_batches(2, rank, 3, False, None)) for rank in range(3)]
    assert len({len(batches) for batches in per_rank}) == 1, "every rank takes equally many"
    labels = sum(int((batch["labels"] != -100).sum()) for batches in per_rank for batch in batches)
    held_out = sum(
        int(dataset.reader.document_lengths[split.validation].sum())
        for dataset, split in zip(data.datasets, data.splits, strict=True)
    )
    assert labels == held_out
    few = list(data.validation_batches(1, 0, 1, False, 8))
    assert len(few) == 8


def test_nothing_held_out_gives_no_batches(sets):
    data = opened(DataConfig(path=sets, validation_fraction=0.0))
    assert data.num_held_out == 0 and not list(data.validation_batches(2, 0, 1, False, 5))


def test_without_packing_samples_are_documents_and_tokens_are_counted(sets):
    data = opened(DataConfig(path=sets[0], pack=False, pad_multiple=4))
    assert isinstance(data.train, BucketedDataset)
    numbers = np.arange(40, 52)
    rows = data.train.rows(numbers)
    known = rows.valid_lengths if rows.valid_lengths is not None else np.full(12, rows.tokens.shape[1])
    assert data.train.num_inputs(40, 12) == int(known.sum()) - 12
    both = opened(DataConfig(path=sets, pack=False))
    assert isinstance(both.train, BucketedDataset) and isinstance(both.train.source, BlendedDataset)
    assert len(both.describe(100)) == 3


def test_data_that_do_not_fit_are_refused(sets, tmp_path):
    with pytest.raises(DataError, match="model.vocab_size is 200"):
        opened(DataConfig(path=sets), vocab_size=200)
    with pytest.raises(DataError, match="no data set at nowhere"):
        opened(DataConfig(path=[sets[0], "nowhere"]))
    other = make_dataset(tmp_path, documents=40)
    path = manifest_path(other)
    path.write_text(
        path.read_text().replace(opened(DataConfig(path=other)).datasets[0].manifest.tokenizer.sha256, "f" * 64)
    )
    with pytest.raises(DataError, match="were made with different tokenizers"):
        opened(DataConfig(path=[sets[0], other]))


def foreign(folder: Path, tokens: list[list[int]], dtype: str = "<u2") -> str:
    writer = IndexedWriter(folder / "foreign", dtype)
    for document in tokens:
        writer.add_document(document)
    writer.finalize()
    return str(folder / "foreign")


def test_megatrons_files_without_a_manifest_need_a_tokenizer(tmp_path):
    texts = [list(range(number, number + 30)) + [256] for number in range(40)]
    prefix = foreign(tmp_path, texts)
    with pytest.raises(DataError, match="did not finish, or another tool made them"):
        opened(DataConfig(path=prefix))
    data = opened(DataConfig(path=prefix, tokenizer="bytes"))
    assert data.datasets[0].manifest.appended_eod and data.datasets[0].tokenizer().kind == "bytes"
    assert data.sources[0].tokens_per_epoch == 39 * 31 and data.num_held_out == 1
    foreign(tmp_path, [[*document[:-1], 5] for document in texts])
    replaced = opened(DataConfig(path=prefix, tokenizer="bytes"))
    assert not replaced.datasets[0].manifest.appended_eod
    assert replaced.fingerprint != data.fingerprint, "equal shape, other contents under the same path"


def test_tokens_beyond_the_given_tokenizer_are_refused(tmp_path):
    prefix = foreign(tmp_path, [[1, 2, 300]] * 20)
    with pytest.raises(DataError, match="holds token 300, the tokenizer bytes has 257 entries"):
        opened(DataConfig(path=prefix, tokenizer="bytes"), vocab_size=400)


def test_megatrons_order_fixes_the_number_of_samples(sets):
    data = opened(DataConfig(path=sets[0], order="megatron"), samples=50)
    with pytest.raises(DataError, match="in Megatron's order a run has as many samples as it asked for"):
        data.train.rows(np.array([data.train.size]))
    with pytest.raises(DataError, match=r"repeats none without weights; give weights, fewer train\.steps"):
        opened(DataConfig(path=sets, order="megatron"), samples=10**6)
