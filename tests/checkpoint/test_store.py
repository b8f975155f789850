"""The checkpoint store: checkpoints appear and disappear atomically, whatever happens while they are written or removed."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from megatronish.checkpoint.manifest import MANIFEST_FILE
from megatronish.checkpoint.store import CheckpointStore, check_writable, step_name
from megatronish.errors import ConfigError
from tests.saves import save_alone

STEP_5, STEP_10, STEP_15 = (step_name(step) for step in (5, 10, 15))


def content(step: int) -> Callable[[Path], None]:
    """Writes what a checkpoint needs to be complete, in a subfolder too."""

    def write(folder: Path) -> None:
        (folder / "engine").mkdir()
        (folder / "engine" / "weights").write_text(f"weights {step}")
        (folder / "state.json").write_text(f"{step}")

    return write


def save(kept: CheckpointStore, step: int, is_best: bool = False, of: int | None = None) -> Path:
    """Save the checkpoint of `step`, with the content of step `of`; its folder."""
    outcome = save_alone(kept, step, content(of or step), is_best)
    assert not outcome.problem
    return Path(outcome.path)


def names(run_dir: Path) -> list[str]:
    """Everything in the folder of checkpoints, hidden folders included."""
    return sorted(os.listdir(run_dir / "checkpoints"))


def pointer(run_dir: Path, name: str) -> str:
    return (run_dir / "checkpoints" / name).read_text()


def test_a_checkpoint_appears_atomically(tmp_path: Path) -> None:
    """While it is written nothing stands under its name and `latest` names the one before."""
    kept = CheckpointStore(tmp_path, 2)
    first = save(kept, 5)
    assert first == tmp_path / "checkpoints" / STEP_5

    def write(folder: Path) -> None:
        content(10)(folder)
        assert not (tmp_path / "checkpoints" / STEP_10).exists()
        assert kept.newest() == first

    second = Path(save_alone(kept, 10, write).path)
    assert (second / "engine" / "weights").read_text() == "weights 10"
    assert names(tmp_path) == ["latest", STEP_5, STEP_10]
    assert pointer(tmp_path, "latest") == f"{STEP_10}\n"
    assert kept.newest() == second
    assert sorted(os.listdir(second)) == ["engine", MANIFEST_FILE, "state.json"]


def test_a_failing_write_leaves_the_last_one_in_force(tmp_path: Path) -> None:
    kept = CheckpointStore(tmp_path, 2)
    first = save(kept, 5, is_best=True)

    def disk_full(folder: Path) -> None:
        content(10)(folder)
        raise OSError(28, "No space left on device")

    assert save_alone(kept, 10, disk_full, is_best=True).problem == "rank 0: No space left on device"
    assert kept.newest() == first
    assert (pointer(tmp_path, "latest"), pointer(tmp_path, "best")) == (f"{STEP_5}\n", f"{STEP_5}\n")
    assert names(tmp_path) == ["best", "latest", STEP_5], "nothing is left of the torn one"
    save(kept, 15)
    assert names(tmp_path) == ["best", "latest", STEP_5, STEP_15]


@pytest.mark.parametrize("call", range(1, 9))
def test_a_failure_at_each_step_of_the_commit(call: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whichever call to the disk fails, what is found afterwards is a good checkpoint, and the next save succeeds."""
    kept = CheckpointStore(tmp_path, 1)
    save(kept, 5)
    calls = 0
    sync, rename = os.fsync, Path.rename

    def count() -> None:
        nonlocal calls
        calls += 1
        if calls == call:
            raise OSError(5, "Input/output error")

    def failing_sync(handle: int) -> None:
        count()
        sync(handle)

    def failing_rename(self: Path, target: Path) -> Path:
        count()
        return rename(self, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", failing_sync)
        patch.setattr(Path, "rename", failing_rename)
        save_alone(kept, 10, content(10))
    found = kept.newest()
    assert found is not None and not kept.faults(found)
    step = (found / "state.json").read_text()
    assert (found / "engine" / "weights").read_text() == f"weights {step}"
    saved = save(kept, 15)
    assert kept.newest() == saved
    assert [name for name in names(tmp_path) if name != STEP_10] == ["latest", STEP_15]


def test_files_are_synced_before_the_rename(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every file and folder of the checkpoint is on the disk before its name is, and the manifest after all other files."""
    synced: list[str] = []
    rename = Path.rename
    fsync = os.fsync

    def record_sync(handle: int) -> None:
        synced.append(os.readlink(f"/proc/self/fd/{handle}"))
        fsync(handle)

    def record_rename(self: Path, target: Path) -> Path:
        synced.append(f"rename to {target.name}")
        return rename(self, target)

    monkeypatch.setattr(os, "fsync", record_sync)
    monkeypatch.setattr(Path, "rename", record_rename)
    save(CheckpointStore(tmp_path, 2), 5)
    staging = tmp_path / "checkpoints" / f".writing-{STEP_5}"
    commit = synced.index(f"rename to {STEP_5}")
    files = {str(staging / name) for name in ("engine/weights", "state.json")}
    assert set(synced[:commit]) == files | {
        str(path) for path in (staging / MANIFEST_FILE, staging / "engine", staging)
    }
    assert files == set(synced[: synced.index(str(staging / MANIFEST_FILE))])
    assert synced[commit + 1] == str(tmp_path / "checkpoints")


def test_the_last_n_every_k_and_the_best_are_kept(tmp_path: Path) -> None:
    kept = CheckpointStore(tmp_path, 2, keep_every=15)
    for step in (5, 10, 15, 20, 25):
        save(kept, step, is_best=step == 10)
    assert names(tmp_path) == ["best", "latest", *(step_name(step) for step in (10, 15, 20, 25))]
    save(kept, 30, is_best=True)
    save(kept, 35)
    save(kept, 40)
    assert names(tmp_path) == ["best", "latest", *(step_name(step) for step in (15, 30, 35, 40))]
    assert pointer(tmp_path, "best") == f"{step_name(30)}\n"


def test_a_damaged_one_does_not_count_as_kept(tmp_path: Path) -> None:
    """Else the only spare would be the damaged one, and the good one before it gone."""
    kept = CheckpointStore(tmp_path, 2)
    save(kept, 5)
    damaged = save(kept, 10)
    (damaged / "engine" / "weights").write_text("")
    save(kept, 15)
    assert names(tmp_path) == ["latest", STEP_5, STEP_10, STEP_15]
    save(kept, 20)
    assert names(tmp_path) == ["latest", STEP_10, STEP_15, step_name(20)], "and it stays to be looked at"


def test_a_run_taken_up_further_back_keeps_what_it_saves(tmp_path: Path) -> None:
    """Resumed from step 5 while 20 and 25 exist: the new step 10 is not pruned in favour of them, nor are they lost."""
    kept = CheckpointStore(tmp_path, 2)
    for step in (5, 20, 25):
        save(kept, step, is_best=step == 5)
    again = CheckpointStore(tmp_path, 1)
    saved = save(again, 10)
    assert saved.exists()
    assert again.newest() == saved
    assert names(tmp_path) == ["best", "latest", *(step_name(step) for step in (5, 10, 20, 25))]
    assert [path.name for path in again.candidates()] == [step_name(step) for step in (10, 5, 25, 20)]


def test_the_same_step_again_replaces_it(tmp_path: Path) -> None:
    kept = CheckpointStore(tmp_path, 2)
    old = save(kept, 5)
    (old / "old").write_text("of the first")
    new = save(kept, 5, of=6)
    assert names(tmp_path) == ["latest", STEP_5]
    assert sorted(os.listdir(new)) == ["engine", MANIFEST_FILE, "state.json"]
    assert (new / "engine" / "weights").read_text() == "weights 6"


def test_a_kill_between_the_renames_of_a_replacement(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The only checkpoint is saved again, and neither has its name when the process dies: the old one gets it back."""
    kept = CheckpointStore(tmp_path, 1)
    save(kept, 5)
    rename = Path.rename

    def killed(self: Path, target: Path) -> Path:
        if self.name.startswith(".writing-"):
            raise KeyboardInterrupt
        return rename(self, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", killed)
        with pytest.raises(KeyboardInterrupt):
            save(kept, 5, of=6)
    assert kept.complete() == []
    CheckpointStore(tmp_path, 1).clear()
    found = kept.newest()
    assert found is not None and (found / "engine" / "weights").read_text() == "weights 5"
    assert names(tmp_path) == ["latest", STEP_5]


@pytest.mark.parametrize("again", [10, 15])
def test_a_kill_while_an_old_one_is_removed(again: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Half of an old checkpoint never stands under its name: it is renamed aside before its files go."""
    kept = CheckpointStore(tmp_path, 1)
    save(kept, 5, is_best=True)
    save(kept, 10)
    remove = shutil.rmtree

    def killed(folder: Path, ignore_errors: bool = False) -> None:
        remove(folder / "engine")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", killed)
        with pytest.raises(KeyboardInterrupt):
            save(kept, again)
    assert all((path / "engine" / "weights").exists() for path in kept.complete())
    assert kept.newest() == kept.folder / step_name(again)
    save(kept, 20)
    assert not [name for name in names(tmp_path) if name.startswith(".")], "the remains are cleared away"


def test_no_room_on_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Known before a byte is written: the sizes of all ranks are."""
    kept = CheckpointStore(tmp_path, 2)
    first = save(kept, 5)
    free = 3_000_000_000
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: shutil._ntuple_diskusage(free, 0, free))  # type: ignore[attr-defined]
    written: list[Path] = []
    problem = save_alone(kept, 10, written.append, size=5_000_000_000).problem
    assert problem == f"it needs 5.000 GB and 3.000 GB are free on the disk of {kept.folder}"
    assert written == [] and names(tmp_path) == ["latest", STEP_5] and kept.newest() == first


def test_newest(tmp_path: Path) -> None:
    """What `latest` names; if that is missing, torn or elsewhere, the newest good one."""
    kept = CheckpointStore(tmp_path, 9)
    assert kept.newest() is None
    for step in (5, 10, 15):
        save(kept, step)
    latest = kept.folder / "latest"
    latest.write_text(f"{STEP_10}\n")
    assert kept.newest() == kept.folder / STEP_10
    for wrong in ("step-00000099\n", "", "../../elsewhere\n", "step-0000"):
        latest.write_text(wrong)
        assert kept.newest() == kept.folder / STEP_15, repr(wrong)
    latest.unlink()
    (kept.folder / STEP_15 / MANIFEST_FILE).unlink()
    assert kept.newest() == kept.folder / STEP_10, "a folder without a manifest is not good"


def test_wanted(tmp_path: Path) -> None:
    kept = CheckpointStore(tmp_path / "run", 2)
    assert kept.wanted("auto") == []
    assert kept.wanted("never") == []
    first, second = (save(kept, step) for step in (5, 10))
    assert kept.wanted("auto") == [second, first]
    assert kept.wanted(str(first)) == [first]
    assert kept.wanted(str(tmp_path / "run")) == [second, first]
    assert kept.wanted(str(kept.folder)) == [second, first]
    with pytest.raises(ConfigError) as error:
        kept.wanted("never")
    assert f"{kept.folder} already holds checkpoints" in str(error.value)
    assert "--train.save_dir, or continue with --train.resume auto" in str(error.value)
    with pytest.raises(ConfigError, match=r"gone: no such folder. Give a run's folder \(--train.save_dir\)"):
        kept.wanted(str(tmp_path / "gone"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match="empty: holds no complete checkpoint"):
        kept.wanted(str(tmp_path / "empty"))


def test_check_writable(tmp_path: Path) -> None:
    check_writable(tmp_path / "a" / "b")
    assert os.listdir(tmp_path / "a" / "b") == []
    (tmp_path / "file").write_text("")
    for folder, reason in ((tmp_path / "file" / "run", "Not a directory"), (tmp_path / "file", "File exists")):
        with pytest.raises(ConfigError) as error:
            check_writable(folder)
        assert (
            str(error.value) == f"train.save_dir {folder} cannot be written: {reason}. Choose another --train.save_dir."
        )


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_without_permission(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(ConfigError, match="cannot be written: Permission denied"):
        check_writable(tmp_path / "run")
