"""Training on divided matrices equals a plain single-process loop: losses, gradient norms, every weight."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from megatronish.checkpoint.weights import load_model
from megatronish.config.run import RunConfig
from megatronish.data.samples.dataset import open_dataset
from megatronish.data.samples.splits import split_documents
from megatronish.data.samples.validation import ValidationLoader
from megatronish.model.transformer import Transformer
from tests.distributed import run_ranks
from tests.runs import Trace, engine_loop, make_dataset, plain_loop, small_run
from tests.training.test_resume import pretrain_rank, read_losses
from tests.training.test_zero_parity import distance

pytestmark = pytest.mark.distributed
# Plain SGD would show a wrong scale of the gradient, which AdamW hides; clipping at 0.5 shows it too, for the norms and
# the clipped steps of the reference must agree.
ONE_KV_HEAD = {"num_kv_heads": 1, "tie_embeddings": False, "qk_norm": True}
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "tp2 zero0": (2, {"tensor": 2}),
    "tp2 zero1 sequence": (2, {"tensor": 2, "tensor_sequence": True}),
    "tp2dp2 zero0": (4, {"tensor": 2}),
    "tp2dp2 zero1": (4, {"tensor": 2, "tensor_sequence": True}),
    "tp2dp2 zero2": (4, {"tensor": 2}),
    "tp4 zero1": (4, {"tensor": 4}),
    "sp2 zero0": (2, {"sequence": 2}),
    "sp4 zero1": (4, {"sequence": 4}),
    "sp2dp2 zero2": (4, {"sequence": 2}),
    "sp2dp2 zero3": (4, {"sequence": 2}),
    "pp2 zero1": (2, {"pipeline": 2}),
    "pp4 zero1": (4, {"pipeline": 4}),
    "pp2dp2 zero1": (4, {"pipeline": 2}),
    "tp2pp2 zero1": (4, {"tensor": 2, "pipeline": 2, "tensor_sequence": True}),
}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    return make_dataset(tmp_path_factory.mktemp("data"))


def layout_run(data: str, folder: Path, layout: str, changes: dict[str, Any]) -> RunConfig:
    stage = int(layout.split("zero")[1][0])
    ours = {**changes.get("megatronish", {}), "parallel": LAYOUTS[layout][1]}
    return small_run(data, folder, {**changes, "zero_optimization": {"stage": stage}, "megatronish": ours})


def data_size(layout: str) -> int:
    ranks, parallel = LAYOUTS[layout]
    return ranks // (parallel.get("tensor", 1) * parallel.get("pipeline", 1) * parallel.get("sequence", 1))


def check(found: Trace, expected: Trace, losses: float, weights: float) -> None:
    torch.testing.assert_close(found.losses, expected.losses, rtol=losses, atol=0)
    torch.testing.assert_close(found.norms, expected.norms, rtol=losses, atol=0)
    for name, weight in expected.weights.items():
        torch.testing.assert_close(
            found.weights[name].float(), weight, rtol=0, atol=weights, msg=lambda m, n=name: f"{n}: {m}"
        )


PLAIN, ONE_HEAD = "tied, two KV heads", "one KV head"
# Both models where heads are divided and where a table has two ends; two layers do not fill four stages.
BOTH = ("pp2dp2 zero1", "sp4 zero1", "tp2dp2 zero1", "tp2pp2 zero1", "tp4 zero1")
CASES = [(name, PLAIN) for name in LAYOUTS if name != "pp4 zero1"] + [(name, ONE_HEAD) for name in BOTH]


@pytest.mark.parametrize(("layout", "model"), CASES)
def test_fp32_equals_the_plain_loop(layout: str, model: str, data: str, tmp_path: Path) -> None:
    """10 steps within 1e-5; clipping is active, micro batches hold uneven token counts, 257 rows of vocabulary."""
    ranks, _ = LAYOUTS[layout]
    changes: dict[str, Any] = {"megatronish": {"model": ONE_KV_HEAD}} if model == ONE_HEAD else {}
    config = layout_run(data, tmp_path, layout, changes)
    size = data_size(layout)
    plain = plain_loop(config, size)
    assert max(plain.norms) > config.deepspeed.gradient_clipping, "clipping must act for this test to mean something"
    traces = run_ranks(ranks, engine_loop, config, size)
    # AdamW divides by the gradient's own size: where that is near 0, 1e-7 of rounding moves a weight by up to 1e-5.
    check(traces[0], plain, losses=1e-5, weights=2e-5)
    for trace in traces[1:]:
        assert trace.losses == traces[0].losses and not trace.weights


@pytest.mark.parametrize(
    ("accumulation", "recompute"), [(1, "full"), (2, "selective"), (7, "none")], ids=["one", "fewer", "more"]
)
def test_a_pipeline_takes_any_number_of_micro_batches(
    accumulation: int, recompute: str, data: str, tmp_path: Path
) -> None:
    """One, fewer than stages, and more; blocks are computed again in the backward pass, wholly or in part, or not."""
    changes: dict[str, Any] = {
        "gradient_accumulation_steps": accumulation,
        "megatronish": {"model": {"num_layers": 4}, "train": {"steps": 4, "activation_checkpointing": recompute}},
    }
    config = layout_run(data, tmp_path, "pp4 zero1", changes)
    check(run_ranks(4, engine_loop, config, 1)[0], plain_loop(config, 1), losses=1e-5, weights=2e-5)


@pytest.mark.parametrize("fp32_sums", [False, True], ids=["bf16 sums", "fp32 sums"])
@pytest.mark.parametrize("layout", ["tp2dp2 zero1", "tp2dp2 zero2", "pp2dp2 zero1", "tp2pp2 zero1"])
def test_bf16_is_within_rounding_of_the_plain_loop(layout: str, fp32_sums: bool, data: str, tmp_path: Path) -> None:
    """No further from the plain bf16 loop than that loop is from itself when its initial weights are rounded otherwise.

    fp32_sums: micro batches are added up in fp32, by another optimizer class of DeepSpeed than otherwise.
    """
    changes: dict[str, Any] = {"bf16": {"enabled": True}}
    if fp32_sums:
        changes["data_types"] = {"grad_accum_dtype": "fp32"}
    config = layout_run(data, tmp_path, layout, changes)
    size = data_size(layout)
    plain, *others = [plain_loop(config, size, perturb=seed) for seed in (None, 1, 2)]
    trace = run_ranks(4, engine_loop, config, size)[0]
    for kind in ("losses", "norms"):
        spread = max(distance(getattr(other, kind), getattr(plain, kind)) for other in others)
        found = distance(getattr(trace, kind), getattr(plain, kind))
        print(f"{layout} bf16 {kind}: {found:.2e} from the plain loop; rounding spread {spread:.2e}")
        assert found <= spread, f"{kind} differ by {found:.2e}, rounding alone gives {spread:.2e}"


DROPOUT = {"residual_dropout": 0.1, "attention_dropout": 0.1, "embedding_dropout": 0.1}


@pytest.mark.parametrize(
    "layout", ["tp2dp2 zero2", "tp2 zero1 sequence", "tp2pp2 zero1", "pp2dp2 zero1", "sp2dp2 zero3"]
)
def test_a_run_resumes_bit_for_bit_and_its_checkpoint_is_that_of_one_process(
    layout: str, data: str, tmp_path: Path
) -> None:
    """The full trainer, with dropout: steps 5-8 after a stop at 4 have the same bits, and one process reads the weights."""
    ranks = LAYOUTS[layout][0]
    ours = {"model": DROPOUT, "train": {"steps": 8, "save_interval": 4, "eval_interval": 4}}

    def config(folder: str) -> RunConfig:
        return layout_run(data, tmp_path / folder, layout, {"megatronish": ours})

    run_ranks(ranks, pretrain_rank, config("unbroken"), ranks, group=False)
    shutil.copytree(tmp_path / "unbroken", tmp_path / "stopped")
    checkpoints = tmp_path / "stopped" / "checkpoints"
    shutil.rmtree(checkpoints / "step-00000008")
    (checkpoints / "latest").write_text("step-00000004\n")
    run_ranks(ranks, pretrain_rank, config("stopped"), ranks, group=False)
    assert read_losses(tmp_path / "stopped") == read_losses(tmp_path / "unbroken")

    lines = [json.loads(line) for line in (tmp_path / "unbroken" / "metrics.jsonl").read_text().splitlines()]
    logged = [line for line in lines if "validation_loss" in line][-1]["validation_loss"]
    model = load_model(tmp_path / "stopped" / "checkpoints" / "step-00000008")
    assert held_out_loss(model, config("stopped")) == pytest.approx(logged, rel=1e-5)  # fp32 sums in another order


@torch.no_grad()
def held_out_loss(model: Transformer, config: RunConfig) -> float:
    """Mean loss over the held-out documents, in one process."""
    ours = config.megatronish
    dataset = open_dataset(ours.data.path)
    held_out = split_documents(dataset.reader.num_documents, ours.data.validation_fraction).validation
    eod, length = dataset.manifest.tokenizer.eod_id, ours.model.seq_length
    loader = ValidationLoader(dataset.reader, held_out, length, 2, 0, 1, eod_id=eod, document_mask=True)
    sums = [model.loss(**batch) for batch in loader]
    return float(sum(loss for loss, _ in sums) / sum(count for _, count in sums))
