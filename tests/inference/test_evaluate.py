"""Bits per byte equal a direct computation, each token scored once; gzip and xz are those of zlib and lzma."""

import dataclasses
import json
import lzma
import math
import random
import shutil
import zlib

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatronish.checkpoint.manifest import write_manifest
from megatronish.data.samples.splits import split_documents
from megatronish.errors import UserError
from megatronish.inference.evaluate import (
    MAX_LOGITS,
    batched_by_length,
    gzip_size,
    held_out_streams,
    score_streams,
    sliding_windows,
    xz_size,
)
from megatronish.inference.held_out import Evaluation, evaluate_model
from megatronish.inference.load import load_for_inference
from tests.inference.conftest import save_checkpoint
from tests.runs import WORDS, make_dataset


def evaluate_run(checkpoint, data=None, stride=None, max_tokens=None):
    loaded = load_for_inference(checkpoint)
    return evaluate_model(loaded, data, stride, max_tokens), loaded.info


@settings(deadline=None)  # a busy machine
@given(st.integers(2, 70), st.integers(1, 12), st.data())
def test_windows_score_each_token_once_with_the_context_promised(length, seq_length, data):
    stride = data.draw(st.integers(1, seq_length))
    stream = np.arange(1000, 1000 + length)  # a token is its index
    scored = []
    for window in sliding_windows(stream, seq_length, stride):
        assert len(window.tokens) == len(window.labels) == min(seq_length, length - 1)
        assert np.array_equal(window.tokens, np.arange(window.tokens[0], window.tokens[0] + len(window.tokens)))
        for place in np.flatnonzero(window.labels != -100):
            assert window.labels[place] == window.tokens[place] + 1
            context, before = place + 1, window.labels[place] - 1000
            assert context >= min(seq_length - stride + 1, before)
            scored.append(int(window.labels[place]))
    assert scored == stream[1:].tolist()


@torch.no_grad()
def direct_nats(model, stream, seq_length, stride):
    """-ln p of each token but the first in float64, with one forward pass per token on its context."""
    total = 0.0
    for place in range(1, len(stream)):
        end = seq_length  # of the window that scores this place
        while end < place:
            end += stride
        end = min(end, len(stream) - 1)
        context = torch.from_numpy(stream[max(0, end - seq_length) : place])[None]
        total -= model(context)[0, -1].double().log_softmax(-1)[stream[place]].item()
    return total


@pytest.mark.parametrize("stride", [1, 7, 16, 32])
def test_score_equals_a_direct_computation(model, stride, monkeypatch):
    draw = np.random.default_rng(0)
    streams = [draw.integers(0, 257, size) for size in (90, 20, 33, 2)]
    expected = sum(direct_nats(model, stream, 32, stride) for stream in streams)
    score = score_streams(model, streams, stride, first_is_given=True, vocab_size=257)
    assert score.tokens == 89 + 19 + 32 + 1
    # fp32 log-probabilities of about 10 nats, each to a few units of 2^-23 relative; the sum to less than 1e-5.
    assert score.nats == pytest.approx(expected, rel=1e-5)
    assert score.perplexity == pytest.approx(math.exp(expected / 141), rel=1e-3)
    monkeypatch.setitem(MAX_LOGITS, "cpu", 3 * 32 * 257)  # three windows a batch
    calls: list[int] = []
    again = score_streams(model, streams, stride, first_is_given=True, vocab_size=257, progress=calls.append)
    assert again.nats == pytest.approx(score.nats, rel=1e-6) and sum(calls) == 141 and len(calls) > 3
    first = score_streams(model, streams, stride, first_is_given=False, vocab_size=257)
    assert first.tokens == 145 and first.nats == pytest.approx(score.nats + 4 * math.log(257), rel=1e-6)


def test_batches_keep_the_order_and_mix_no_lengths(model):
    windows = [w for n in (9, 9, 5, 9, 9, 9) for w in sliding_windows(np.arange(n), 8, 4)]
    batches = list(batched_by_length(windows, 2))
    assert [len(batch) for batch in batches] == [2, 1, 2, 1]
    assert [w for batch in batches for w in batch] == windows


def test_streams(run):
    reader = run.dataset.reader
    (joined,) = held_out_streams(reader, np.array([2, 5]), 256, document_mask=False)
    assert joined.tolist() == [256, *reader.document(2).tolist(), *reader.document(5).tolist()]
    apart = list(held_out_streams(reader, np.array([2, 5]), None, document_mask=True))
    assert [stream.tolist() for stream in apart] == [reader.document(2).tolist(), reader.document(5).tolist()]
    begun = list(held_out_streams(reader, np.array([2, 5]), 7, document_mask=True))
    assert [stream.tolist() for stream in begun] == [[7, *stream.tolist()] for stream in apart]
    assert list(held_out_streams(reader, np.array([], dtype=np.int64), 256, document_mask=False)) == []


def test_run_equals_a_direct_computation(run, model):
    result, info = evaluate_run(run.folder)
    held_out = split_documents(60, 0.1).validation
    tokens = np.concatenate([run.dataset.reader.document(int(i)) for i in held_out]).astype(np.int64)
    text = bytes(tokens[tokens < 256].astype(np.uint8))
    nats = direct_nats(model, np.concatenate(([256], tokens)), 32, 16)
    assert (info.step, result.step, info.run_dir) == (2, 2, run.folder.resolve())  # the best, not the latest
    assert (result.documents, result.tokens, result.text_bytes) == (6, len(tokens), len(text))
    assert (result.context, result.stride, result.held_out, result.exact_bytes) == (32, 16, True, True)
    assert result.loss == pytest.approx(nats / len(tokens), rel=1e-5)
    assert result.bits_per_byte == pytest.approx(nats / math.log(2) / len(text), rel=1e-5)
    gzip = zlib.compressobj(9, zlib.DEFLATED, 31)
    assert result.gzip_bits_per_byte * len(text) == 8 * len(gzip.compress(text) + gzip.flush())
    assert result.xz_bits_per_byte * len(text) == pytest.approx(
        8 * len(lzma.compress(text, preset=9 | lzma.PRESET_EXTREME))
    )
    assert "does not beat gzip -9 or xz -9e" in result.table()
    path = result.save(run.folder)
    assert json.loads(path.read_text()) == dataclasses.asdict(result)


def test_a_model_that_knows_nothing_pays_a_uniform_code(run, model):
    blank = type(model)(model.config, seed=0)
    with torch.no_grad():
        blank.embedding.weight.zero_()
    score = score_streams(blank, [np.arange(100)], 16, first_is_given=True, vocab_size=257)
    assert score.nats == pytest.approx(99 * math.log(257), rel=1e-6)
    assert score.bits_per_byte(99) == pytest.approx(math.log2(257), rel=1e-6)


def test_sizes_are_those_of_the_command_line_formats():
    draw = random.Random(0)
    text = " ".join(draw.choices(WORDS, k=20_000)).encode()

    def deflated(level):
        deflate = zlib.compressobj(level, zlib.DEFLATED, -15)
        return len(deflate.compress(text) + deflate.flush())

    def xz(preset):
        compressor = lzma.LZMACompressor(lzma.FORMAT_XZ, preset=preset)
        return len(compressor.compress(text) + compressor.flush())

    assert deflated(6) != deflated(9) and xz(6) != xz(9 | lzma.PRESET_EXTREME), "this text tells the levels apart"
    assert gzip_size(text) == deflated(9) + 18  # RFC 1952: a header of 10 bytes, a trailer of 8
    assert xz_size(text) == xz(9 | lzma.PRESET_EXTREME)


def test_document_mask_scores_documents_alone(run, model, tmp_path):
    ours = run.config.megatronish
    masked = dataclasses.replace(
        run.config,
        megatronish=ours.model_copy(update={"data": ours.data.model_copy(update={"document_mask": True})}),
    )
    save_checkpoint(tmp_path / "m", masked, run.dataset, 2, seed=2, best=False)
    result, _ = evaluate_run(tmp_path / "m", stride=8)
    held_out = split_documents(60, 0.1).validation
    documents = [run.dataset.reader.document(int(i)).astype(np.int64) for i in held_out]
    nats = sum(direct_nats(model, document, 32, 8) + math.log(257) for document in documents)
    assert result.tokens == sum(len(document) for document in documents)
    assert result.loss * result.tokens == pytest.approx(nats, rel=1e-5)


def test_other_data(run, tmp_path):
    other = make_dataset(tmp_path, documents=8, seed=9)
    result, _ = evaluate_run(run.folder, other)
    assert (result.held_out, result.documents) == (False, 8) and "8 documents of" in result.table()
    some, _ = evaluate_run(run.folder, other, max_tokens=400)
    assert 2 <= some.documents < 8 and some.tokens <= 400
    one, _ = evaluate_run(run.folder, other, max_tokens=1)
    assert one.documents == 1
    same, _ = evaluate_run(run.folder, run.dataset.prefix)
    assert same.held_out and same.documents == 6, "the run's own data by name is still only its held-out part"


def test_what_is_refused(run, tmp_path):
    def refused(message, folder=run.folder, data=None, **options):
        with pytest.raises(UserError, match=message):
            evaluate_run(folder, data, **options)

    refused("stride 0 must be at least 1 and at most the model's context of 32", stride=0)
    refused("stride 33 must", stride=33)
    refused("max tokens 0 must be at least 1", max_tokens=0)
    refused("no data set at", data=str(tmp_path / "none"))
    refused("no such folder", folder=tmp_path / "none")
    folder = tmp_path / "moved"
    shutil.copytree(run.folder / "checkpoints" / "step-00000002", folder)
    (folder / "run.json").unlink()
    write_manifest(folder, 2)
    refused("run.json is missing, so the data set is not known: name it with --data", folder=folder)
    state = json.loads((folder / "state.json").read_text())
    (folder / "state.json").write_text(json.dumps({**state, "data_identity": "another"}))
    shutil.copy(run.folder / "checkpoints" / "step-00000002" / "run.json", folder)
    write_manifest(folder, 2)
    refused("is not the data set that this run trained on", folder=folder)
    other = make_dataset(tmp_path, documents=5)
    path = next(tmp_path.glob("set*.manifest.json"))
    content = json.loads(path.read_text())
    content["tokenizer"]["sha256"] = "0" * 64
    path.write_text(json.dumps(content))
    refused("was made with another tokenizer", data=other)


def test_damaged_weights(model):
    broken = type(model)(model.config, seed=0)
    with torch.no_grad():
        broken.embedding.weight[5] = math.nan
    with pytest.raises(UserError, match="the model's loss is nan"):
        score_streams(broken, [np.arange(50)], 16, first_is_given=True, vocab_size=257)
    with pytest.raises(UserError, match="nothing is held out"):
        score_streams(model, [], 16, first_is_given=True, vocab_size=257)


@pytest.mark.parametrize(
    ("model_bits", "verdict"),
    [
        (1.0, "beats gzip -9 and xz -9e"),
        (1.7, "beats gzip -9 but does not beat xz -9e"),
        (2.0, "does not beat gzip -9 or"),
    ],
)
def test_verdict(run, model_bits, verdict):
    base, _ = evaluate_run(run.folder)
    shown = dataclasses.replace(base, bits_per_byte=model_bits, gzip_bits_per_byte=2.0, xz_bits_per_byte=1.5)
    assert isinstance(shown, Evaluation) and f"The model {verdict}" in shown.table()
