"""Tables read by `datasets`: CSV, TSV, Arrow, WebDataset and save_to_disk folders, in preprocessing and streams."""

from __future__ import annotations

import gzip
import io
import json
import tarfile
from collections import Counter
from pathlib import Path

import pytest

from megatronish.data.readers.documents import DocumentReader
from megatronish.data.readers.inputs import file_source, find_inputs
from megatronish.data.samples.dataset import open_dataset
from megatronish.data.streams.streaming import open_stream
from megatronish.errors import DataError
from megatronish.preprocessing.options import PreprocessOptions
from megatronish.preprocessing.preprocess import preprocess
from tests.data.streams.text_shards import documents_of, make_texts, options, samples

datasets = pytest.importorskip("datasets")
TEXTS = ["plain", "007", "NA", 'with "quotes", comma\nand line end', "größer 日本\U0001f600", *make_texts(0, 600)]


def csv_of(texts: list[str], separator: str) -> str:
    rows = "".join(f'{i}{separator}"{text.replace(chr(34), chr(34) * 2)}"\n' for i, text in enumerate(texts))
    return f"id{separator}text\n{rows}"


def write_table(folder: Path, kind: str, texts: list[str]) -> Path:
    path = folder / ("saved" if kind == "saved" else f"d.{kind}")
    if kind == "saved":
        datasets.Dataset.from_dict({"id": range(len(texts)), "text": texts}).save_to_disk(path, num_shards=2)
    elif kind == "arrow":
        datasets.Dataset.from_dict({"text": texts}).save_to_disk(folder / "aside")
        (folder / "aside" / "data-00000-of-00001.arrow").rename(path)
    elif kind == "tar":
        with tarfile.open(path, "w") as archive:
            for number, text in enumerate(texts):
                for suffix, raw in (("text", text.encode()), ("json", json.dumps({"n": number}).encode())):
                    entry = tarfile.TarInfo(f"{number:04d}.{suffix}")
                    entry.size = len(raw)
                    archive.addfile(entry, io.BytesIO(raw))
    else:
        raw = csv_of(texts, "\t" if kind == "tsv" else ",").encode()
        path.write_bytes(gzip.compress(raw) if kind.endswith(".gz") else raw)
    return path


@pytest.mark.parametrize("kind", ["csv", "csv.gz", "tsv", "arrow", "tar", "saved"])
def test_tables_give_their_column_in_preprocessing_and_streams(tmp_path: Path, kind: str) -> None:
    path = write_table(tmp_path, kind, TEXTS)
    prefix = str(tmp_path / "o")
    preprocess(
        PreprocessOptions(
            inputs=(str(path),), output_prefix=prefix, tokenizer_model="bytes", shard_size=4000, workers=2
        ),
        lambda line: None,
    )
    dataset = open_dataset(f"{prefix}_text_document")
    assert [raw.decode() for raw in dataset.document_bytes(range(len(TEXTS)))] == TEXTS

    stream = open_stream(str(path), options(seq_length=256, buffer_documents=50))
    parts = [documents_of(stream.open(part, 2), 2 * len(TEXTS)) for part in range(2)]
    assert Counter(text for part in parts for text in set(part)) == Counter(TEXTS), "disjoint and complete"
    reader = stream.open(1, 2)
    before, state = samples(reader, 20), json.loads(json.dumps(reader.state()))
    assert samples(stream.open(1, 2, state), 20) == samples(stream.open(1, 2), 40)[20:] and before


def test_faults_of_tables(tmp_path: Path) -> None:
    """Other values than text are faults of their row; a missing column or a damaged file ends the run with its name."""
    saved = tmp_path / "saved"
    datasets.Dataset.from_dict({"text": ["a", None, "b"], "n": [1, 2, 3]}).save_to_disk(saved)
    with pytest.raises(DataError, match="saved, row 2: the value of 'text' is null"):
        list(DocumentReader([file_source(saved)]))
    reader = DocumentReader([file_source(saved)], on_error="skip")
    assert [document.texts[0] for document in reader] == ["a", "b"] and reader.counts.rejected == 1
    with pytest.raises(DataError, match=r"no column 'body'; columns are \['n', 'text'\].*--json-keys"):
        list(DocumentReader([file_source(saved)], keys=("body",)))
    with pytest.raises(DataError, match="row 1: the value of 'n' is 1, not a string"):
        list(DocumentReader([file_source(saved)], keys=("n",)))
    (tmp_path / "d.csv").write_text('id,text\n1,a\n2,b,c,"\n')
    with pytest.raises(DataError, match=r"d\.csv: cannot be read: ParserError"):
        list(DocumentReader([file_source(tmp_path / "d.csv")], on_error="skip"))
    tar = write_table(tmp_path, "tar", TEXTS)
    complete = tar.read_bytes()
    for size in (100_700, 100_900, len(complete) - 20_000):
        tar.write_bytes(complete[:size])
        with pytest.raises(DataError, match=r"d\.tar: truncated or corrupt tar"):
            list(DocumentReader([file_source(tar)], keys=("text",), on_error="skip"))
    datasets.DatasetDict({"train": datasets.Dataset.from_dict({"text": ["a"]})}).save_to_disk(tmp_path / "splits")
    with pytest.raises(DataError, match=r"holds several splits; give one of .*splits/train"):
        find_inputs([str(tmp_path / "splits")])
