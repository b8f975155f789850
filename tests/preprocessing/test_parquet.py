"""Parquet input: values of every text type come back, and damage, wrong columns and nulls are named."""

import pytest

from megatronish.data.readers.documents import DocumentReader
from megatronish.data.readers.inputs import file_source
from megatronish.errors import DataError

pyarrow = pytest.importorskip("pyarrow")
parquet = pytest.importorskip("pyarrow.parquet")
TEXTS = ["plain", "", "größer 日本\U0001f600", "a\x00b"]


def texts(reader: DocumentReader) -> list[str]:
    return [document.texts[0] for document in reader]


@pytest.mark.parametrize("kind", ["string", "large_string", "binary", "dictionary"])
def test_values_come_back_from_every_row_group(tmp_path, kind):
    types = {"string": pyarrow.string(), "large_string": pyarrow.large_string(), "binary": pyarrow.binary()}
    values = [text.encode() for text in TEXTS] if kind == "binary" else TEXTS
    array = pyarrow.array(values * 5, types.get(kind))
    table = pyarrow.table({"n": range(20), "text": array.dictionary_encode() if kind == "dictionary" else array})
    parquet.write_table(table, tmp_path / "d.parquet", row_group_size=3)
    reader = DocumentReader([file_source(tmp_path / "d.parquet")])
    assert texts(reader) == TEXTS * 5
    assert reader.bytes_read == reader.total_bytes


def test_nulls_and_bytes_that_are_not_text_are_faults_of_their_row(tmp_path):
    path = tmp_path / "d.parquet"
    values = pyarrow.array([b"good", None, b"bad\xff", b"good"], pyarrow.binary())
    parquet.write_table(pyarrow.table({"text": values}), path, row_group_size=2)
    with pytest.raises(DataError, match="row 2: the value of 'text' is null"):
        texts(DocumentReader([file_source(path)]))
    reader = DocumentReader([file_source(path)], on_error="skip")
    assert texts(reader) == ["good", "good"]
    assert [reject["place"] for reject in reader.rejects] == [f"{path}, row 2", f"{path}, row 3"]
    assert texts(DocumentReader([file_source(path)], on_error="replace")) == ["good", "bad\ufffd", "good"]


def test_wrong_columns_and_damaged_files_are_named(tmp_path):
    path = tmp_path / "d.parquet"
    columns = {"n": [1], "body": ["text " * 50]}
    parquet.write_table(pyarrow.table(columns), path, write_page_checksum=True, compression="none")
    with pytest.raises(DataError, match=r"no column 'text'; columns are \['body', 'n'\]"):
        texts(DocumentReader([file_source(path)]))
    with pytest.raises(DataError, match="column 'n' holds int64, not text"):
        texts(DocumentReader([file_source(path)], keys=("n",)))
    complete = path.read_bytes()
    for damaged in (
        complete[: len(complete) // 2],
        b"PAR1",
        b"nothing of the kind",
        complete.replace(b"text text", b"text\x00text"),
    ):
        path.write_bytes(damaged)
        with pytest.raises(DataError, match="truncated or corrupt parquet") as caught:
            texts(DocumentReader([file_source(path)], keys=("body",), on_error="skip"))
        assert str(path) in str(caught.value)
