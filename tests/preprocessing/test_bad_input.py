"""Every kind of bad input in every format it can occur in: the result, or the error and its message.

The formats are JSON lines and separated text (plain, .gz, .zst) and Parquet; a kind that a format cannot hold is not in its
table. Disk faults and kills: tests/tools/test_preprocess_faults.py.
"""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import zstandard

from megatronish.data.samples.dataset import IndexedDataset, open_dataset
from megatronish.data.tokenizers.formats import EOD_TOKEN
from megatronish.data.tokenizers.tokenizer import train_bpe
from megatronish.errors import DataError
from megatronish.preprocessing.options import PreprocessOptions
from megatronish.preprocessing.preprocess import preprocess

PACK = {"": bytes, ".gz": gzip.compress, ".zst": zstandard.compress}
JSON_LINES = tuple(f"jsonl{packed}" for packed in PACK)
TEXT = tuple(f"txt{packed}" for packed in PACK)
FORMATS = (*JSON_LINES, *TEXT, "parquet")
GOOD = ["first", "second", "größer \U0001f600", "last"]
SEPARATOR = ";"


class Fault(NamedTuple):
    """A record, its error under `fail`, and its text under `replace` (None: it is skipped then too)."""

    record: Any
    message: str
    repaired: str | None = None


FAULTS: dict[str, dict[str, Fault]] = {
    "jsonl": {
        "bad JSON": Fault(b'{"text": "a"', "not JSON"),
        "missing key": Fault(b'{"body": "a"}', r"no key 'text'; keys are \['body'\]"),
        "null": Fault(b'{"text": null}', "is null, not a string"),
        "number": Fault(b'{"text": 5}', "is 5, not a string"),
        "raw NUL": Fault(b'{"text": "a\x00b"}', "Invalid control character", "a\x00b"),
        "lone surrogate": Fault(b'{"text": "a\\ud800"}', "a lone surrogate at character 1", "a\ufffd"),
        "invalid UTF-8": Fault(b'{"text": "a\xff"}', r"not UTF-8 at byte 11 \(0xff\)", "a\ufffd"),
    },
    "txt": {
        # Raw text has no escapes: a surrogate can only be there as the three bytes that would encode it.
        "lone surrogate": Fault(b"a\xed\xa0\x80", r"not UTF-8 at byte 1 \(0xed\)", "a\ufffd\ufffd\ufffd"),
        "invalid UTF-8": Fault(b"a\xff", r"not UTF-8 at byte 1 \(0xff\)", "a\ufffd"),
    },
    "parquet": {
        "null": Fault(None, "is null, not a string"),
        "lone surrogate": Fault(b"a\xed\xa0\x80", r"not UTF-8 at byte 1 \(0xed\)", "a\ufffd\ufffd\ufffd"),
        "invalid UTF-8": Fault(b"a\xff", r"not UTF-8 at byte 1 \(0xff\)", "a\ufffd"),
    },
}


def family(kind: str) -> str:
    return kind.split(".")[0]


def record(kind: str, text: str) -> bytes:
    return json.dumps({"text": text}).encode() if family(kind) == "jsonl" else text.encode()


def write(folder: Path, kind: str, records: list[Any], complete: bytes | None = None) -> Path:
    """A file of raw records; `complete` instead gives the unpacked bytes themselves."""
    path = folder / f"d.{kind}"
    if kind == "parquet":
        pyarrow = pytest.importorskip("pyarrow")
        from pyarrow import parquet

        table = pyarrow.table({"text": pyarrow.array(records, pyarrow.binary())})
        parquet.write_table(table, path, row_group_size=2)
        return path
    end = b"\n" if family(kind) == "jsonl" else SEPARATOR.encode()
    raw = b"".join(r + end for r in records) if complete is None else complete
    path.write_bytes(PACK[path.suffix if path.suffix in PACK else ""](raw))
    return path


def made(path: Path, reported: list[str] | None = None, **options: Any) -> IndexedDataset:
    """The data set of one file, in units of a few records. `reported` collects the lines that the tool prints."""
    settings: dict[str, Any] = {"tokenizer_model": "bytes", "shard_size": 40, "workers": 1, "overwrite": True}
    separator = SEPARATOR if family(path.name.split(".", 1)[1]) == "txt" else None
    settings |= {"doc_separator": separator, **options}
    prefix = str(path.parent / "o")
    preprocess(
        PreprocessOptions(inputs=(str(path),), output_prefix=prefix, **settings),
        [].append if reported is None else reported.append,
    )
    return open_dataset(f"{prefix}_text_document")


def texts(dataset: IndexedDataset) -> list[str]:
    return [raw.decode() for raw in dataset.document_bytes(range(dataset.reader.num_documents))]


def nothing_written(folder: Path) -> bool:
    return not list(folder.glob("o_*")) and not list(folder.glob(".o*"))


@pytest.mark.parametrize(("kind", "name"), [(kind, fault) for kind in FORMATS for fault in FAULTS[family(kind)]])
def test_faulty_record_stops_is_skipped_or_is_repaired(tmp_path, kind, name):
    fault = FAULTS[family(kind)][name]
    good = [record(kind, text) for text in GOOD]
    path = write(tmp_path, kind, [*good[:3], fault.record, *good[3:]])
    begins = sum(len(r) + 1 for r in good[:3])
    place = {"jsonl": "line 4", "txt": f"byte {begins}", "parquet": "row 4"}[family(kind)]
    with pytest.raises(DataError, match=f"{place}: .*{fault.message}.*--on-error skip"):
        made(path, shard_size=1 << 20)
    assert nothing_written(tmp_path)
    skipped = made(path, on_error="skip")
    assert texts(skipped) == GOOD
    assert skipped.manifest.counts["rejected_documents"] == 1
    assert [reject["place"] for reject in skipped.manifest.rejects] == [f"{path}, {place}"]
    repaired = made(path, on_error="replace")
    expected = [] if fault.repaired is None else [fault.repaired]
    assert texts(repaired) == [*GOOD[:3], *expected, *GOOD[3:]]
    assert repaired.manifest.counts["rejected_documents"] == 1 - len(expected)


@pytest.mark.parametrize("kind", [*TEXT, "parquet"])
def test_nul_is_text_where_no_syntax_forbids_it(tmp_path, kind):
    assert texts(made(write(tmp_path, kind, [b"a\x00b", b"c"]))) == ["a\x00b", "c"]


@pytest.mark.parametrize("column", ["missing", "number", "twice"])
def test_parquet_without_one_column_of_text_is_refused(tmp_path, column):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    columns = {"missing": ([["a"]], ["body"]), "number": ([[5]], ["text"]), "twice": ([["a"], ["b"]], ["text"] * 2)}
    messages = {
        "missing": "no column 'text'",
        "number": "holds int64, not text",
        "twice": "column 'text' comes 2 times",
    }
    values, names = columns[column]
    parquet.write_table(pyarrow.Table.from_arrays([pyarrow.array(v) for v in values], names), tmp_path / "d.parquet")
    with pytest.raises(DataError, match=messages[column]):
        made(tmp_path / "d.parquet", on_error="skip")
    assert nothing_written(tmp_path)


@pytest.mark.parametrize("kind", JSON_LINES)
def test_blank_lines_are_ignored_and_counted(tmp_path, kind):
    path = write(tmp_path, kind, [record(kind, "a"), b"", b"  \t ", record(kind, "b"), b""])
    dataset = made(path)
    assert texts(dataset) == ["a", "b"] and dataset.manifest.counts["blank_lines"] == 3


@pytest.mark.parametrize("kind", [*JSON_LINES, *TEXT])
def test_byte_order_mark_is_no_text(tmp_path, kind):
    path = write(tmp_path, kind, [b"\xef\xbb\xbf" + record(kind, "a"), record(kind, "b")])
    assert texts(made(path)) == ["a", "b"]


@pytest.mark.parametrize("on_error", ["fail", "skip"])
@pytest.mark.parametrize("kind", JSON_LINES)
def test_json_array_is_refused(tmp_path, kind, on_error):
    for complete in (b'[{"text": "a"}]', b'\xef\xbb\xbf\n [\n{"text": "a"}\n]\n'):
        with pytest.raises(DataError, match=r"a JSON array; .*jq -c"):
            made(write(tmp_path, kind, [], complete), on_error=on_error)
        assert nothing_written(tmp_path)


@pytest.mark.parametrize("kind", FORMATS)
def test_empty_documents_are_dropped_and_counted_or_kept_as_megatron_does(tmp_path, kind):
    path = write(tmp_path, kind, [record(kind, text) for text in ("a", "", "b", "")])
    dataset = made(path, append_eod=True)
    assert texts(dataset) == ["a", "b"] and dataset.manifest.counts["empty_documents"] == 2
    kept = made(path, append_eod=True, keep_empty=True).reader
    # A document without a sequence, and without an end-of-document token.
    assert kept.document_boundaries.tolist() == [0, 1, 1, 2, 2] and kept.document_lengths.tolist() == [2, 0, 2, 0]


@pytest.mark.parametrize("kind", FORMATS)
def test_empty_input_is_refused(tmp_path, kind):
    with pytest.raises(DataError, match="no document with text in the input"):
        made(write(tmp_path, kind, []), on_error="skip")
    (tmp_path / f"d.{kind}").write_bytes(b"")
    with pytest.raises(DataError, match="no document with text in the input"):
        made(tmp_path / f"d.{kind}")
    assert nothing_written(tmp_path)


@pytest.mark.parametrize("kind", JSON_LINES)
def test_the_last_of_duplicate_keys_counts_and_is_reported(tmp_path, kind):
    reported: list[str] = []
    path = write(tmp_path, kind, [record(kind, "a"), b'{"text": "x", "text": "b"}'])
    dataset = made(path, reported)
    assert texts(dataset) == ["a", "b"] and dataset.manifest.counts["duplicate_keys"] == 1
    assert f"{path}, line 2: a key comes twice in one object; the last one counts" in reported


@pytest.fixture(scope="module")
def bpe(tmp_path_factory):
    tokenizer = train_bpe([*GOOD, EOD_TOKEN] * 3, 300)
    return tokenizer, str(tokenizer.save(tmp_path_factory.mktemp("bpe") / "t"))


@pytest.mark.parametrize("backend", ["hf", "gigatoken", "tiktoken"])
@pytest.mark.parametrize("kind", ["jsonl", "txt", "parquet"])
def test_literal_special_token_stays_text_and_a_document_ends_by_id(tmp_path, bpe, kind, backend):
    if backend != "hf":
        pytest.importorskip(backend)
    tokenizer, path = bpe
    text = f"a{EOD_TOKEN}b"
    dataset = made(write(tmp_path, kind, [record(kind, text)]), tokenizer_model=path, append_eod=True, backend=backend)
    ids = dataset.reader.document(0).tolist()
    assert ids.count(tokenizer.eod_id) == 1 and ids[-1] == tokenizer.eod_id
    assert texts(dataset) == [text]


@pytest.mark.parametrize("on_error", ["fail", "skip", "replace"])
@pytest.mark.parametrize("kind", [k for k in FORMATS if k.endswith((".gz", ".zst", "parquet"))])
def test_truncated_file_is_refused_by_name_and_the_complete_one_resumes_to_the_same(tmp_path, kind, on_error):
    lines = [f"{i} {'word ' * (i % 50)}" for i in range(400)]
    path = write(tmp_path, kind, [record(kind, text) for text in lines])
    complete = path.read_bytes()
    for left in (len(complete) // 2, len(complete) - 3):
        path.write_bytes(complete[:left])
        with pytest.raises(DataError, match=f"{path}: truncated or corrupt"):
            made(path, on_error=on_error, shard_size=2000)
        assert not list(tmp_path.glob("o_*")), "nothing under the final name"
    path.write_bytes(complete)
    assert texts(made(path, on_error=on_error, shard_size=2000, overwrite=False, resume=True)) == lines


@pytest.mark.parametrize("kind", FORMATS)
def test_existing_output_is_refused_without_overwrite_and_left_as_it_is(tmp_path, kind):
    path = write(tmp_path, kind, [record(kind, "a")])
    made(path)
    with pytest.raises(DataError, match="exists already; use --overwrite"):
        made(write(tmp_path, kind, [record(kind, "b")]), overwrite=False)
    assert texts(open_dataset(tmp_path / "o_text_document")) == ["a"]
    assert texts(made(path)) == ["b"]
