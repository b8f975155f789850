"""tools/verify_resume.py accepts a run that resumes bit for bit, and reports one that does not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from megatronish.checkpoint.optimizer_shards import MASTER
from megatronish.checkpoint.zero_state import LocalOptimizerState
from megatronish.verify import resume
from megatronish.verify.attempts import digest_of
from megatronish.verify.kills import KINDS, Kill, plan_kills
from megatronish.verify.resume import ResumeProof, small_run

pytestmark = pytest.mark.distributed


def prove(folder: Path, kills: int, ranks: int = 1) -> tuple[Any, list[str]]:
    lines: list[str] = []
    proof = ResumeProof(small_run(folder), ranks, kills, 2, seed=4, folder=folder, progress=lambda _: None)
    return proof.prove(lines.append), lines


@pytest.mark.slow
def test_a_kill_of_each_kind(tmp_path: Path) -> None:
    proof, lines = prove(tmp_path, 3)
    assert proof.problems == []
    assert sorted(kill["kind"] for kill in proof.kills) == sorted(KINDS)
    assert len(lines) == 4 and proof.steps_compared >= 16
    assert len(proof.tensors) > 30 and proof.state["step"] == 16 and proof.state["samples"] == 64


@pytest.mark.slow
def test_a_moment_that_is_not_restored_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The ranks are forked and inherit the patched load."""
    load = LocalOptimizerState.load

    def forgetful(self: LocalOptimizerState, saved: Any) -> None:
        load(self, saved)
        for _, part in self._slices():
            part.of(self._torch.state[part.flat]["exp_avg_sq"]).mul_(2.0)

    monkeypatch.setattr(LocalOptimizerState, "load", forgetful)
    # When the fifth step begins, the checkpoint of the second is complete: the save of the fourth waited for it.
    monkeypatch.setattr(resume, "plan_kills", lambda *_: [Kill("step", 0, 4.0, 0.0)])
    proof, _ = prove(tmp_path, 1)
    found = "\n".join(proof.problems)
    assert "different loss_sum" in found and "the last checkpoints differ in " in found
    assert f":{MASTER}/" in found and "exp_avg_sq/" in found and "batches" not in found


def test_kills_are_of_every_kind_and_the_same_for_a_seed() -> None:
    kills = plan_kills(20, 4, 3, seed=0)
    assert kills == plan_kills(20, 4, 3, seed=0) != plan_kills(20, 4, 3, seed=1)
    count = [sum(kill.kind == kind for kill in kills) for kind in KINDS]
    assert sorted(count) == [6, 7, 7]
    assert {kill.rank for kill in kills if kill.kind != "rename"} == {0, 1, 2, 3}
    assert all(kill.rank == 0 and kill.moment < 6 for kill in kills if kill.kind == "rename")
    assert all(kill.moment < 6 for kill in kills if kill.kind == "step")
    assert {kill.save for kill in kills if kill.kind != "step"} == {1, 2}


def test_digests_depend_on_bits_shapes_and_types() -> None:
    plain = torch.tensor([1.0, -0.0])
    others = [torch.tensor([1.0, 0.0]), plain[None], plain.double(), plain.view(torch.int32), [1.0, 0.0]]
    assert digest_of([plain]) == digest_of([plain.clone()])
    assert len({digest_of([plain]), *(digest_of([other]) for other in others)}) == 6
