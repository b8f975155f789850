"""Reading documents: what comes through unchanged, and one clear message for each kind of bad input."""

import gzip
import json
from pathlib import Path

import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from megatronish.data.readers import records
from megatronish.data.readers.documents import DocumentReader
from megatronish.data.readers.inputs import file_source, find_inputs
from megatronish.data.readers.records import READ_BYTES
from megatronish.errors import DataError

PACK = {"": bytes, ".gz": gzip.compress, ".zst": zstandard.compress}
TEXT = st.text(alphabet=st.characters(exclude_categories=("Cs",)), max_size=40)


def texts(reader: DocumentReader) -> list[str]:
    return [document.texts[0] for document in reader]


@settings(max_examples=60, deadline=None)
@given(st.lists(TEXT, max_size=8), st.sampled_from(sorted(PACK)), st.booleans())
def test_json_lines_come_back(tmp_path_factory, documents, packed, ascii_only):
    path = tmp_path_factory.mktemp("jsonl") / f"d.jsonl{packed}"
    raw = "".join(json.dumps({"text": text}, ensure_ascii=ascii_only) + "\n" for text in documents).encode("utf-8")
    path.write_bytes(PACK[packed](raw))
    reader = DocumentReader([file_source(path)])
    assert texts(reader) == documents
    assert texts(reader) == documents, "a reader can be read again"
    assert reader.bytes_read == path.stat().st_size == reader.total_bytes


@settings(max_examples=60, deadline=None)
@given(TEXT, st.sampled_from(sorted(PACK)))
def test_text_file_is_one_document_unchanged(tmp_path_factory, text, packed):
    raw = text.removeprefix("\ufeff").encode("utf-8")
    path = tmp_path_factory.mktemp("text") / f"d.txt{packed}"
    path.write_bytes(PACK[packed](raw))
    assert [t.encode("utf-8") for t in texts(DocumentReader([file_source(path)]))] == [
        raw.removeprefix(b"\xef\xbb\xbf")
    ]


@settings(max_examples=60, deadline=None)
@given(st.lists(st.text(alphabet="ab\n", max_size=6), min_size=1, max_size=8))
def test_separator_cuts_as_str_split_does(tmp_path_factory, pieces):
    text = "\n\n".join(pieces)
    path = tmp_path_factory.mktemp("text") / "d.txt"
    path.write_bytes(text.encode())
    # As in lines, nothing after the last separator is no document.
    expected = text.split("\n\n")
    assert texts(DocumentReader([file_source(path)], separator="\n\n")) == (expected if expected[-1] else expected[:-1])


def test_separator_across_a_read_boundary(tmp_path):
    path = tmp_path / "d.txt"
    path.write_bytes(b"a" * (READ_BYTES - 1) + b"<>" + b"b" * READ_BYTES)
    assert [len(text) for text in texts(DocumentReader([file_source(path)], separator="<>"))] == [
        READ_BYTES - 1,
        READ_BYTES,
    ]


def test_byte_order_mark_blank_lines_and_missing_last_newline(tmp_path):
    path = tmp_path / "d.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"text": "a"}\r\n\n   \n{"text": "b"}')
    reader = DocumentReader([file_source(path)])
    assert texts(reader) == ["a", "b"]
    assert reader.counts.blank_lines == 2
    (tmp_path / "d.txt").write_bytes(b"\xef\xbb\xbfa\r\n")
    assert texts(DocumentReader([file_source(tmp_path / "d.txt")])) == ["a\r\n"]


def test_several_keys(tmp_path):
    path = tmp_path / "d.jsonl"
    path.write_text('{"title": "t", "body": "b", "more": 1}\n')
    assert [document.texts for document in DocumentReader([file_source(path)], keys=("body", "title"))] == [("b", "t")]


GOOD = b'{"text": "good"}\n'
FAULTS = {
    "broken JSON": (b'{"text": "a"\n', "line 2: not JSON"),
    "raw NUL": (b'{"text": "a\x00b"}\n', "line 2: not JSON: Invalid control character"),
    "huge number": (b'{"text": ' + b"1" * 5000 + b"}\n", "line 2: not JSON"),
    "deep nesting": (b"[" * 100_000 + b"\n", "line 2: (JSON nested too deeply|not JSON)"),
    "missing key": (b'{"body": "a", "id": 1}\n', r"line 2: no key 'text'; keys are \['body', 'id'\]"),
    "null": (b'{"text": null}\n', "line 2: the value of 'text' is null, not a string"),
    "number": (b'{"text": 5}\n', "line 2: the value of 'text' is 5, not a string"),
    "not an object": (b'"text"\n', "line 2: a JSON object is needed, found str"),
    "lone surrogate": (b'{"text": "ab\\ud800"}\n', "line 2: the value of 'text' has a lone surrogate at character 2"),
    "not UTF-8": (b'{"text": "\xff"}\n', r"line 2: not UTF-8 at byte 10 \(0xff\)"),
}


@pytest.mark.parametrize("packed", sorted(PACK))
@pytest.mark.parametrize("fault", FAULTS)
def test_faulty_line_is_named_or_skipped_and_counted(tmp_path, fault, packed):
    line, message = FAULTS[fault]
    path = tmp_path / f"d.jsonl{packed}"
    path.write_bytes(PACK[packed](GOOD + line + GOOD))
    with pytest.raises(DataError, match=message) as caught:
        texts(DocumentReader([file_source(path)]))
    assert str(path) in str(caught.value) and "--on-error skip" in str(caught.value)
    reader = DocumentReader([file_source(path)], on_error="skip")
    assert texts(reader) == ["good", "good"]
    assert reader.counts.rejected == 1
    assert reader.rejects[0]["place"] == f"{path}, line 2"


REPAIRED = {"raw NUL": "a\x00b", "lone surrogate": "ab\ufffd", "not UTF-8": "\ufffd"}


@pytest.mark.parametrize("fault", FAULTS)
def test_replace_repairs_what_is_text_and_skips_the_rest(tmp_path, fault):
    path = tmp_path / "d.jsonl"
    path.write_bytes(GOOD + FAULTS[fault][0] + GOOD)
    reader = DocumentReader([file_source(path)], on_error="replace")
    repaired = [REPAIRED[fault]] if fault in REPAIRED else []
    assert texts(reader) == ["good", *repaired, "good"]
    assert reader.counts.rejected == 1 - len(repaired)
    # A raw control character needs no replacement: it is kept.
    assert reader.counts.replaced == (fault in ("lone surrogate", "not UTF-8"))


def test_key_that_comes_twice_counts_last_and_is_counted(tmp_path):
    path = tmp_path / "d.jsonl"
    path.write_text('{"text": "first", "text": "last"}\n{"type": "text", "text": "t", "in": {"text": "x"}}\n')
    reader = DocumentReader([file_source(path)])
    assert texts(reader) == ["last", "t"]
    assert reader.counts.duplicate_keys == 1, "the same word as a value, or as a key further in, is no duplicate"


def test_nan_is_accepted_as_python_does(tmp_path):
    path = tmp_path / "d.jsonl"
    path.write_text('{"text": "a", "score": NaN}\n')
    assert texts(DocumentReader([file_source(path)])) == ["a"]


@pytest.mark.parametrize("name", ["d.jsonl", "d.txt"])
def test_record_that_is_too_long_is_a_fault_and_is_not_kept_in_memory(tmp_path, name, monkeypatch):
    monkeypatch.setattr(records, "MAX_RECORD_BYTES", 100)
    monkeypatch.setattr(records, "READ_BYTES", 64)
    path = tmp_path / name
    long = b"x" * 5000
    path.write_bytes(GOOD + (b'{"text": "%s"}\n' % long if name == "d.jsonl" else long + b"\n") + GOOD)
    reader = DocumentReader([file_source(path)], separator="\n", on_error="skip")
    good = "good" if name == "d.jsonl" else GOOD.decode().strip()
    assert texts(reader) == [good, good]
    assert reader.counts.rejected == 1 and "longer than" in reader.rejects[0]["reason"]


def test_json_array_is_refused_with_the_way_to_convert_it(tmp_path):
    path = tmp_path / "d.json"
    path.write_text('[{"text": "a"}]')
    with pytest.raises(DataError, match=r"JSON array.*jq -c"):
        texts(DocumentReader([file_source(path)], on_error="skip"))


def test_text_that_is_not_utf8_is_named_by_byte(tmp_path):
    path = tmp_path / "d.txt"
    path.write_bytes(b"good;bad\xff;good")
    with pytest.raises(DataError, match=r"byte 5: not UTF-8 at byte 3 \(0xff\)"):
        texts(DocumentReader([file_source(path)], separator=";"))
    assert texts(DocumentReader([file_source(path)], separator=";", on_error="skip")) == ["good", "good"]


@pytest.mark.parametrize("on_error", ["fail", "skip", "replace"])
@pytest.mark.parametrize("name", ["d.jsonl.gz", "d.txt.gz", "d.jsonl.zst", "d.txt.zst"])
def test_truncated_or_corrupt_file_is_never_taken_for_the_end(tmp_path, name, on_error):
    path = tmp_path / name
    raw = b"".join(b'{"text": "%d"}\n' % i for i in range(5000))
    kind = path.suffix
    # A checksum in zstd is an option, in gzip a part of the format.
    complete = gzip.compress(raw) if kind == ".gz" else zstandard.ZstdCompressor(write_checksum=True).compress(raw)
    middle = len(complete) // 2
    flipped = complete[:middle] + bytes([complete[middle] ^ 255]) + complete[middle + 1 :]
    bad_block = complete[:10] + b"\xff" * 40 + complete[50:]
    for damaged in (complete[:middle], complete[:-4], flipped, bad_block, b"not packed", complete + complete[:middle]):
        path.write_bytes(damaged)
        with pytest.raises(DataError, match="truncated or corrupt (gzip|zstd)") as caught:
            texts(DocumentReader([file_source(path)], on_error=on_error))
        assert str(path) in str(caught.value)
    path.write_bytes(complete + complete)
    assert "".join(texts(DocumentReader([file_source(path)], on_error=on_error))).count("4999") == 2, (
        "members follow each other"
    )


def test_globs_are_sorted_and_files_taken_once(tmp_path):
    (tmp_path / "sub").mkdir()
    for name in ("b.txt", "a.txt", "sub/c.txt", "x[1].txt"):
        (tmp_path / name).write_text("x")
    found = find_inputs([f"{tmp_path}/b.txt", f"{tmp_path}/**/*.txt", f"{tmp_path}/x[1].txt"])
    assert [Path(source.name).name for source in found] == ["b.txt", "a.txt", "c.txt", "x[1].txt"]


def test_inputs_that_cannot_be_used(tmp_path):
    (tmp_path / "d.xz").write_bytes(b"x")
    for pattern, message in [
        (f"{tmp_path}/none.txt", "no such file: .*none.txt"),
        (f"{tmp_path}/*.none", "no file matches"),
        (str(tmp_path), r"is a folder; give a pattern"),
        (f"{tmp_path}/d.xz", r"\.xz files are not read"),
    ]:
        with pytest.raises(DataError, match=message):
            find_inputs([pattern])


def test_two_keys_of_a_text_file_are_refused(tmp_path):
    (tmp_path / "d.txt").write_text("x")
    with pytest.raises(DataError, match="not JSON lines"):
        DocumentReader([file_source(tmp_path / "d.txt")], keys=("a", "b"))
