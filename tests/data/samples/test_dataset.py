"""Committed data sets: opening, refusing what is unfinished, damaged or does not fit a model; the held-out text."""

import dataclasses
import json
import os
from pathlib import Path

import pytest

from megatronish.data.indexed.manifest import manifest_path, read_manifest
from megatronish.data.samples.dataset import check_dataset_fits, open_dataset
from megatronish.errors import DataError
from megatronish.preprocessing.preprocess import PreprocessOptions, preprocess

TEXTS = ["Once upon a time", "größer als 日本", "literal <|endoftext|> stays", "last\n"]


@pytest.fixture
def prefix(tmp_path):
    source = tmp_path / "in.jsonl"
    source.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    options = PreprocessOptions((str(source),), str(tmp_path / "out"), train_tokenizer=300, append_eod=True)
    (result,) = preprocess(options, lambda line: None)
    return result.prefix


def test_held_out_text_is_the_original_bytes(prefix):
    dataset = open_dataset(prefix)
    assert [raw.decode() for raw in dataset.document_bytes(range(4))] == TEXTS
    assert dataset.held_out_text([3, 1]) == (TEXTS[3] + TEXTS[1]).encode()
    assert dataset.manifest.counts["text_bytes"] == len("".join(TEXTS).encode())
    assert dataset.manifest.counts["documents"] == 4
    assert dataset.reader.document(2)[-1] == dataset.manifest.tokenizer.eod_id
    assert list(dataset.reader.tokens_view).count(dataset.manifest.tokenizer.eod_id) == 4


def test_data_set_can_be_moved(prefix, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    for path in tmp_path.glob("out_text_document.*"):
        path.rename(tmp_path / "elsewhere" / path.name)
    dataset = open_dataset(tmp_path / "elsewhere" / "out_text_document")
    assert dataset.held_out_text([0]) == TEXTS[0].encode()


def test_the_error_for_missing_data_names_the_command(tmp_path):
    with pytest.raises(DataError, match=r"no data set at .*nothing.*python tools/preprocess_data\.py"):
        open_dataset(tmp_path / "nothing")


def test_near_misses_of_the_path_are_answered(prefix):
    for wrong in (f"{prefix}.bin", f"{prefix}.idx", prefix.removesuffix("_text_document")):
        with pytest.raises(DataError, match=f"did you mean {prefix}\\?"):
            open_dataset(wrong)


def test_fingerprint_follows_content_not_place(prefix, tmp_path):
    def again(name: str, source: str) -> str:
        options = PreprocessOptions(
            (source,), str(tmp_path / name), tokenizer_model=f"{prefix}.tokenizer.json", append_eod=True
        )
        return open_dataset(preprocess(options, lambda line: None)[0].prefix).fingerprint

    (tmp_path / "other.jsonl").write_text("".join(json.dumps({"text": text[::-1]}) + "\n" for text in TEXTS))
    assert again("same", str(tmp_path / "in.jsonl")) == open_dataset(prefix).fingerprint
    assert again("other", str(tmp_path / "other.jsonl")) != open_dataset(prefix).fingerprint


def test_files_without_a_manifest_are_unfinished(prefix):
    manifest_path(prefix).unlink()
    with pytest.raises(DataError, match="did not finish"):
        open_dataset(prefix)


@pytest.mark.parametrize("suffix", ["bin", "idx", "tokenizer.json"])
def test_changed_or_missing_file_is_named(prefix, suffix):
    name = f"{prefix}.{suffix}"
    with open(name, "ab") as file:
        file.write(b"x")
    with pytest.raises(DataError, match=rf"{suffix}: has [\d,]+ bytes, but .* records"):
        open_dataset(prefix)
    (manifest_path(prefix).parent / name).unlink()
    with pytest.raises(DataError, match=rf"{suffix}: is missing"):
        open_dataset(prefix)


def test_replaced_tokenizer_of_equal_size_is_refused(prefix):
    path = Path(f"{prefix}.tokenizer.json")
    changed = path.read_text().replace("<|endoftext|>", "<|ENDOFTEXT|>")
    path.write_text(changed)
    with pytest.raises(DataError, match="the tokenizer was replaced"):
        open_dataset(prefix).tokenizer()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d | {"version": 3}, "manifest version 3"),
        (lambda d: d | {"format": "other"}, "not a data set's manifest"),
        (lambda d: [d], "not a data set's manifest"),
        (lambda d: {k: v for k, v in d.items() if k != "counts"}, "incomplete"),
        (lambda d: d | {"files": {"x": {}}}, "incomplete"),
        (lambda d: d | {"files": {"x": {"bytes": "1"}}}, "'1' is not an integer"),
        (lambda d: d | {"counts": 5}, "incomplete"),
        (lambda d: d | {"tokenizer": {"kind": "bytes"}}, "incomplete"),
        (lambda d: d | {"tokenizer": d["tokenizer"] | {"file": "/etc/passwd"}}, "'/etc/passwd', which is outside its"),
        (lambda d: d | {"files": {"../x": {"bytes": 1, "xxh3": "0"}}}, "'../x', which is outside its folder"),
        (lambda d: d | {"counts": d["counts"] | {"tokens": 1}}, r"its manifest 1 uint16"),
    ],
)
def test_damaged_manifest_is_refused(prefix, change, message):
    path = manifest_path(prefix)
    path.write_text(json.dumps(change(json.loads(path.read_text()))))
    with pytest.raises(DataError, match=message):
        open_dataset(prefix)


def test_manifest_that_is_not_json(prefix):
    manifest_path(prefix).write_text("{")
    with pytest.raises(DataError, match="not JSON"):
        open_dataset(prefix)


def test_manifest_comes_back_as_written(prefix):
    manifest = read_manifest(prefix)
    assert manifest.to_json() == manifest_path(prefix).read_text()
    assert manifest.tokenizer.file == "out_text_document.tokenizer.json"


def test_replacement_cut_short_between_renames_is_not_taken_for_a_data_set(prefix, tmp_path, monkeypatch):
    """The new files have the sizes that the old manifest records, so only its absence shows it."""
    (tmp_path / "in.jsonl").write_text("".join(json.dumps({"text": text[::-1]}) + "\n" for text in TEXTS))
    real_replace = os.replace
    renamed: list[str] = []

    def replace(source, target):
        if ".unfinished" in str(target):
            return real_replace(source, target)
        if len(renamed) == 1:
            raise OSError(5, "power cut", str(target))
        renamed.append(str(target))
        return real_replace(source, target)

    monkeypatch.setattr(os, "replace", replace)
    options = PreprocessOptions(
        (str(tmp_path / "in.jsonl"),), str(tmp_path / "out"), tokenizer_model=f"{prefix}.tokenizer.json", overwrite=True
    )
    with pytest.raises(OSError, match="power cut"):
        preprocess(options, lambda line: None)
    assert renamed == [f"{prefix}.bin"]
    with pytest.raises(DataError, match="did not finish"):
        open_dataset(prefix)
    monkeypatch.setattr(os, "replace", real_replace)
    # The files were complete before the first rename, so resuming needs no input any more.
    (tmp_path / "in.jsonl").unlink()
    (result,) = preprocess(dataclasses.replace(options, overwrite=False, resume=True), lambda line: None)
    assert result.already_there and not list(tmp_path.glob(".out*"))
    assert open_dataset(prefix).held_out_text([0]) == TEXTS[0][::-1].encode()


def test_model_must_fit(prefix):
    manifest = open_dataset(prefix).manifest
    size = manifest.tokenizer.vocab_size
    check_dataset_fits(manifest, size, manifest.tokenizer.sha256)
    check_dataset_fits(manifest, size + 64)
    with pytest.raises(DataError, match=rf"up to {size - 1} .*model\.vocab_size is {size - 1}"):
        check_dataset_fits(manifest, size - 1)
    with pytest.raises(DataError, match=r"another tokenizer .*ffffffffffff\.\.\."):
        check_dataset_fits(manifest, size, "f" * 64)
    empty = dataclasses.replace(manifest, counts=manifest.counts | {"tokens": 0})
    with pytest.raises(DataError, match="holds no token"):
        check_dataset_fits(empty, size)
