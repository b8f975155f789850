"""Units, workers, shard sizes, back ends: the token stream does not depend on them."""

import gzip
import json
import multiprocessing
import random

import numpy as np
import pytest
import zstandard
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megatronish.data.indexed.builder import IndexedWriter, write_index
from megatronish.data.indexed.format import IndexedReader
from megatronish.data.readers.inputs import TextSource
from megatronish.data.samples.dataset import open_dataset
from megatronish.data.tokenizers import backends
from megatronish.data.tokenizers.backends import GigatokenEncoder, NativeEncoder, TiktokenEncoder, choose_encoder
from megatronish.data.tokenizers.formats import EOD_TOKEN
from megatronish.data.tokenizers.tokenizer import load_tokenizer, train_bpe, train_unigram
from megatronish.errors import DataError
from megatronish.preprocessing import encoding
from megatronish.preprocessing.encoding import split_text
from megatronish.preprocessing.options import PreprocessOptions
from megatronish.preprocessing.preprocess import preprocess
from megatronish.preprocessing.units import Planner, StreamCutter, next_cut

PACK = {"": bytes, ".gz": gzip.compress, ".zst": zstandard.compress}
TEXT = st.text(alphabet=st.characters(exclude_categories=("Cs",)), max_size=30)
SAMPLE = [
    "def main():\n    return 2026 + 1\n",
    "Straße, naïve, 日本語, \U0001f600",
    "It's the dog's; don't say 'they'll'\r\n",
] * 30
QUICK = settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.fixture(scope="module")
def bpe_file(tmp_path_factory):
    return train_bpe(SAMPLE, 400).save(tmp_path_factory.mktemp("bpe") / "t")


def make(folder, name: str, **options) -> dict[str, bytes]:
    """The files of a data set of the inputs in `folder`, by suffix; the manifest without what lists shards."""
    (result,) = preprocess(
        PreprocessOptions(output_prefix=str(folder / name), append_eod=True, **options), lambda line: None
    )
    return {suffix: (folder / f"{name}_text_document.{suffix}").read_bytes() for suffix in ("bin", "idx")} | {
        "counts": json.dumps(result.manifest.counts).encode()
    }


@settings(QUICK, max_examples=15)
@given(
    st.lists(st.lists(TEXT, max_size=12), min_size=1, max_size=4),
    st.lists(st.tuples(st.integers(1, 400), st.sampled_from(sorted(PACK)), st.integers(1, 3)), min_size=2, max_size=3),
)
def test_any_documents_give_the_same_stream_for_any_shard_size_compression_and_workers(tmp_path_factory, files, ways):
    folder = tmp_path_factory.mktemp("any")
    texts = [text for file in files for text in file]
    if not any(texts):
        return
    found = []
    for number, (shard_size, packed, workers) in enumerate(ways):
        inputs = []
        for index, file in enumerate(files):
            path = folder / f"{number}-{index}.jsonl{packed}"
            raw = "".join(json.dumps({"text": text}, ensure_ascii=number % 2 == 0) + "\n" for text in file)
            path.write_bytes(PACK[packed](raw.encode()))
            inputs.append(str(path))
        options = {"inputs": tuple(inputs), "tokenizer_model": "bytes", "shard_size": shard_size, "workers": workers}
        found.append(make(folder, f"o{number}", **options))
        # The manifest, shards included, is the same for any number of workers.
        manifest = (folder / f"o{number}_text_document.manifest.json").read_text()
        make(folder, f"o{number}", **options | {"workers": 4 - workers, "overwrite": True})
        assert (folder / f"o{number}_text_document.manifest.json").read_text() == manifest
    assert all(other == found[0] for other in found)
    dataset = open_dataset(folder / "o0_text_document")
    assert list(dataset.document_bytes(range(dataset.reader.num_documents))) == [t.encode() for t in texts if t]


@QUICK
@given(
    st.text(alphabet="ab\n", max_size=60),
    st.sampled_from(["\n", "\n\n", "aba", "a\na"]),
    st.integers(1, 30),
    st.booleans(),
)
def test_separated_text_is_cut_at_the_same_places_whatever_the_shard_size(
    tmp_path_factory, text, separator, size, zipped
):
    """Separators may overlap themselves; cutting in the middle of a run of them must not move the others."""
    folder = tmp_path_factory.mktemp("text")
    expected = [piece for piece in text.split(separator) if piece]
    if not expected:
        return
    (folder / "d.txt.gz").write_bytes(gzip.compress(text.encode()))
    (folder / "d.txt").write_text(text)
    name = "d.txt.gz" if zipped else "d.txt"
    make(folder, "o", inputs=(str(folder / name),), tokenizer_model="bytes", doc_separator=separator, shard_size=size)
    dataset = open_dataset(folder / "o_text_document")
    assert [raw.decode() for raw in dataset.document_bytes(range(dataset.reader.num_documents))] == expected


@QUICK
@given(
    st.binary(max_size=200).map(lambda raw: bytes(b"ab\n"[b % 3] for b in raw)),
    st.sampled_from([b"\n", b"\n\n", b"aba"]),
    st.integers(1, 50),
    st.lists(st.integers(1, 40), min_size=1, max_size=30),
)
def test_streams_are_cut_where_files_are(tmp_path_factory, raw, separator, size, blocks):
    path = tmp_path_factory.mktemp("cut") / "d"
    path.write_bytes(raw)
    cuts, start = [], 0
    with open(path, "rb") as file:
        while start < len(raw):
            start = next_cut(file, (start // size + 1) * size, len(raw), separator)
            cuts.append(start)
    cutter, position, streamed = StreamCutter(separator, size), 0, []
    parts = []
    while position < len(raw):
        length = blocks[len(parts) % len(blocks)]
        parts.append(raw[position : position + length])
        position += length
    done = 0
    for block in parts:
        for part, cut in cutter.feed(block):
            done += len(part)
            if cut:
                streamed.append(done)
    assert done == len(raw)
    assert streamed == [cut for cut in cuts if cut < len(raw)] + [
        cut for cut in cuts if cut == len(raw) and cut in streamed
    ]


def test_small_files_share_a_unit_and_large_ones_are_cut(tmp_path):
    for index, size in enumerate((10, 10, 10, 95, 10)):
        (tmp_path / f"{index}.txt").write_text("x" * (size - 1) + "\n" if size < 50 else "word\n" * (size // 5))
    sources = [TextSource(str(p), "text", size=p.stat().st_size) for p in sorted(tmp_path.glob("*.txt"))]
    units = list(Planner(sources, ("text",), b"\n", 30, tmp_path).units())
    assert [[(p.source, p.start, p.end) for p in unit.pieces] for unit in units] == [
        [(0, 0, 10), (1, 0, 10), (2, 0, 10)],
        [(3, 0, 30)],
        [(3, 30, 60)],
        [(3, 60, 90)],
        [(3, 90, 95), (4, 0, 10)],
    ]
    assert list(Planner(sources, ("text",), b"\n", 30, tmp_path).units(3)) == units[3:]


@QUICK
@given(TEXT, st.integers(1, 20))
def test_parts_of_a_long_text_make_it_up_and_are_short(text, limit):
    parts = list(split_text(text, limit))
    assert "".join(parts) == text
    assert all(len(part.encode()) <= max(limit, 4) for part in parts)


def test_long_documents_are_cut_at_lines_and_stay_one_document(tmp_path, bpe_file):
    text = "".join(f"line {i} of it, don't worry\n" for i in range(300))
    (tmp_path / "d.jsonl").write_text(json.dumps({"text": text}) + "\n" + json.dumps({"text": "b"}) + "\n")
    options = {"inputs": (str(tmp_path / "d.jsonl"),), "tokenizer_model": str(bpe_file)}
    complete = make(tmp_path, "complete", **options)
    cut = make(tmp_path, "cut", max_doc_bytes=200, **options)
    assert (cut["bin"], cut["idx"]) == (complete["bin"], complete["idx"])
    assert json.loads(cut["counts"])["long_documents"] == 1


@pytest.fixture(scope="module", params=["bpe", "unigram"])
def byte_level(request):
    return (train_bpe if request.param == "bpe" else train_unigram)(SAMPLE, 400)


@QUICK
@given(text=TEXT)
def test_trained_tokenizers_lose_nothing(byte_level, text):
    assert byte_level.lossless and byte_level.eod_id == byte_level.vocab_size - 1
    assert byte_level.decode_bytes(byte_level.encode(text)) == text.encode()


@QUICK
@given(
    texts=st.lists(
        TEXT | st.sampled_from([EOD_TOKEN, f"a{EOD_TOKEN}b", "don't DON'T ǅ ٣٤ \u2028", *SAMPLE[:3]]), max_size=6
    )
)
@pytest.mark.parametrize("fast", [GigatokenEncoder, TiktokenEncoder])
def test_fast_back_ends_give_the_ids_of_tokenizers(bpe_file, fast, texts):
    pytest.importorskip(fast.name)
    tokenizer = load_tokenizer(bpe_file)
    encoder = fast(tokenizer)
    for ours, reference in zip(encoder.encode(texts), tokenizer.encode_batch(texts), strict=True):
        assert ours.tolist() == reference.tolist()


class _Wrong:
    """A library that gets texts with one character wrong, as gigatoken does with letters that are newer than it."""

    def __init__(self, raw, character: str) -> None:
        self.raw, self.character, self.asked = raw, character, 0

    def encode(self, text):
        self.asked += 1
        held = text if isinstance(text, str) else text.decode()
        ids = self.raw.encode(text)
        return ids[::-1].copy() if self.character in held else ids


def test_character_that_gigatoken_gets_wrong_is_encoded_by_tokenizers(bpe_file):
    pytest.importorskip("gigatoken")
    tokenizer = load_tokenizer(bpe_file)
    encoder = GigatokenEncoder(tokenizer)
    encoder._raw = _Wrong(encoder._raw, "ß")
    texts = ["Straße", "naïve", "plain", "ß again"]
    for _ in range(2):
        found = encoder.encode(texts)
        assert [ids.tolist() for ids in found] == [ids.tolist() for ids in tokenizer.encode_batch(texts)]
    assert encoder._differing == {"ß"}
    assert encoder._raw.asked == 2 + 2 * 2, "two characters probed once each, then only texts without the wrong one"
    # New ones of one text are probed together, the wrong one among them still found, and nothing else.
    encoder._raw = _Wrong(encoder._raw.raw, "é")
    text = "".join(map(chr, range(0xE0, 0x160)))
    assert encoder.encode([text])[0].tolist() == tokenizer.encode(text).tolist()
    assert encoder._differing == {"ß", "é"}


def test_what_one_worker_has_compared_the_others_need_not(bpe_file):
    pytest.importorskip("gigatoken")
    encoder = GigatokenEncoder(load_tokenizer(bpe_file))
    encoder._raw = _Wrong(encoder._raw, "ß")
    worker = multiprocessing.get_context("fork").Process(target=encoder.encode, args=(["naïve", "Straße"],))
    worker.start()
    worker.join()
    assert worker.exitcode == 0 and encoder._raw.asked == 0
    encoder.encode(["naïve"])
    assert encoder._raw.asked == 1, "the text, but no comparison of its letter"
    encoder.encode(["Straße"])
    assert encoder._differing == {"ß"}, "what differs each finds for itself"


@pytest.mark.parametrize("append_eod", [False, True])
def test_unknown_tokens_are_counted_without_the_ends_of_documents(tmp_path, append_eod):
    """A vocabulary whose unknown token also ends documents: only those that text became are lost text."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    raw = Tokenizer(models.WordLevel({"a": 0, "b": 1, "<unk>": 2}, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.Whitespace()
    raw.save(str(tmp_path / "tokenizer.json"))
    texts = ["a b a", "", "a c c b", "c"]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    options = PreprocessOptions(
        inputs=(str(tmp_path / "in.jsonl"),),
        output_prefix=str(tmp_path / "out"),
        tokenizer_model=str(tmp_path / "tokenizer.json"),
        append_eod=append_eod,
        eod_token="<unk>",
    )
    (result,) = preprocess(options, lambda line: None)
    assert result.manifest.counts["unknown_tokens"] == 3
    assert result.manifest.counts["tokens"] == (11 if append_eod else 8)


def test_gigatoken_starts_afresh_when_it_has_grown(bpe_file, monkeypatch):
    pytest.importorskip("gigatoken")
    memory = iter([100, 100 + backends.CACHE_BYTES - 1, 101 + backends.CACHE_BYTES, 50, 60, 60])
    monkeypatch.setattr(backends, "_resident_bytes", lambda: next(memory))
    monkeypatch.setattr(backends, "MEMORY_CHECK_BYTES", 1)
    tokenizer = load_tokenizer(bpe_file)
    encoder = GigatokenEncoder(tokenizer)
    first = encoder._raw
    encoder.encode(["some text"])
    encoder.encode(["some text"])
    assert encoder._raw is first
    assert encoder.encode(["some text"])[0].tolist() == tokenizer.encode("some text").tolist()
    assert encoder._raw is not first


def test_choice_of_a_back_end(bpe_file, monkeypatch):
    pytest.importorskip("gigatoken")
    tokenizer, reported = load_tokenizer(bpe_file), []
    assert choose_encoder("auto", tokenizer, SAMPLE[:3], reported.append).name == "gigatoken"
    assert choose_encoder("hf", tokenizer, SAMPLE[:3], reported.append).name == "hf" and reported == []
    with pytest.raises(DataError, match="which it does not read"):
        choose_encoder("sentencepiece", tokenizer, [], reported.append)
    monkeypatch.setattr(GigatokenEncoder, "agrees", lambda self, text: "2026" not in text)
    assert isinstance(choose_encoder("auto", tokenizer, SAMPLE[:3], reported.append), NativeEncoder)
    assert len(reported) == 1 and "its ids differ from those of hf for the text 'def main" in reported[0]
    with pytest.raises(DataError, match="--backend gigatoken: its ids differ"):
        choose_encoder("gigatoken", tokenizer, SAMPLE[:3], reported.append)
    monkeypatch.setitem(__import__("sys").modules, "gigatoken", None)
    assert choose_encoder("auto", tokenizer, SAMPLE[:3], reported.append).name == "hf"
    assert "it is not installed" in reported[1]


def test_back_end_found_wrong_on_the_way_is_replaced_for_that_unit(tmp_path, bpe_file, monkeypatch):
    """The sample at the start is right, a later unit is not: its tokens are still right, and the difference is reported."""
    pytest.importorskip("gigatoken")
    texts = [f"text {i} of some words" for i in range(60)] + ["POISON"] + [f"more {i}" for i in range(60)]
    (tmp_path / "d.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    options = {"inputs": (str(tmp_path / "d.jsonl"),), "tokenizer_model": str(bpe_file), "shard_size": 500}
    expected = make(tmp_path, "hf", backend="hf", **options)
    real = GigatokenEncoder.encode

    def wrong(self, given):
        return [
            ids[::-1].copy() if "POISON" in text else ids for text, ids in zip(given, real(self, given), strict=True)
        ]

    monkeypatch.setattr(GigatokenEncoder, "encode", wrong)
    monkeypatch.setattr(encoding, "CHECK_EVERY_BYTES", 1)
    monkeypatch.setattr(GigatokenEncoder, "batch_bytes", 1)
    monkeypatch.setattr(backends, "MEMORY_CHECK_BYTES", 1 << 30)
    monkeypatch.setattr("megatronish.preprocessing.preprocess.SAMPLE_CHARACTERS", 300)
    reported: list[str] = []
    (result,) = preprocess(
        PreprocessOptions(output_prefix=str(tmp_path / "g"), append_eod=True, **options), reported.append
    )
    assert result.manifest.encoder == "gigatoken"
    assert (tmp_path / "g_text_document.bin").read_bytes() == expected["bin"]
    assert sum("the fast back end differs" in line for line in reported) == 1


def test_sentencepiece_by_gigatoken(tmp_path):
    """Where the model is one that gigatoken reads; control pieces in a text stay text."""
    pytest.importorskip("gigatoken")
    import io

    import sentencepiece

    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.Train(
        sentence_iterator=iter(line for text in SAMPLE for line in text.splitlines()), model_writer=model, vocab_size=380,
        model_type="bpe", byte_fallback=True, character_coverage=1.0, normalization_rule_name="identity",
        remove_extra_whitespaces=False, minloglevel=2,
    )  # fmt: skip
    (tmp_path / "m.model").write_bytes(model.getvalue())
    tokenizer = load_tokenizer(tmp_path / "m.model")
    encoder = GigatokenEncoder(tokenizer)
    texts = [*SAMPLE[:3], "</s> <s> a  b", " lead", ""]
    assert [ids.tolist() for ids in encoder.encode(texts)] == [ids.tolist() for ids in tokenizer.encode_batch(texts)]


def test_index_of_lengths_is_the_one_the_builder_writes(tmp_path):
    lengths = random.Random(0).choices(range(5), k=1000)
    writer = IndexedWriter(tmp_path / "a", "<u2")
    for length in lengths:
        writer.add_document([7] * length)
    writer.finalize()
    parts = np.array_split(np.array(lengths, dtype="<i4"), 7)
    size, digest = write_index(tmp_path / "b.idx", "<u2", lambda: iter(parts))
    assert (tmp_path / "b.idx").read_bytes() == (tmp_path / "a.idx").read_bytes()
    assert (size, digest) == ((tmp_path / "a.idx").stat().st_size, writer.xxh3["idx"])
    (tmp_path / "b.bin").write_bytes((tmp_path / "a.bin").read_bytes())
    assert IndexedReader(tmp_path / "b").document_lengths.tolist() == lengths


@pytest.mark.parametrize(("dtype", "bytes_each"), [("auto", 2), ("int32", 4), ("int64", 8)])
def test_dtype(tmp_path, dtype, bytes_each):
    (tmp_path / "d.jsonl").write_text('{"text": "abc"}\n')
    options = {"inputs": (str(tmp_path / "d.jsonl"),), "tokenizer_model": "bytes"}
    assert len(make(tmp_path, "o", dtype=dtype, **options)["bin"]) == 4 * bytes_each
    with pytest.raises(DataError, match=r"--dtype uint8 holds ids up to 255; the vocabulary has 257"):
        make(tmp_path, "small", dtype="uint8", **options)
