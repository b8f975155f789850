"""The files that DeepSpeed pickles: a run with Muon resumes from them, and no code in a forged file runs."""

from __future__ import annotations

import os
import pickle
from enum import Enum
from pathlib import Path
from typing import Any

import pytest
import torch

from megatronish.checkpoint.deepspeed_files import DeepSpeedFiles
from megatronish.checkpoint.manifest import write_manifest
from megatronish.config.run import RunConfig
from megatronish.errors import ConfigError, UserError
from megatronish.launch.process import Rank
from tests.distributed import run_ranks
from tests.runs import make_dataset, small_run

MUON = {"optimizer": {"type": "Muon", "params": {"lr": 0.02, "adam_lr": 3e-3}}, "gradient_clipping": 0.0}


class Stage(Enum):
    """Pickles as enums of Python 3.11.0 to 3.11.3 do: by the call of `getattr`."""

    ONE = 1

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        return getattr, (type(self), self.name)


def test_enums_are_read_again_whatever_python_wrote_them(tmp_path: Path) -> None:
    path = tmp_path / "state.pt"
    torch.save({"stage": Stage.ONE}, path)
    state = DeepSpeedFiles([Stage])
    with pytest.raises(ConfigError, match="getattr"):
        state.load(str(path))
    state.save({"stage": Stage.ONE}, str(path))
    assert state.error is None and state.load(str(path)) == {"stage": Stage.ONE}


class Malicious:
    """Pickled, it is the call of a function that makes a file."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self._path),)


def pretrain_rank(rank: int, config: RunConfig) -> str:
    """Train; the error that ended it, or ''."""
    from megatronish.training.loop import pretrain

    try:
        pretrain(config, Rank(rank, 1, rank, 1, "test"))
    except UserError as error:
        return str(error)
    return ""


@pytest.mark.distributed
def test_a_malicious_pickle_in_a_checkpoint(tmp_path: Path) -> None:
    """Its manifest is valid, as a forger's would be; still none of its code runs, whichever file it is in."""
    data = make_dataset(tmp_path)

    def config(steps: int) -> RunConfig:
        return small_run(data, tmp_path / "run", {**MUON, "megatronish": {"train": {"steps": steps}}})

    assert run_ranks(1, pretrain_rank, config(1), group=False) == [""]
    checkpoint = tmp_path / "run" / "checkpoints" / "step-00000001"
    files = sorted((checkpoint / "engine").glob("*.pt"))
    assert [path.name.rpartition("_")[0] for path in files] == ["mp_rank_00_model", "zero_pp_rank_0_mp_rank_00_optim"]
    assert not list(checkpoint.rglob("*.py")), "a program has no place in a checkpoint"
    trace = tmp_path / "was here"
    for path in files:
        original = path.read_bytes()
        torch.save({"module": Malicious(trace)}, path)
        write_manifest(checkpoint, 1)
        (message,) = run_ranks(1, pretrain_rank, config(2), group=False)
        assert message.startswith(
            f"{path} was refused: it is damaged, or holds objects that no checkpoint of megatronish has"
        ), message
        assert not trace.exists()
        path.write_bytes(original)
    write_manifest(checkpoint, 1)
    assert run_ranks(1, pretrain_rank, config(2), group=False) == [""]
    with pytest.raises(FileExistsError):  # the pickle does what it is meant to do, where it is opened without care
        trace.mkdir()
        pickle.loads(pickle.dumps(Malicious(trace)))


@pytest.mark.parametrize("write", [torch.save, lambda value, path: Path(path).write_bytes(pickle.dumps(value))])
def test_only_plain_values_are_made(write: Any, tmp_path: Path) -> None:
    files, path, trace = DeepSpeedFiles([]), tmp_path / "x.pt", tmp_path / "was here"
    write([Malicious(trace)], str(path))
    with pytest.raises(ConfigError, match=r"x.pt was refused.*Use a checkpoint of your own"):
        files.load(str(path))
    assert not trace.exists()
    files.save({"a": torch.arange(3), "b": [1, None]}, str(path))
    assert files.written == [path] and files.error is None
    assert torch.equal(files.load(str(path))["a"], torch.arange(3))


def test_a_disk_error_waits_for_the_collectives(tmp_path: Path) -> None:
    """Raised at once, it would leave the other ranks alone in one."""
    files = DeepSpeedFiles([])
    files.save({}, str(tmp_path / "none" / "x.pt"))
    files.save({}, str(tmp_path / "y.pt"))
    assert isinstance(files.error, OSError) and "none" in str(files.error)
    assert files.written == [tmp_path / "y.pt"]
