"""A run on streamed text, alone and mixed with an indexed data set: it trains, and resumes from a checkpoint bit for bit."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from megatronish.checkpoint.train_state import load_streams, save_streams
from megatronish.config.run import RunConfig
from megatronish.data.training_data import open_training_data
from megatronish.errors import UserError
from megatronish.launch.process import Rank
from tests.data.streams.text_shards import make_texts, write_shard
from tests.distributed import run_ranks
from tests.runs import make_dataset, small_run


def pretrain_rank(rank: int, config: RunConfig, world_size: int) -> None:
    """What launchers/pretrain.py does on one rank."""
    from megatronish.training.loop import pretrain

    pretrain(config, Rank(rank, world_size, rank, world_size, "test"))


def losses(run_dir: Path) -> list[tuple[int, float]]:
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [(line["step"], line["loss"]) for line in lines if "grad_norm" in line]


@pytest.mark.distributed
@pytest.mark.parametrize(("mixed", "workers"), [(False, 0), (True, 2)])
def test_resumed_equals_unbroken(mixed: bool, workers: int, tmp_path: Path) -> None:
    """Two ranks, stopped at step 10 of 20: every later loss and every final weight has the same bits."""
    for shard in range(3):
        write_shard(tmp_path / f"shard-{shard}.jsonl.gz", make_texts(shard, 60))
    text = str(tmp_path / "shard-*.jsonl.gz")
    data: dict[str, Any] = {"path": text, "tokenizer": "bytes", "num_workers": workers, "stream_buffer": 16}
    if mixed:
        data |= {"path": [0.7, text, 0.3, make_dataset(tmp_path)]}
    train = {"steps": 20, "save_interval": 10, "eval_interval": 10}

    def config(folder: str) -> RunConfig:
        return small_run("unused", tmp_path / folder, {"megatronish": {"data": data, "train": train}})

    run_ranks(2, pretrain_rank, config("unbroken"), 2, group=False)
    shutil.copytree(tmp_path / "unbroken", tmp_path / "stopped")
    checkpoints = tmp_path / "stopped" / "checkpoints"
    assert sorted(path.name for path in (checkpoints / "step-00000010").glob("streams-*")) == [
        "streams-rank-00000.json",
        "streams-rank-00001.json",
    ]
    shutil.rmtree(checkpoints / "step-00000020")
    (checkpoints / "latest").write_text("step-00000010\n")
    run_ranks(2, pretrain_rank, config("stopped"), 2, group=False)
    unbroken, resumed = losses(tmp_path / "unbroken"), losses(tmp_path / "stopped")
    assert [step for step, _ in resumed] == list(range(1, 21))
    assert resumed == unbroken and unbroken[-1][1] < unbroken[0][1]
    weights = [
        load_file(tmp_path / run / "checkpoints/step-00000020/model.safetensors") for run in ("unbroken", "stopped")
    ]
    assert weights[0].keys() == weights[1].keys()
    assert all((weights[0][name] == weights[1][name]).all() for name in weights[0])


def test_what_a_stream_cannot_do_is_an_error(tmp_path: Path) -> None:
    text = str(write_shard(tmp_path / "text.jsonl", make_texts(0, 40)))
    indexed = make_dataset(tmp_path)

    def opened(**settings: Any) -> Any:
        run = small_run("unused", tmp_path / "run", {"megatronish": {"data": settings}}).megatronish
        return open_training_data(run.data, seq_length=32, vocab_size=257, seed=1, samples=100, group=4)

    with pytest.raises(UserError, match="give a weight before each location"):
        opened(path=[text, indexed])
    with pytest.raises(UserError, match=r"needs --data\.tokenizer"):
        opened(path=text)
    with pytest.raises(UserError, match=r'data\.order "shuffled"'):
        opened(path=text, tokenizer="bytes", order="megatron")
    with pytest.raises(UserError, match=r"data\.pack true"):
        opened(path=text, tokenizer="bytes", pack=False)
    data = opened(path=[3, text, 1, indexed])  # the data set's tokenizer
    assert data.tokenizer_record.kind == "bytes" and data.num_held_out > 0
    lines = "\n".join(data.describe(2048))  # full blocks of the blend
    assert "75.00% of the samples, streamed; nothing held out" in lines and "25.00% of the samples" in lines
    assert [source.name for source in data.sources] == [text, indexed]
    with pytest.raises(UserError, match=r"model\.vocab_size is 100"):
        run = small_run(
            "unused", tmp_path / "run", {"megatronish": {"data": {"path": text, "tokenizer": "bytes"}}}
        ).megatronish
        open_training_data(run.data, seq_length=32, vocab_size=100, seed=1, samples=100, group=4)


def test_stream_states_on_the_disk(tmp_path: Path) -> None:
    """None without streams; an unreadable file is an error, so that no other text is read instead."""
    save_streams(tmp_path, 0, None)
    assert not list(tmp_path.iterdir()) and load_streams(tmp_path, 0) is None
    save_streams(tmp_path, 3, {"parts": {"0": {"byte": 7}}})
    assert load_streams(tmp_path, 3) == {"parts": {"0": {"byte": 7}}} and load_streams(tmp_path, 2) is None
    next(tmp_path.iterdir()).write_text("{")
    with pytest.raises(UserError, match="streams-rank-00003.json: cannot be read"):
        load_streams(tmp_path, 3)
