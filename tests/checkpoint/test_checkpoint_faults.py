"""Faults of a checkpoint on disk: each is detected and reported, and the newest good checkpoint is used instead."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from megatronish.checkpoint.manifest import MANIFEST_FILE, DamagedCheckpointError, read_manifest, write_manifest
from megatronish.checkpoint.store import CheckpointStore
from megatronish.config.run import RunConfig
from megatronish.errors import ConfigError, UserError
from megatronish.inference.load import load_for_inference
from megatronish.launch.process import Rank
from megatronish.launch.rendezvous import join_rendezvous, join_rendezvous_from_env
from megatronish.training.setup.resume_point import choose_checkpoint, shares
from megatronish.verify.resume import checkpoint_digests
from tests.distributed import run_ranks
from tests.runs import make_dataset, small_run

OLD, NEW = "step-00000002", "step-00000004"
READ_FOR_INFERENCE = ["model.safetensors", "model_config.json", "tokenizer_record.json", "state.json"]


def pretrain_rank(rank: int, config: RunConfig, world_size: int) -> None:
    from megatronish.training.loop import pretrain

    pretrain(config, Rank(rank, world_size, rank, world_size, "test"))


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    return make_dataset(tmp_path_factory.mktemp("data"))


def four_steps(data: str, run_dir: Path) -> RunConfig:
    return small_run(data, run_dir, {"megatronish": {"train": {"steps": 4, "save_interval": 2}}})


@pytest.fixture(scope="module")
def trained(data: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run on two ranks with two checkpoints."""
    run_dir = tmp_path_factory.mktemp("faults") / "run"
    run_ranks(2, pretrain_rank, four_steps(data, run_dir), 2, group=False)
    return run_dir


@pytest.fixture
def run_dir(trained: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(trained, tmp_path / "run"))


def files_of(checkpoint: Path) -> list[str]:
    return sorted(path.relative_to(checkpoint).as_posix() for path in checkpoint.rglob("*") if path.is_file())


def choose(run_dir: Path, resume: str = "auto") -> Path | None:
    return choose_checkpoint(CheckpointStore(run_dir, 2), resume, join_rendezvous(0, 1, "", 0, 1.0))


def falls_back(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> str:
    """Resume from the older checkpoint; what is printed about the newer one, which gets its name back afterwards."""
    folder = run_dir / "checkpoints"
    assert choose(run_dir) == folder / OLD
    output = capsys.readouterr().err
    assert f"WARNING: resuming from {folder / OLD} instead; 2 steps are trained again" in output
    if (folder / f"damaged-{NEW}").exists():
        assert f"WARNING: it is kept as damaged-{NEW}" in output
        (folder / f"damaged-{NEW}").rename(folder / NEW)
    return output


def each_change(folder: Path, change: Callable[[bytes], list[bytes]]) -> list[tuple[str, bytes, bytes]]:
    """(file, its contents, contents that a fault leaves) for each file of a checkpoint."""
    found = []
    for name in files_of(folder):
        original = (folder / name).read_bytes()
        found += [(name, original, wrong) for wrong in change(original)]
    return found


def tenths(original: bytes) -> list[bytes]:
    return [original[: len(original) * part // 10] for part in range(10)]


def flipped(original: bytes) -> list[bytes]:
    """A bit in the middle, in the first and in the last byte."""
    offsets = {0, len(original) // 2, len(original) - 1}
    return [original[:at] + bytes([original[at] ^ (1 << at % 8)]) + original[at + 1 :] for at in offsets]


@pytest.mark.parametrize("change", [tenths, flipped])
def test_every_file_torn_or_changed(
    change: Callable[[bytes], list[bytes]], run_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = run_dir / "checkpoints" / NEW
    assert (
        len(files_of(folder)) == 8
    )  # two ranks' states, weights, configuration, tokenizer record, run, state, manifest
    for name, original, wrong in each_change(folder, change):
        (folder / name).write_bytes(wrong)
        output = falls_back(run_dir, capsys)
        assert f"cannot resume from {folder}: " in output and name in output
        if name in READ_FOR_INFERENCE:
            with pytest.raises(UserError, match=rf"{NEW} is damaged: {name} has"):
                load_for_inference(folder)
        (folder / name).write_bytes(original)
    assert choose(run_dir) == folder, "and with every file as it was it is good"
    assert load_for_inference(folder).info.step == 4


def test_a_missing_file(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A rank's shard above all."""
    folder = run_dir / "checkpoints" / NEW
    for name in set(files_of(folder)) - {MANIFEST_FILE}:
        original = (folder / name).read_bytes()
        (folder / name).unlink()
        assert f"{name} is missing" in falls_back(run_dir, capsys)
        (folder / name).write_bytes(original)


def test_no_manifest(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """As in a copy that was not finished, or a checkpoint of a version before manifests, which stays under its name."""
    folder = run_dir / "checkpoints" / NEW
    (folder / MANIFEST_FILE).unlink()
    assert f"{folder} has no manifest.json" in falls_back(run_dir, capsys)
    assert folder.exists()
    with pytest.raises(UserError, match=r"no manifest.json.*--adopt"):
        load_for_inference(folder)
    write_manifest(folder, 4)
    assert choose(run_dir) == folder


def test_a_file_too_many(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A loader that looks for files by pattern would read it."""
    folder = run_dir / "checkpoints" / NEW
    shutil.copy(folder / "engine" / "state-rank-00000.safetensors", folder / "engine" / "state-rank-00002.safetensors")
    assert "engine/state-rank-00002.safetensors is not in the manifest" in falls_back(run_dir, capsys)
    (folder / "engine" / "state-rank-00002.safetensors").unlink()
    (folder / "notes.txt").write_text("of the user")
    assert choose(run_dir) == folder


def test_latest_points_nowhere(run_dir: Path) -> None:
    latest = run_dir / "checkpoints" / "latest"
    for wrong in ("step-00000099\n", "", "../../elsewhere\n", f"{NEW}\0"):
        latest.write_text(wrong)
        assert choose(run_dir) == run_dir / "checkpoints" / NEW
    latest.write_text(f"{OLD}\n")
    assert choose(run_dir) == run_dir / "checkpoints" / OLD


def test_none_is_good(run_dir: Path) -> None:
    """One message with all of them; nothing is renamed, and training does not begin afresh."""
    folder = run_dir / "checkpoints"
    (folder / NEW / "state.json").write_text("{}")
    (folder / OLD / MANIFEST_FILE).unlink()
    with pytest.raises(ConfigError) as error:
        choose(run_dir)
    lines = str(error.value).splitlines()
    assert lines[0] == "none of 2 checkpoint(s) that this run could resume from is good:"
    assert lines[1].startswith(f"  {folder / NEW}: state.json has 2 bytes, not ")
    assert lines[2].startswith(f"  {folder / OLD}: {folder / OLD} has no manifest.json")
    assert sorted(os.listdir(folder)) == ["latest", OLD, NEW]


def test_a_run_resumes_from_the_good_one(data: str, run_dir: Path) -> None:
    """Two steps are trained again, to the contents of before."""
    newest = run_dir / "checkpoints" / NEW
    before = checkpoint_digests(newest)
    assert len(before[0]) > 20
    weights = newest / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    run_ranks(2, pretrain_rank, four_steps(data, run_dir), 2, group=False)
    assert (newest.parent / f"damaged-{NEW}").exists()
    assert checkpoint_digests(newest) == before


def test_a_checkpoint_given_by_path(run_dir: Path) -> None:
    """It is not replaced by another one."""
    folder = run_dir / "checkpoints"
    (folder / NEW / "run.json").unlink()
    with pytest.raises(ConfigError, match="none of 1 checkpoint"):
        choose(run_dir, str(folder / NEW))
    assert choose(run_dir, str(folder / OLD)) == folder / OLD


def test_a_rollback_skips_a_damaged_one(run_dir: Path) -> None:
    store, folder = CheckpointStore(run_dir, 2), run_dir / "checkpoints"
    assert [store.newest_before(step) for step in (5, 4, 2)] == [folder / NEW, folder / OLD, None]
    (folder / NEW / "state.json").write_text('{"st')
    assert store.newest_before(5) == folder / OLD


def choose_on_rank(rank: int, run_dir: Path) -> Path | None:
    return choose_checkpoint(CheckpointStore(run_dir, 2), "auto", join_rendezvous_from_env(60.0))


@pytest.mark.distributed
def test_all_ranks_resume_from_the_same(run_dir: Path) -> None:
    """Only one rank reads the damaged file; all resume from the older checkpoint."""
    folder = run_dir / "checkpoints"
    path = folder / NEW / "engine" / "state-rank-00001.safetensors"
    original = path.read_bytes()
    path.write_bytes(original[:-1] + bytes([original[-1] ^ 1]))
    files = read_manifest(folder / NEW).files
    readers = [share for share in shares(files, 3) if "engine/state-rank-00001.safetensors" in share]
    assert len(readers) == 1 and sorted(name for share in shares(files, 3) for name in share) == sorted(files)
    assert run_ranks(3, choose_on_rank, run_dir, group=False) == [folder / OLD] * 3
    assert (folder / f"damaged-{NEW}").exists()


@pytest.mark.parametrize(
    "name", ["../../secret", "/etc/passwd", "engine/../../x", "..", "", "./state.json", "C:/x", "a\\b"]
)
def test_a_manifest_that_leads_outside(name: str, run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Its own hash is right, as a forger's would be; nothing it names is opened."""
    folder = run_dir / "checkpoints" / NEW
    (run_dir / "secret").write_text("x")
    manifest = read_manifest(folder)
    forged = type(manifest)(4, {**manifest.files, name: manifest.files["state.json"]})
    (folder / MANIFEST_FILE).write_text(forged.to_text())
    assert f"names {name!r}, which is outside its folder" in falls_back(run_dir, capsys)
    with pytest.raises(DamagedCheckpointError, match="outside its folder"):
        load_for_inference(folder)


def test_links_are_not_followed(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Neither a file that is one nor a folder, though what they lead to has the right contents."""
    folder = run_dir / "checkpoints" / NEW
    (folder / "state.json").rename(run_dir / "state.json")
    (folder / "state.json").symlink_to(run_dir / "state.json")
    assert "state.json is a link, which may lead outside" in falls_back(run_dir, capsys)
    (folder / "state.json").unlink()
    (run_dir / "state.json").rename(folder / "state.json")
    (folder / "engine").rename(run_dir / "engine")
    (folder / "engine").symlink_to(run_dir / "engine")
    assert "engine/state-rank-00000.safetensors is a link" in falls_back(run_dir, capsys)


def test_a_manifest_of_a_later_version(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = run_dir / "checkpoints" / NEW
    raw = json.loads((folder / MANIFEST_FILE).read_text())
    (folder / MANIFEST_FILE).write_text(json.dumps({**raw, "version": 2}))
    assert "has version 2; this megatronish reads version 1" in falls_back(run_dir, capsys)
    assert folder.exists(), "it may be good"


def test_a_file_that_cannot_be_read(
    run_dir: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It may be readable tomorrow: the checkpoint keeps its name."""
    folder = run_dir / "checkpoints" / NEW
    real = Path.open

    def failing(self: Path, *args: object, **named: object) -> object:
        if self == folder / "model.safetensors":
            raise OSError(5, "Input/output error")
        return real(self, *args, **named)  # type: ignore[call-overload]

    with monkeypatch.context() as patch, contextlib.suppress(KeyError):
        patch.setattr(Path, "open", failing)
        output = falls_back(run_dir, capsys)
    assert "model.safetensors cannot be read (Input/output error)" in output
    assert folder.exists()
