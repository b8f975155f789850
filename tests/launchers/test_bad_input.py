"""Bad input through the real launcher: exit status 2, one line with the fault and its fix, no traceback."""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from launchers import pretrain
from megatronish import errors
from megatronish.checkpoint.manifest import write_manifest
from megatronish.checkpoint.train_state import TrainState
from megatronish.checkpoint.weights import CONFIG_FILE
from tests.config.raw import read
from tests.launchers.run_file import run_file
from tests.runs import MODEL, make_dataset

Launch = Callable[..., str]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    return make_dataset(tmp_path_factory.mktemp("data"))


@pytest.fixture
def refused(
    data: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Iterator[Launch]:
    """Runs the launcher in this process, as rank `rank` of `ranks`; returns its message after checking how it ended."""
    from megatronish.training import loop

    def met(*arguments: object) -> None:
        raise AssertionError("the ranks meet, though everything here can be known before")

    monkeypatch.setattr(loop, "join_rendezvous_from_env", met)
    monkeypatch.setattr(errors, "OTHER_RANK_DELAY_SECONDS", 0.0)
    before = dict(os.environ)

    def launch(*words: str, rank: int = 0, ranks: int = 1, config: Path | None = None, lines: int = 1) -> str:
        path = config or run_file(tmp_path, data)
        os.environ.update(RANK=str(rank), WORLD_SIZE=str(ranks), LOCAL_RANK=str(rank))
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="29999")
        monkeypatch.setattr(sys, "argv", ["pretrain.py", "--deepspeed_config", str(path), *words])
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            pretrain.main()
        out, err = capsys.readouterr()
        assert ended.value.code == 2
        assert out == ""
        if rank == 0:
            assert err.startswith("error: ") and err.count("error: ") == 1
            assert err.count("\n") == lines, err
        else:
            assert err.startswith(f"error: rank {rank} ("), "launchers end it before, where the first rank has spoken"
        assert "Traceback" not in err
        return err

    yield launch
    os.environ.clear()
    os.environ.update(before)


def test_missing_data(refused: Launch, tmp_path: Path) -> None:
    message = refused("--data.path", str(tmp_path / "none"))
    assert f"no data set at {tmp_path}/none" in message
    assert "python tools/preprocess_data.py" in message


def test_a_data_path_with_a_typo(refused: Launch, data: str) -> None:
    assert f"did you mean {data}?" in refused("--data.path", data.removesuffix("_text_document"))


def test_unfinished_data(refused: Launch, data: str, tmp_path: Path) -> None:
    for suffix in (".bin", ".idx"):
        shutil.copy(data + suffix, tmp_path / f"set{suffix}")
    message = refused("--data.path", str(tmp_path / "set"))
    assert "preprocessing did not finish" in message and "--overwrite" in message


def test_a_vocabulary_that_is_too_small(refused: Launch) -> None:
    message = refused("--model.vocab_size", "200")
    assert "token ids up to 256" in message
    assert "model.vocab_size is 200; set model.vocab_size to 257 or more" in message


def test_a_sequence_longer_than_the_data(refused: Launch) -> None:
    message = refused("--model.seq_length", "100000")
    assert "one sample of sequence length 100,000 needs 100,001; shorten the sequence or prepare more text" in message


@pytest.mark.parametrize("rank", [0, 1])
def test_an_unwritable_folder(refused: Launch, tmp_path: Path, rank: int) -> None:
    (tmp_path / "file").write_text("")
    message = refused("--train.save_dir", str(tmp_path / "file" / "run"), rank=rank, ranks=2)
    if rank == 0:
        assert message == (
            f"error: train.save_dir {tmp_path}/file/run cannot be written: Not a directory. "
            "Choose another --train.save_dir.\n"
        )


def test_resume_from_a_missing_checkpoint(refused: Launch, tmp_path: Path) -> None:
    assert f"{tmp_path}/gone: no such folder. Give a run's folder" in refused("--train.resume", str(tmp_path / "gone"))


def saved_run(folder: Path, data: str, model: dict[str, Any] | None = None, **state: Any) -> Path:
    """A run's folder with one checkpoint, with the files that are read before the rendezvous."""
    from megatronish.config.model import ModelConfig
    from megatronish.data.samples.dataset import open_dataset
    from megatronish.training.snapshot import copy_tokenizer

    checkpoint = folder / "run" / "checkpoints" / "step-00000002"
    checkpoint.mkdir(parents=True)
    config = ModelConfig.model_validate({**MODEL, **(model or {})})
    (checkpoint / CONFIG_FILE).write_text(config.model_dump_json())
    (checkpoint / "engine").mkdir()
    (checkpoint / "engine" / "mp_rank_00_model_states.pt").write_bytes(b"")
    copy_tokenizer(open_dataset(data), checkpoint)
    fresh = TrainState.start(read(), read().batch_plan(1), open_dataset(data).fingerprint)
    TrainState(**{**fresh.__dict__, "step": 2, **state}).save(checkpoint)
    write_manifest(checkpoint, 2)
    return checkpoint


def test_a_checkpoint_of_another_model(refused: Launch, data: str, tmp_path: Path) -> None:
    checkpoint = saved_run(tmp_path, data, {"num_layers": 5, "qk_norm": True})
    message = refused()
    assert f"{checkpoint} is of another model: num_layers 5 (this run: 2), qk_norm True (this run: False)." in message


@pytest.mark.parametrize(
    ("words", "ranks", "state", "expected"),
    [
        ([], 2, {}, "data-parallel ranks 1, this run has 2"),
        (["--zero_optimization.stage", "2"], 1, {}, "ZeRO stage 1, this run has 2"),
        (["--optimizer.type", "Lion"], 1, {}, "optimizer AdamW, this run has Lion"),
        (["--bf16.enabled", "true"], 1, {}, "training dtype fp32, this run has bf16"),
        (["--train.seed", "1"], 1, {}, "train.seed 1234, this run has 1"),
    ],
)
def test_a_checkpoint_of_another_run(
    words: list[str], ranks: int, state: dict[str, Any], expected: str, refused: Launch, data: str, tmp_path: Path
) -> None:
    checkpoint = saved_run(tmp_path, data, **state)
    message = refused(*words, ranks=ranks)
    assert f"{checkpoint} was saved with {expected}" in message
    assert refused(*words, ranks=ranks, rank=ranks - 1).endswith(message.removeprefix("error: "))
    assert "or begin afresh with --train.resume never and another --train.save_dir" in message


def test_never_resuming_with_checkpoints_in_the_folder(refused: Launch, data: str, tmp_path: Path) -> None:
    saved_run(tmp_path, data)
    assert "already holds checkpoints" in refused("--train.resume", "never")


def test_truncated_checkpoints(refused: Launch, data: str, tmp_path: Path) -> None:
    checkpoint = saved_run(tmp_path, data)
    (checkpoint / "state.json").write_text('{"step": 2')
    assert f"{checkpoint}: state.json has 10 bytes, not " in refused(lines=3)
    write_manifest(checkpoint, 2)  # a changed file with a new manifest: the error names what the file lacks
    assert "state.json: cannot be read" in refused()
    (checkpoint / CONFIG_FILE).unlink()
    assert f"{CONFIG_FILE} is missing" in refused(lines=3)
    write_manifest(checkpoint, 2)
    assert f"{CONFIG_FILE} does not exist" in refused()


def test_a_copy_of_a_checkpoint_without_training_state(refused: Launch, data: str, tmp_path: Path) -> None:
    checkpoint = saved_run(tmp_path, data)
    shutil.rmtree(checkpoint / "engine")
    write_manifest(checkpoint, 2)
    assert f"{checkpoint}/engine holds no training state" in refused()


def test_another_tokenizer_than_the_checkpoints(refused: Launch, data: str, tmp_path: Path) -> None:
    """Token ids of another tokenizer, though they fit the vocabulary."""
    checkpoint = saved_run(tmp_path, data)
    record = checkpoint / "tokenizer_record.json"
    known = json.loads(record.read_text())
    record.write_text(json.dumps({**known, "sha256": "0123456789abcdef"}))
    write_manifest(checkpoint, 2)
    message = refused()
    assert f"{data} was made with another tokenizer (SHA-256 {known['sha256'][:12]}...)" in message
    assert "(0123456789ab...); prepare the data with the model's tokenizer (--tokenizer-model)" in message
    record.write_text("{")
    write_manifest(checkpoint, 2)
    assert "tokenizer_record.json: cannot be read" in refused()


def test_another_dataset_than_the_checkpoints(refused: Launch, data: str, tmp_path: Path) -> None:
    checkpoint = saved_run(tmp_path, data)
    (tmp_path / "other").mkdir()
    other = make_dataset(tmp_path / "other", seed=1)
    assert f"{checkpoint} was saved on another dataset (SHA-256 " in refused("--data.path", other)


@pytest.mark.parametrize(
    ("text", "lines", "expected"),
    [
        ('{"a": 1,\n', 3, "broken JSON at line 2, column 1"),
        ('{"train_batch_size": 1, "train_batch_size": 2}', 1, 'the key "train_batch_size" occurs twice'),
        ('{"megatronish": {}}', 1, '"gradient_clipping" is not set'),
    ],
)
def test_a_bad_file(text: str, lines: int, expected: str, refused: Launch, tmp_path: Path) -> None:
    path = tmp_path / "bad.json"
    path.write_text(text)
    assert expected in refused(config=path, lines=lines)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--model.num_attention_heads", "3"], "hidden_size 32 is not divisible by num_attention_heads 3"),
        (["--model.preset", "tinny"], 'unknown model preset "tinny". Did you mean "tiny"?'),
        (["--train.stepz", "3"], 'unknown option --train.stepz. Did you mean "train.steps"?'),
        (["--train_batch_size", "7"], "train_batch_size 7 != train_micro_batch_size_per_gpu"),
        (["--kernels.attention", "flsh"], "input should be 'auto', 'sdpa', 'flash' or 'reference'"),
    ],
)
def test_a_bad_option(words: list[str], expected: str, refused: Launch) -> None:
    assert expected in refused(*words)


def test_a_broken_environment(
    data: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RANK", "1")
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    monkeypatch.setattr(sys, "argv", ["pretrain.py", "--deepspeed_config", str(run_file(tmp_path, data))])
    with pytest.raises(SystemExit) as ended:
        pretrain.main()
    assert ended.value.code == 2
    assert "error: the launcher set some of the rank variables but not WORLD_SIZE" in capsys.readouterr().err
