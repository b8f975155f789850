"""The checkpoint store: a checkpoint is there whole or not at all, whatever happens while it is written or removed."""

from __future__ import annotations

import os
import shutil
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from megatronish.config.errors import ConfigError
from megatronish.training import checkpoint
from megatronish.training.checkpoint import CheckpointStore, check_writable, step_name


def store(run_dir: Path, keep_last: int = 2) -> CheckpointStore:
    return CheckpointStore(run_dir, keep_last, is_first=True, barrier=lambda: None)


def content(step: int) -> Callable[[Path], None]:
    """Writes what a checkpoint needs to be complete, in a subfolder too."""

    def write(folder: Path) -> None:
        (folder / "engine").mkdir()
        (folder / "engine" / "weights").write_text(f"weights {step}")
        (folder / "state.json").write_text(f"{step}")

    return write


def names(run_dir: Path) -> list[str]:
    """Everything in the folder of checkpoints, hidden folders included."""
    return sorted(os.listdir(run_dir / "checkpoints"))


def pointer(run_dir: Path, name: str) -> str:
    return (run_dir / "checkpoints" / name).read_text()


def test_a_checkpoint_appears_whole(tmp_path: Path) -> None:
    """While it is written nothing stands under its name and `latest` names the one before."""
    kept = store(tmp_path)
    first = kept.save(5, content(5))
    assert first == tmp_path / "checkpoints" / "step-00000005"

    def write(folder: Path) -> None:
        content(10)(folder)
        assert not (tmp_path / "checkpoints" / step_name(10)).exists()
        assert kept.newest() == first

    second = kept.save(10, write)
    assert (second / "engine" / "weights").read_text() == "weights 10"
    assert names(tmp_path) == ["latest", "step-00000005", "step-00000010"]
    assert pointer(tmp_path, "latest") == "step-00000010\n"
    assert kept.newest() == second


def test_a_failing_write_leaves_the_last_one_in_force(tmp_path: Path) -> None:
    kept = store(tmp_path)
    first = kept.save(5, content(5), is_best=True)

    def disk_full(folder: Path) -> None:
        content(10)(folder)
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space left"):
        kept.save(10, disk_full, is_best=True)
    assert kept.newest() == first
    assert kept.complete() == [first]
    assert (pointer(tmp_path, "latest"), pointer(tmp_path, "best")) == ("step-00000005\n", "step-00000005\n")
    kept.save(15, content(15))
    assert names(tmp_path) == ["best", "latest", "step-00000005", "step-00000015"], "the torn one is cleared away"


@pytest.mark.parametrize("fails", ["sync_tree", "sync"])
def test_a_crash_between_writing_and_renaming(fails: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whichever step of the commit fails, what is found afterwards is a complete checkpoint."""
    kept = store(tmp_path)
    kept.save(5, content(5))

    def broken(folder: Path) -> None:
        raise OSError("I/O error")

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, fails, broken)
        with pytest.raises(OSError):
            kept.save(10, content(10))
    found = kept.newest()
    assert found is not None
    step = (found / "state.json").read_text()
    assert (found / "engine" / "weights").read_text() == f"weights {step}"


def test_files_are_synced_before_the_rename(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every file and folder of the checkpoint is on the disk before its name is."""
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
    store(tmp_path).save(5, content(5))
    staging = tmp_path / "checkpoints" / ".writing-step-00000005"
    commit = synced.index("rename to step-00000005")
    expected = {staging / "engine" / "weights", staging / "state.json", staging / "engine", staging}
    assert set(synced[:commit]) == {str(path) for path in expected}
    assert synced[commit + 1] == str(tmp_path / "checkpoints")


def test_every_rank_writes_before_the_rename(tmp_path: Path) -> None:
    """Two ranks as threads: the first commits only after the second has written, whichever is slower."""
    barrier = threading.Barrier(2, timeout=20)
    seen: list[bool] = []

    def rank(number: int) -> None:
        kept = CheckpointStore(tmp_path, 2, is_first=number == 0, barrier=barrier.wait)

        def write(folder: Path) -> None:
            if number == 0:
                content(5)(folder)
            else:
                threading.Event().wait(0.2)
                (folder / "rank1").write_text("late")

        path = kept.save(5, write)
        seen.append((path / "rank1").exists() and (path / "state.json").exists())

    threads = [threading.Thread(target=rank, args=(number,)) for number in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert seen == [True, True]
    assert names(tmp_path) == ["latest", "step-00000005"]


def test_the_last_n_and_the_best_are_kept(tmp_path: Path) -> None:
    kept = store(tmp_path, keep_last=2)
    for step in (5, 10, 15, 20, 25):
        kept.save(step, content(step), is_best=step == 10)
    assert names(tmp_path) == ["best", "latest", "step-00000010", "step-00000020", "step-00000025"]
    kept.save(30, content(30), is_best=True)
    assert names(tmp_path) == ["best", "latest", "step-00000025", "step-00000030"]
    assert pointer(tmp_path, "best") == "step-00000030\n"


def test_a_run_taken_up_further_back_keeps_what_it_saves(tmp_path: Path) -> None:
    """Resumed from step 5 while 20 and 25 exist: the new step 10 is not pruned in favour of them, nor are they lost."""
    kept = store(tmp_path, keep_last=2)
    for step in (5, 20, 25):
        kept.save(step, content(step), is_best=step == 5)
    again = store(tmp_path, keep_last=1)
    saved = again.save(10, content(10))
    assert saved.exists()
    assert again.newest() == saved
    assert names(tmp_path) == ["best", "latest", *(step_name(step) for step in (5, 10, 20, 25))]


def test_the_same_step_again_replaces_it(tmp_path: Path) -> None:
    kept = store(tmp_path)
    kept.save(5, content(5))
    (kept.folder / step_name(5) / "old").write_text("of the first")
    kept.save(5, content(6))
    assert names(tmp_path) == ["latest", "step-00000005"]
    assert sorted(os.listdir(kept.folder / step_name(5))) == ["engine", "state.json"]
    assert (kept.folder / step_name(5) / "engine" / "weights").read_text() == "weights 6"


@pytest.mark.parametrize("again", [10, 15])
def test_a_kill_while_an_old_one_is_removed(again: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Half of an old checkpoint never stands under its name: it is renamed aside before its files go."""
    kept = store(tmp_path, keep_last=1)
    kept.save(5, content(5), is_best=True)
    kept.save(10, content(10))
    remove = shutil.rmtree

    def killed(folder: Path, ignore_errors: bool = False) -> None:
        remove(folder / "engine")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", killed)
        with pytest.raises(KeyboardInterrupt):
            kept.save(again, content(again))
    assert all((path / "engine" / "weights").exists() for path in kept.complete())
    assert kept.newest() == kept.folder / step_name(again)
    kept.save(20, content(20))
    assert not [name for name in names(tmp_path) if name.startswith(".")], "the remains are cleared away"


def test_newest(tmp_path: Path) -> None:
    """What `latest` names; if that is missing, torn or elsewhere, the newest complete one."""
    kept = store(tmp_path, keep_last=9)
    assert kept.newest() is None
    for step in (5, 10, 15):
        kept.save(step, content(step))
    latest = kept.folder / "latest"
    latest.write_text("step-00000010\n")
    assert kept.newest() == kept.folder / step_name(10)
    for wrong in ("step-00000099\n", "", "../../elsewhere\n", "step-0000"):
        latest.write_text(wrong)
        assert kept.newest() == kept.folder / step_name(15), repr(wrong)
    latest.unlink()
    (kept.folder / step_name(15) / "state.json").unlink()
    assert kept.newest() == kept.folder / step_name(10), "a folder without state.json is not complete"


def test_find(tmp_path: Path) -> None:
    kept = store(tmp_path / "run")
    assert kept.find("auto") is None
    assert kept.find("never") is None
    first, second = (kept.save(step, content(step)) for step in (5, 10))
    assert kept.find("auto") == second
    assert kept.find(str(first)) == first
    assert kept.find(str(tmp_path / "run")) == second
    with pytest.raises(ConfigError) as error:
        kept.find("never")
    assert f"{kept.folder} already holds checkpoints" in str(error.value)
    assert "--train.save_dir, or continue with --train.resume auto" in str(error.value)
    with pytest.raises(ConfigError, match=r"gone: no such folder. Give a run's folder \(--train.save_dir\)"):
        kept.find(str(tmp_path / "gone"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match="empty: holds no complete checkpoint"):
        kept.find(str(tmp_path / "empty"))


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
