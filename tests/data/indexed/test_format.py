"""The indexed data set: round trips, the file layout byte by byte, and refusal of damaged files."""

import pickle
import struct
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatronish.data.indexed.builder import IndexedWriter
from megatronish.data.indexed.format import IndexedReader, best_dtype
from megatronish.errors import DataError

LIMITS = {"<u2": (0, 65535), "<i4": (-(2**31), 2**31 - 1), "u1": (0, 255), "<i8": (-(2**63), 2**63 - 1)}


def write(prefix: Path, documents: list[list[int]], dtype: str = "<u2") -> None:
    writer = IndexedWriter(prefix, dtype)
    for document in documents:
        writer.add_document(document)
    writer.finalize()


@st.composite
def typed_documents(draw):
    dtype = draw(st.sampled_from(sorted(LIMITS)))
    low, high = LIMITS[dtype]
    sequence = st.lists(st.integers(low, high), max_size=12)
    return dtype, draw(st.lists(st.lists(sequence, max_size=3), max_size=12))


@settings(max_examples=80, deadline=None)
@given(typed_documents())
def test_documents_of_any_number_of_sequences_come_back(tmp_path_factory, drawn):
    dtype, documents = drawn
    prefix = tmp_path_factory.mktemp("indexed") / "d"
    writer = IndexedWriter(prefix, dtype)
    for sequences in documents:
        for sequence in sequences:
            writer.add_sequence(np.array(sequence, dtype=np.int64))
        writer.end_document()
    writer.finalize()
    reader = IndexedReader(prefix)
    assert reader.dtype == np.dtype(dtype)
    assert reader.num_documents == len(documents)
    stored = [s for sequences in documents for s in sequences if s]
    assert [reader.sequence(i).tolist() for i in range(len(reader.sequence_lengths))] == stored
    for number, sequences in enumerate(documents):
        assert reader.document(number).tolist() == [token for s in sequences for token in s]
    assert reader.num_tokens == sum(map(len, stored))
    assert reader.document_lengths.tolist() == [sum(map(len, sequences)) for sequences in documents]


def test_bytes_are_megatrons(tmp_path):
    """Parsed by hand from the published layout; the second document is empty, so it has no sequence."""
    write(tmp_path / "d", [[1, 2, 65535], [], [7]])
    index = (tmp_path / "d.idx").read_bytes()
    assert index[:9] == b"MMIDIDX\x00\x00"
    assert struct.unpack_from("<QBQQ", index, 9) == (1, 8, 2, 4)
    assert struct.unpack_from("<2i", index, 34) == (3, 1)
    assert struct.unpack_from("<2q", index, 42) == (0, 6)
    assert struct.unpack_from("<4q", index, 58) == (0, 1, 1, 2)
    assert len(index) == 58 + 32
    assert (tmp_path / "d.bin").read_bytes() == bytes([1, 0, 2, 0, 255, 255, 7, 0])


@pytest.mark.parametrize(("dtype", "code"), [("u1", 1), ("i1", 2), ("<i2", 3), ("<i4", 4), ("<i8", 5), ("<u2", 8)])
def test_dtype_codes(tmp_path, dtype, code):
    write(tmp_path / "d", [[1, 2]], dtype)
    assert (tmp_path / "d.idx").read_bytes()[17] == code
    assert IndexedReader(tmp_path / "d").document(0).tolist() == [1, 2]


def test_dtype_follows_megatrons_threshold():
    assert best_dtype(65_499) == np.dtype("<u2")
    assert best_dtype(65_500) == np.dtype("<i4")


def test_writer_reports_hashes_and_sizes_of_its_files(tmp_path):
    import xxhash

    writer = IndexedWriter(tmp_path / "d", "<i4")
    writer.add_document([1, 70_000])
    writer.finalize()
    for suffix in ("bin", "idx"):
        raw = (tmp_path / f"d.{suffix}").read_bytes()
        assert writer.sizes[suffix] == len(raw)
        assert writer.xxh3[suffix] == xxhash.xxh3_128_hexdigest(raw)


def test_tokens_outside_the_dtype_are_refused_not_wrapped(tmp_path):
    writer = IndexedWriter(tmp_path / "d", "<u2")
    with pytest.raises(DataError, match="65536"):
        writer.add_document([65536])
    with pytest.raises(DataError, match="-1"):
        writer.add_document([-1])
    writer.close()


def test_sequence_of_two_billion_tokens_is_refused_at_once(tmp_path):
    writer = IndexedWriter(tmp_path / "d", "u1")
    huge = np.lib.stride_tricks.as_strided(np.zeros(1, dtype=np.uint8), shape=(2**31,), strides=(0,))
    with pytest.raises(DataError, match="2,147,483,648 tokens"):
        writer.add_sequence(huge)
    writer.close()
    assert (tmp_path / "d.bin").stat().st_size == 0


def test_reader_is_pickled_as_a_path(tmp_path):
    write(tmp_path / "d", [list(range(10_000))])
    raw = pickle.dumps(IndexedReader(tmp_path / "d"))
    assert len(raw) < 1000
    assert pickle.loads(raw).document(0).tolist() == list(range(10_000))


def test_identity_depends_on_the_documents_and_not_on_the_place(tmp_path):
    write(tmp_path / "a", [[1, 2], [3]])
    write(tmp_path / "b", [[1, 2], [3]])
    write(tmp_path / "c", [[1], [2, 3]])
    identities = [IndexedReader(tmp_path / name).identity for name in "abc"]
    assert identities[0] == identities[1] != identities[2]


def damage(path: Path, offset: int, raw: bytes) -> None:
    content = bytearray(path.read_bytes())
    content[offset : offset + len(raw)] = raw
    path.write_bytes(bytes(content))


@pytest.mark.parametrize(
    ("offset", "raw", "message"),
    [
        (0, b"XX", "not a Megatron index"),
        (9, struct.pack("<Q", 2), "index version 2"),
        (17, b"\x06", "dtype code 6"),
        (17, b"\x63", "dtype code 99"),
        (18, struct.pack("<Q", 3), "truncated or corrupt"),
        (34, struct.pack("<i", -3), "negative length"),
        (34, struct.pack("<i", 2), "sequences must follow"),
        (42, struct.pack("<q", 2), "sequences must follow"),
        (58, struct.pack("<q", 1), "document boundaries"),
        (66, struct.pack("<q", 5), "document boundaries"),
        (82, struct.pack("<q", 1), "document boundaries"),
    ],
)
def test_damaged_index_is_refused_by_name(tmp_path, offset, raw, message):
    write(tmp_path / "d", [[1, 2, 3], [], [4]])
    damage(tmp_path / "d.idx", offset, raw)
    with pytest.raises(DataError, match=message) as caught:
        IndexedReader(tmp_path / "d")
    assert "d.idx" in str(caught.value)


@pytest.mark.parametrize("suffix", ["bin", "idx"])
@pytest.mark.parametrize("change", [-1, 1])
def test_file_of_the_wrong_size_is_refused_by_name(tmp_path, suffix, change):
    write(tmp_path / "d", [[1, 2, 3]])
    path = tmp_path / f"d.{suffix}"
    path.write_bytes((path.read_bytes() + b"\x00")[: path.stat().st_size + change])
    with pytest.raises(DataError, match=rf"d\.{suffix}.*truncated"):
        IndexedReader(tmp_path / "d")


@pytest.mark.parametrize("suffix", ["bin", "idx"])
def test_missing_file_is_named(tmp_path, suffix):
    write(tmp_path / "d", [[1]])
    (tmp_path / f"d.{suffix}").unlink()
    with pytest.raises(DataError, match=rf"d\.{suffix}: no such file"):
        IndexedReader(tmp_path / "d")


def test_short_index_is_refused(tmp_path):
    (tmp_path / "d.idx").write_bytes(b"MMIDIDX\x00\x00")
    with pytest.raises(DataError, match="not a Megatron index"):
        IndexedReader(tmp_path / "d")


def test_numbers_outside_are_index_errors(tmp_path):
    write(tmp_path / "d", [[1]])
    reader = IndexedReader(tmp_path / "d")
    for number in (-1, 1):
        with pytest.raises(IndexError, match="1 documents"):
            reader.document(number)
        with pytest.raises(IndexError, match="1 sequences"):
            reader.sequence(number)


def test_sequences_can_be_taken_for_documents(tmp_path):
    writer = IndexedWriter(tmp_path / "d", "<u2")
    for sequences in ([[1, 2], [3]], [], [[4, 5, 6]]):
        for sequence in sequences:
            writer.add_sequence(sequence)
        writer.end_document()
    writer.finalize()
    reader = IndexedReader(tmp_path / "d", "sequence")
    assert [reader.document(i).tolist() for i in range(reader.num_documents)] == [[1, 2], [3], [4, 5, 6]]
    assert reader.identity != IndexedReader(tmp_path / "d").identity
    copy = pickle.loads(pickle.dumps(reader))
    assert copy.unit == "sequence" and copy.document_starts.tolist() == [0, 2, 3, 6]


def test_multimodal_index_is_refused_as_what_it_is(tmp_path):
    write(tmp_path / "d", [[1, 2, 3], [4]])
    with open(tmp_path / "d.idx", "ab") as file:
        file.write(b"\x00\x01")
    with pytest.raises(DataError, match="multimodal"):
        IndexedReader(tmp_path / "d")


def test_a_fault_far_in_the_offsets_is_found(tmp_path):
    """Offsets are compared in pieces; the fault is in the second."""
    from megatronish.data.indexed.format import CHECKED_AT_ONCE

    count = CHECKED_AT_ONCE + 10
    write(tmp_path / "d", [[1]] * count)
    damage(tmp_path / "d.idx", 34 + 4 * count + 8 * (count - 3), struct.pack("<q", 7))
    with pytest.raises(DataError, match=f"sequence {count - 3} is at byte 7 of the .bin, expected {2 * (count - 3)}"):
        IndexedReader(tmp_path / "d")
