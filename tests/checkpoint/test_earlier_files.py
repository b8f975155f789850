"""Checkpoints and data sets written by earlier commits are still read: tests/golden/earlier_files holds some of each."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from megatronish.config.run import RunConfig
from megatronish.data.samples.dataset import open_dataset
from tests.distributed import run_ranks
from tests.training.test_resume import pretrain_rank, read_losses

EARLIER = Path(__file__).parents[1] / "golden" / "earlier_files"
DATA = EARLIER / "data" / "old_text_document"
# Relative. In fp32 another CPU sums in another order: 1e-5 of a loss, as for the golden losses, and 1e-4 of a gradient norm.
# In bf16 a rounding (2^-9) of single gradients goes either way: with Muon, whose update does not shrink with the gradient,
# moments that are lost (zeroed in these files, measured) change the loss of the last step by 2e-3, ten times the bound.
BOUNDS = {"zero2_adamw": (1e-5, 1e-4), "tp2_zero1": (1e-5, 1e-4), "zero2_muon_bf16": (2e-4, 2e-2)}


@pytest.mark.distributed
@pytest.mark.parametrize("name", BOUNDS)
def test_an_earlier_checkpoint_resumes(name: str, tmp_path: Path) -> None:
    """Steps 5 to 8 after a resume at step 4 have the losses and gradient norms that the commit that saved it had."""
    saved = EARLIER / name / "step-00000004"
    raw = json.loads((saved / "run.json").read_text())
    raw["megatronish"]["data"]["path"] = str(DATA)
    raw["megatronish"]["train"]["save_dir"] = str(tmp_path / "run")
    shutil.copytree(saved, tmp_path / "run" / "checkpoints" / saved.name)
    (tmp_path / "run" / "checkpoints" / "latest").write_text(saved.name + "\n")
    run_ranks(2, pretrain_rank, RunConfig.from_dict(raw, name), 2, group=False)
    expected = json.loads((EARLIER / "expected.json").read_text())["steps"][name]
    found = read_losses(tmp_path / "run")
    assert [step for step, _, _ in found] == [step for step, _, _ in expected]
    of_loss, of_norm = BOUNDS[name]
    for (_, loss, norm), (_, loss_then, norm_then) in zip(found, expected, strict=True):
        assert loss == pytest.approx(loss_then, rel=of_loss)
        assert norm == pytest.approx(norm_then, rel=of_norm)


def test_an_earlier_data_set_is_read() -> None:
    """Every document decodes to its text."""
    texts = [json.loads(line)["text"] for line in (EARLIER / "data" / "texts.jsonl").read_text().splitlines()]
    dataset = open_dataset(str(DATA))
    tokenizer = dataset.tokenizer()
    assert dataset.reader.num_documents == len(texts)
    for number, text in enumerate(texts):
        ids = dataset.reader.document(number).tolist()
        assert ids[-1] == tokenizer.eod_id
        assert tokenizer.decode(ids[:-1]) == text
