"""A run that begins with a Hugging Face model's weights: its first loss is that model's, and it goes back as one."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from megatronish.checkpoint.store import CheckpointStore
from megatronish.checkpoint.weights import load_model
from megatronish.config.run import RunConfig
from megatronish.data.tokenizers.tokenizer import train_bpe
from megatronish.errors import UserError
from megatronish.interop.huggingface import export_model
from megatronish.launch.process import Rank
from megatronish.training.setup.preparation import prepare
from tests.distributed import run_ranks
from tests.runs import make_dataset, rank_loader, small_run

pytestmark = pytest.mark.distributed


def save_llama(folder: Path) -> PreTrainedModel:
    """A Llama of bytes, in three files, with weights so large that no other model has its loss."""
    torch.manual_seed(5)
    config = LlamaConfig(
        vocab_size=257,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        initializer_range=0.5,
        bos_token_id=None,
        eos_token_id=256,
    )
    model = LlamaForCausalLM(config).eval()
    model.save_pretrained(folder, max_shard_size="60KB")
    return model


# Ranks, ZeRO stage, how the model is divided.
LAYOUTS: dict[str, tuple[int, int, dict[str, int]]] = {
    "one": (1, 0, {}),
    "zero1": (2, 1, {}),
    "zero3": (2, 3, {}),
    "tp2": (2, 1, {"tensor": 2}),
    "pp2": (2, 1, {"pipeline": 2}),
    "tp2pp2": (4, 1, {"tensor": 2, "pipeline": 2}),
}


def run_from(folder: Path, data: str, save_dir: Path, layout: str, steps: int = 3) -> RunConfig:
    _, stage, parallel = LAYOUTS[layout]
    changes = {"zero_optimization": {"stage": stage}, "megatronish": {"parallel": parallel}}
    raw = small_run(data, save_dir, changes).to_json()
    raw["megatronish"]["model"] = {"from_hf": str(folder), "seq_length": 32}
    raw["megatronish"]["data"]["document_mask"] = False
    raw["megatronish"]["train"] |= {"steps": steps}
    return RunConfig.from_dict(raw, "test")


def pretrain_rank(rank: int, config: RunConfig, ranks: int) -> None:
    from megatronish.training.loop import pretrain

    pretrain(config, Rank(rank, ranks, rank, ranks, "test"))


def losses(run_dir: Path) -> dict[int, float]:
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: line["loss"] for line in lines if "loss" in line}


@torch.no_grad()
def first_loss(model: Any, config: RunConfig, data_size: int) -> float:
    """Mean loss of transformers on the tokens of the run's first step, 2 micro batches per data-parallel rank."""
    total, count = 0.0, 0
    for rank in range(data_size):
        loader = rank_loader(config, rank, data_size)
        for _ in range(2):
            batch = next(loader)
            logits = model(batch["tokens"]).logits
            total += F.cross_entropy(logits.flatten(0, 1), batch["labels"].flatten(), reduction="sum").item()
            count += int((batch["labels"] != -100).sum())
        loader.close()
    return total / count


@pytest.mark.parametrize("layout", [name for name in LAYOUTS if name != "one"])
def test_the_first_loss_equals_that_of_transformers(layout: str, tmp_path: Path) -> None:
    """And after three steps the checkpoint, whatever the layout, is exported unchanged."""
    data, theirs = make_dataset(tmp_path), save_llama(tmp_path / "hf")
    ranks, _, parallel = LAYOUTS[layout]
    config = run_from(tmp_path / "hf", data, tmp_path / "run", layout)
    run_ranks(ranks, pretrain_rank, config, ranks, group=False)
    found = losses(tmp_path / "run")
    expected = first_loss(theirs, config, ranks // math.prod(parallel.values()))
    assert list(found) == [1, 2, 3] and found[1] == pytest.approx(expected, rel=1e-5)
    assert found[1] > 6.5 and found[2] != found[1]  # random bytes would cost 5.55 nats, random small weights too

    checkpoint = CheckpointStore.find(tmp_path / "run")
    export_model(checkpoint, tmp_path / "out")
    tokens = torch.arange(32)[None]
    with torch.no_grad():
        ours = load_model(checkpoint)(tokens)
        exported = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32).eval()(tokens).logits
        original = theirs(tokens).logits
    scale = original.abs().max()
    assert (ours - exported).abs().max() < 1e-5 * scale
    assert (ours - original).abs().max() > 1e-3 * scale


def test_a_resumed_run_uses_its_own_checkpoint(tmp_path: Path) -> None:
    data = make_dataset(tmp_path)
    save_llama(tmp_path / "hf")
    for steps in (2, 3):
        config = run_from(tmp_path / "hf", data, tmp_path / "run", "one", steps)
        run_ranks(1, pretrain_rank, config, 1, group=False)
    found = losses(tmp_path / "run")
    assert list(found) == [1, 2, 3] and found[3] < found[1] - 1e-3  # not the weights of the folder once more


def test_mismatches_are_rejected_before_the_rendezvous(tmp_path: Path) -> None:
    data = make_dataset(tmp_path)
    save_llama(tmp_path / "hf")
    config, rank = run_from(tmp_path / "hf", data, tmp_path / "run", "zero1"), Rank(0, 1, 0, 1, "test")
    assert prepare(config, rank).imported is not None
    train_bpe([], 257).save(tmp_path / "x")
    (tmp_path / "x.tokenizer.json").rename(tmp_path / "hf" / "tokenizer.json")
    with pytest.raises(UserError, match="was made with another tokenizer than that of the model in model.from_hf"):
        prepare(config, rank)
    (tmp_path / "hf" / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(UserError, match="model-00002-of-00003.safetensors: missing"):
        prepare(config, rank)
