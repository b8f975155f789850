"""Saving checkpoints: in the background, by several ranks, on full disks, and the lock of a run directory."""

from __future__ import annotations

import errno
import itertools
import os
import resource
import shutil
import signal
import tempfile
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import torch
import torch.distributed as dist

from megatronish.checkpoint import run_lock
from megatronish.checkpoint.manifest import read_manifest
from megatronish.checkpoint.run_lock import hold_run_dir
from megatronish.checkpoint.saver import SaveFailedError, Saver
from megatronish.checkpoint.staging import StagingBuffers
from megatronish.checkpoint.store import CheckpointStore
from megatronish.config.run import RunConfig
from megatronish.errors import ConfigError, exit_on_user_error
from megatronish.launch.consensus import Consensus
from megatronish.launch.process import Rank
from megatronish.launch.rendezvous import RankProcess, Rendezvous
from tests.launch.faulty_ranks import start_ranks
from tests.runs import make_dataset, small_run
from tests.saves import lone_saver, save_alone, snapshot


def write_state(folder: Path) -> None:
    (folder / "state.json").write_text("{}")


def on_ranks(
    world_size: int, folder: Path, function: Callable[[Saver], Any], reports: list[str], **options: Any
) -> list[Any]:
    """What `function` returns on each of `world_size` ranks, threads that share a store; `reports`: lines of the first."""
    shared, processes = dist.HashStore(), tuple(RankProcess.current(rank) for rank in range(world_size))

    def on_rank(rank: int) -> Any:
        consensus = Consensus(Rendezvous(shared, "", rank, processes), "checkpoints")
        saver = Saver(CheckpointStore(folder, 2), consensus, background=True, report=reports.append, **options)
        saver.rank = rank  # type: ignore[attr-defined]
        return function(saver)

    with ThreadPoolExecutor(world_size) as pool:
        return list(pool.map(on_rank, range(world_size)))


class TestBackground:
    def test_training_continues_while_it_is_written(self, tmp_path: Path) -> None:
        store, reports, proceed = CheckpointStore(tmp_path, 2), [], threading.Event()
        saver = lone_saver(store, reports, background=True)

        def slow(folder: Path) -> None:
            assert proceed.wait(60)
            write_state(folder)

        saver.save(5, lambda in_background: snapshot(slow) if in_background else pytest.fail("it waits"))
        assert store.newest() is None
        proceed.set()
        saver.finish()
        assert store.newest() == store.folder / "step-00000005"
        assert reports[0].startswith(f"saved {store.folder}/step-00000005 (0.0 MB; stalled ")

    def test_the_next_one_waits_for_it(self, tmp_path: Path) -> None:
        store, order = CheckpointStore(tmp_path, 5), []
        saver = lone_saver(store, background=True)
        for step in (1, 2, 3):

            def write(folder: Path, step: int = step) -> None:
                order.append(("written", step))
                write_state(folder)

            def take(_: bool, step: int = step, write: Any = write) -> Any:
                order.append(("copied", step))
                return snapshot(write)

            saver.save(step, take)
        saver.finish()
        assert order == [(what, step) for step in (1, 2, 3) for what in ("copied", "written")]
        assert len(store.complete()) == 3

    def test_copies_are_of_the_moment_and_their_memory_is_kept(self) -> None:
        copies, tensor = StagingBuffers(), torch.arange(6.0)
        taken = copies.take("a", tensor[2:])
        tensor.zero_()
        assert taken.tolist() == [2.0, 3.0, 4.0, 5.0] and copies.bytes == 16
        again = copies.take("a", torch.ones(4))
        assert again.data_ptr() == taken.data_ptr() and again.tolist() == [1.0] * 4
        assert copies.take("a", torch.ones(5)).numel() == 5 and copies.bytes == 20

    def test_without_memory_it_waits_and_reports_it(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        reports: list[str] = []
        saver = lone_saver(CheckpointStore(tmp_path, 2), reports, background=True)
        monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=10_000_000_000))
        assert saver.reason_to_wait(5_000_000_000) == ""
        reason = saver.reason_to_wait(5_100_000_000)
        assert reason == "copies take 5.10 GB of the 10.00 GB of free memory"
        saver.save(
            5, lambda in_background: pytest.fail("copied") if in_background else snapshot(write_state), reason=reason
        )
        assert reports[0].endswith(f"not in the background: {reason})")

    def test_a_failed_run_completes_the_checkpoint_being_written(self, tmp_path: Path) -> None:
        store = CheckpointStore(tmp_path, 2)
        saver = lone_saver(store, background=True)

        def slow(folder: Path) -> None:
            threading.Event().wait(0.2)
            write_state(folder)

        saver.save(5, lambda _: snapshot(slow))
        saver.abandon()
        assert store.newest() == store.folder / "step-00000005"

    def test_a_mistake_in_the_thread_is_raised_where_the_run_waits(self, tmp_path: Path) -> None:
        saver = lone_saver(CheckpointStore(tmp_path, 2), background=True)

        def wrong(folder: Path) -> None:
            raise KeyError("no error of a disk")

        saver.save(5, lambda _: snapshot(wrong))
        with pytest.raises(KeyError, match="no error of a disk"):
            saver.save(10, lambda _: snapshot(write_state))


class TestRanks:
    def test_all_files_are_in_one_manifest(self, tmp_path: Path) -> None:
        def run(saver: Any) -> Any:
            def write(folder: Path) -> list[Path]:
                path = folder / f"rank-{saver.rank}"
                path.write_text(str(saver.rank))
                if saver.rank == 0:
                    write_state(folder)
                return [path]

            saver.save(5, lambda _: SimpleNamespace(bytes=1, write=write))
            saver.finish()
            assert saver.usual_seconds == saver.wait().seconds > 0.0
            return saver.wait()

        outcomes = on_ranks(3, tmp_path, run, [])
        assert outcomes[0] == outcomes[1] == outcomes[2] and outcomes[0].bytes == 3
        folder = tmp_path / "checkpoints" / "step-00000005"
        assert sorted(read_manifest(folder).files) == ["rank-0", "rank-1", "rank-2", "state.json"]
        assert CheckpointStore(tmp_path).faults(folder) == []

    @pytest.mark.parametrize("failing", [0, 2])
    def test_one_that_fails_leaves_nothing_and_all_know(self, failing: int, tmp_path: Path) -> None:
        """The others have written by then; training continues, and the next checkpoint succeeds."""
        reports: list[str] = []

        def run(saver: Any) -> Any:
            def write(folder: Path) -> list[Path]:
                if saver.rank == failing and not done:
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(folder / "x"))
                path = folder / f"rank-{saver.rank}"
                path.write_text("x")
                if saver.rank == 0:
                    write_state(folder)
                return [path]

            done: list[int] = []
            outcomes = []
            for step in (5, 10):
                saver.save(step, lambda _: SimpleNamespace(bytes=1, write=write))
                outcomes.append(saver.wait())
                done.append(step)
            saver.finish()
            return outcomes

        outcomes = on_ranks(3, tmp_path, run, reports)
        assert outcomes[0] == outcomes[1] == outcomes[2]
        staging = tmp_path / "checkpoints" / ".writing-step-00000005"
        problem = f"rank {failing}: No space left on device ({staging / 'x'})"
        assert [outcome.problem for outcome in outcomes[0]] == [problem, ""]
        assert reports[0] == (
            f"WARNING: no checkpoint of step 5: {problem}. There is none. Training continues, and the next checkpoint is tried when it is due."
        )
        assert sorted(os.listdir(tmp_path / "checkpoints")) == ["latest", "step-00000010"]

    def test_no_room_is_known_from_the_sizes_of_all_ranks(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        free = 2_500_000_000
        monkeypatch.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(free=free))

        def run(saver: Any) -> str:
            saver.save(5, lambda _: SimpleNamespace(bytes=1_000_000_000, write=lambda folder: pytest.fail("written")))
            return saver.wait().problem

        folder = tmp_path / "checkpoints"
        assert (
            on_ranks(3, tmp_path, run, []) == [f"it needs 3.000 GB and 2.500 GB are free on the disk of {folder}"] * 3
        )
        assert os.listdir(folder) == []

    def test_stop_means_stop_on_every_rank(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(free=0))

        def run(saver: Any) -> str:
            saver.save(5, lambda _: SimpleNamespace(bytes=1, write=lambda folder: []))
            with pytest.raises(SaveFailedError) as error:
                saver.save(10, lambda _: SimpleNamespace(bytes=1, write=lambda folder: []))
            return str(error.value)

        first, second = on_ranks(2, tmp_path, run, [], stop_on_error=True)
        assert first == second
        assert first.startswith(
            "the checkpoint of step 5 could not be written: it needs 0.000 GB and 0.000 GB are free"
        )
        assert "continue without it: --train.on_save_error continue" in first


def train_with_limit(rank: int, config: RunConfig, saves: int) -> int:
    """A run in which no file can become larger than 8 kB while the first `saves` checkpoints are written."""
    from megatronish.training.loop import pretrain

    begin, counted = CheckpointStore.begin, itertools.count()
    unlimited = resource.getrlimit(resource.RLIMIT_FSIZE)

    def begin_with_limit(self: CheckpointStore, step: int, size: int) -> Path:
        limit = (8192, unlimited[1]) if next(counted) < saves else unlimited
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
        return begin(self, step, size)

    CheckpointStore.begin = begin_with_limit  # type: ignore[method-assign]  # in this child only
    with exit_on_user_error(rank == 0):
        pretrain(config, Rank(rank, 2, rank, 2, "test"))
    return 0


@pytest.mark.distributed
@pytest.mark.parametrize("saves", [1, 2])
def test_a_disk_that_is_full(saves: int, tmp_path: Path) -> None:
    """Of two checkpoints the first cannot be written: the run trains on. Both cannot: its end is a failure, status 2."""
    train = {"steps": 4, "save_interval": 2}
    config = small_run(make_dataset(tmp_path), tmp_path / "run", {"megatronish": {"train": train}})
    ranks = start_ranks(2, tmp_path, train_with_limit, config, saves)
    try:
        statuses = ranks.wait()
    finally:
        ranks.kill()
    output = ranks.output(0)
    assert "WARNING: no checkpoint of step 2: rank 0: " in output and "File too large" in output, output
    left = sorted(os.listdir(tmp_path / "run" / "checkpoints"))
    if saves == 1:
        assert statuses == {0: 0, 1: 0}
        assert left == ["latest", "step-00000004"]
        assert f"saved {tmp_path}/run/checkpoints/step-00000004 (" in output
    else:
        assert statuses[0] == 2 and statuses[1] != 0, output
        assert left == []
        assert "error: the last checkpoint of the run, of step 4, could not be written: " in output
        assert "There is none. Fix that and start the same command again" in output


def save_in_read_only(rank: int, folder: Path) -> int:
    """As a user who may not write there: root may anywhere."""
    if os.geteuid() == 0:
        os.setuid(65534)
    store = CheckpointStore(folder, 2)
    print(save_alone(store, 5, write_state).problem, save_alone(store, 10, write_state).problem, sep="\n")
    return 0


def test_a_read_only_folder() -> None:
    with tempfile.TemporaryDirectory(dir="/tmp") as name:
        folder = Path(name)
        good = Path(save_alone(CheckpointStore(folder, 2), 1, write_state).path)
        for path in (folder, good.parent, good):
            path.chmod(0o555)
        ranks = start_ranks(1, folder, save_in_read_only, folder) if os.geteuid() == 0 else None
        output = ""
        if ranks is None:  # no other user is needed
            output = save_alone(CheckpointStore(folder, 2), 5, write_state).problem
        else:
            assert ranks.wait() == {0: 0}, ranks.output(0)
            output = ranks.output(0)
        assert f"Permission denied ({good.parent}/.writing-step-00000005)" in output
        assert CheckpointStore(folder).faults(good) == [] and CheckpointStore(folder).newest() == good
        for path in (folder, good.parent, good):
            path.chmod(0o755)


def hold(rank: int, folder: Path) -> int:
    with hold_run_dir(folder, is_first=True):
        print("held", flush=True)
        signal.pause()
    return 0


class TestLock:
    def test_the_second_job_is_refused_until_the_first_is_dead(self, tmp_path: Path) -> None:
        folder = tmp_path / "run"
        job = start_ranks(1, tmp_path, hold, folder)
        try:
            job.wait_for_output(0, "held")
            with (
                pytest.raises(ConfigError) as error,
                hold_run_dir(folder, is_first=True, wait_seconds=0.0),
            ):
                pass
            holder = f"train.save_dir {folder} is in use: process {job.pids[0]} on {os.uname().nodename} trains there"
            assert str(error.value).startswith(holder)
            with hold_run_dir(folder, is_first=False):  # ranks of the job itself
                pass
        finally:
            job.kill()
        with hold_run_dir(folder, is_first=True, wait_seconds=0.0):
            assert str(os.getpid()) in (folder / ".lock").read_text()
        assert (folder / ".lock").read_text() == ""

    def test_without_locks_in_the_file_system(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """The record of the holder counts while its process is alive: not one of another start time, or pid."""

        def no_locks(*arguments: object) -> None:
            raise OSError(errno.ENOLCK, "No locks available")

        monkeypatch.setattr(run_lock.fcntl, "lockf", no_locks)
        own, host = run_lock._own_record(), os.uname().nodename
        parent = {"host": host, "pid": os.getppid(), "started": run_lock._start_of(os.getppid())}
        lock = tmp_path / ".lock"
        for record, free in (
            (own, True),
            (parent, False),
            ({**parent, "started": "1"}, True),
            ({"host": host, "pid": 2**22 + 1, "started": ""}, True),
            ({"host": "elsewhere", "pid": 1, "started": "1"}, False),
            ({}, True),
        ):
            lock.write_text(run_lock.json.dumps(record))
            if free:
                with hold_run_dir(tmp_path, is_first=True, wait_seconds=0.0):
                    pass
            else:
                with (
                    pytest.raises(ConfigError, match=f"process {record['pid']} on {record['host']} trains there"),
                    hold_run_dir(tmp_path, is_first=True, wait_seconds=0.0),
                ):
                    pass


def test_a_clock_that_jumps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither the wall clock nor the times of files decide anything: order is by step, and durations by a steady clock."""
    jumps = itertools.cycle([0.0, 4e9, -1e9])
    monkeypatch.setattr(time, "time", lambda: next(jumps))
    store, reports = CheckpointStore(tmp_path, 2), []
    saver = lone_saver(store, reports, background=True)
    with hold_run_dir(tmp_path, is_first=True):
        for step, written in ((5, 3e9), (10, 1.0), (15, 2e9)):
            saver.save(step, lambda _: snapshot(write_state))
            outcome = saver.wait()
            assert outcome is not None and 0.0 <= outcome.stalled <= outcome.seconds < 60.0
            os.utime(Path(outcome.path), (written, written))
    (store.folder / "latest").unlink()
    assert [path.name for path in store.candidates()] == ["step-00000015", "step-00000010"]
