"""Lion against its algorithm, and which parameters fall into which group."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from megatronish.config.deepspeed_json import OptimizerConfig
from megatronish.config.model import ModelConfig
from megatronish.model.transformer import Transformer
from megatronish.training.optimizers import ADAM_EPS, Lion, build_torch_optimizer, parameter_groups

SHAPE: dict[str, Any] = {
    "vocab_size": 40,
    "num_layers": 2,
    "hidden_size": 16,
    "num_attention_heads": 2,
    "ffn_hidden_size": 24,
    "seq_length": 8,
}
SWITCHES: dict[str, dict[str, Any]] = {
    "llama": {},
    "tied, qk-norm": {"tie_embeddings": True, "qk_norm": True},
    "all biases": {
        "norm": "layernorm",
        "activation": "gelu",
        "attention_qkv_bias": True,
        "attention_out_bias": True,
        "mlp_bias": True,
    },
}


def config(kind: str, **params: Any) -> OptimizerConfig:
    return OptimizerConfig.model_validate({"type": kind, "params": {"lr": 0.01, **params}})


def lion_by_the_paper(
    theta: Tensor, gradients: list[Tensor], rates: list[float], betas: tuple[float, float], decay: float
) -> Tensor:
    """Chen et al. 2023, algorithm 2, line by line."""
    m = torch.zeros_like(theta)
    for g, eta in zip(gradients, rates, strict=True):
        c = betas[0] * m + (1 - betas[0]) * g
        theta = theta - eta * (torch.sign(c) + decay * theta)
        m = betas[1] * m + (1 - betas[1]) * g
    return theta


@pytest.mark.parametrize("betas", [(0.9, 0.99), (0.0, 0.5), (0.95, 0.0)])
@pytest.mark.parametrize("decay", [0.0, 0.3])
def test_lion(betas: tuple[float, float], decay: float) -> None:
    """Five steps in float64 at changing rates, over several tensors. 1e-12 is far above rounding, far below a wrong sign."""
    draw = torch.Generator().manual_seed(0)
    starts = [torch.randn(shape, generator=draw, dtype=torch.float64) for shape in ((5, 3), (7,), ())]
    gradients = [[torch.randn(p.shape, generator=draw, dtype=torch.float64) for p in starts] for _ in range(5)]
    rates = [0.1, 0.2, 0.05, 0.2, 0.01]
    params = [start.clone().requires_grad_() for start in starts]
    optimizer = Lion(params, lr=1.0, betas=betas, weight_decay=decay)
    for step, rate in zip(gradients, rates, strict=True):
        optimizer.param_groups[0]["lr"] = rate
        for p, g in zip(params, step, strict=True):
            p.grad = g.clone()
        optimizer.step()
    for index, start in enumerate(starts):
        expected = lion_by_the_paper(start, [step[index] for step in gradients], rates, betas, decay)
        torch.testing.assert_close(params[index].detach(), expected, rtol=0, atol=1e-12)


def test_lion_changes_neither_gradients_nor_parameters_without_one() -> None:
    used, idle = torch.ones(3, requires_grad=True), torch.ones(3, requires_grad=True)
    used.grad = torch.tensor([1.0, -2.0, 0.0])
    optimizer = Lion([used, idle], lr=0.5, weight_decay=0.1)
    assert optimizer.step(lambda: 7.0) == 7.0
    assert used.grad.tolist() == [1.0, -2.0, 0.0]
    assert used.tolist() == pytest.approx([0.95 - 0.5, 0.95 + 0.5, 0.95])
    assert idle.tolist() == [1.0, 1.0, 1.0]
    assert idle not in optimizer.state


def test_lion_rejects_invalid_settings() -> None:
    with pytest.raises(ValueError, match=r"lr 0 must be > 0"):
        Lion([torch.ones(1)], lr=0)
    with pytest.raises(ValueError, match=r"betas \(0.9, 1.0\) in \[0, 1\)"):
        Lion([torch.ones(1)], lr=1.0, betas=(0.9, 1.0))


def grouped(model: Transformer, groups: list[dict[str, Any]]) -> list[set[str]]:
    """The names of the parameters of each group."""
    names = {id(p): name for name, p in model.named_parameters()}
    return [{names[id(p)] for p in group["params"]} for group in groups]


@pytest.mark.parametrize("kind", ["AdamW", "Lion", "Muon"])
@pytest.mark.parametrize("switches", SWITCHES)
def test_every_parameter_is_in_exactly_one_group(kind: str, switches: str) -> None:
    """The tied embedding, which the model names twice, included; frozen parameters are in none."""
    model = Transformer(ModelConfig(**SHAPE, **SWITCHES[switches]), seed=0)
    groups = parameter_groups(model, config(kind))
    listed = [id(p) for group in groups for p in group["params"]]
    assert sorted(listed) == sorted({id(p) for p in model.parameters()})
    assert all(group["base_lr"] == group["lr"] == 0.01 for group in groups)
    frozen = next(model.parameters()).requires_grad_(False)
    assert id(frozen) not in [id(p) for group in parameter_groups(model, config(kind)) for p in group["params"]]


@pytest.mark.parametrize("kind", ["AdamW", "Lion"])
@pytest.mark.parametrize("switches", SWITCHES)
def test_matrices_decay_and_vectors_do_not(kind: str, switches: str) -> None:
    model = Transformer(ModelConfig(**SHAPE, **SWITCHES[switches]), seed=0)
    groups = parameter_groups(model, config(kind, weight_decay=0.1))
    decayed, spared = grouped(model, groups)
    assert [group["weight_decay"] for group in groups] == [0.1, 0.0]
    vectors = {name for name, p in model.named_parameters() if p.ndim == 1}
    assert spared == vectors
    assert all("norm" in name or name.endswith("bias") for name in spared)
    assert not any("norm" in name or name.endswith("bias") for name in decayed)
    assert "embedding.weight" in decayed


@pytest.mark.parametrize("switches", SWITCHES)
def test_muon_takes_exactly_the_matrices_of_the_blocks(switches: str) -> None:
    model = Transformer(ModelConfig(**SHAPE, **SWITCHES[switches]), seed=0)
    groups = parameter_groups(model, config("Muon", lr=0.02, adam_lr=0.001, weight_decay=0.1))
    muon, outer, vectors = grouped(model, groups)
    assert muon == {name for name, p in model.named_parameters() if name.startswith("blocks.") and p.ndim == 2}
    assert outer == {"embedding.weight"} | ({"head.weight"} if not model.config.tie_embeddings else set())
    assert vectors == {name for name, p in model.named_parameters() if p.ndim == 1}
    assert [group["use_muon"] for group in groups] == [True, False, False]
    assert [group["base_lr"] for group in groups] == [0.02, 0.001, 0.001]
    assert [group["weight_decay"] for group in groups] == [0.1, 0.1, 0.0]
    assert [p.use_muon for p in model.parameters()] == [name in muon for name, _ in model.named_parameters()]


def test_muon_settings() -> None:
    """Defaults, and a momentum of 0, which is a setting and not a default."""
    model = Transformer(ModelConfig(**SHAPE), seed=0)
    muon, adam, _ = parameter_groups(model, config("Muon", betas=[0.8, 0.9], eps=1e-6, momentum=0.0))
    assert (muon["momentum"], adam["betas"], adam["eps"], adam["lr"]) == (0.0, (0.8, 0.9), 1e-6, 0.01)
    muon, adam, _ = parameter_groups(model, config("Muon"))
    assert (muon["momentum"], adam["betas"], adam["eps"]) == (0.95, (0.9, 0.95), ADAM_EPS)


def test_zero3_parameters_count_by_their_full_shape() -> None:
    """ZeRO-3 leaves a partitioned parameter empty and keeps its shape in `ds_shape`."""
    model = Transformer(ModelConfig(**SHAPE), seed=0)
    before = grouped(model, parameter_groups(model, config("AdamW")))
    for p in model.parameters():
        p.ds_shape = p.shape
        p.data = torch.empty(0)
    assert grouped(model, parameter_groups(model, config("AdamW"))) == before


@pytest.mark.parametrize(
    ("kind", "params", "betas"),
    [("AdamW", {}, (0.9, 0.95)), ("AdamW", {"betas": [0.5, 0.6]}, (0.5, 0.6)), ("Lion", {}, (0.9, 0.99))],
)
def test_built_optimizer_has_the_settings(kind: str, params: dict[str, Any], betas: tuple[float, float]) -> None:
    model = Transformer(ModelConfig(**SHAPE), seed=0)
    settings = config(kind, weight_decay=0.2, **params)
    optimizer = build_torch_optimizer(parameter_groups(model, settings), settings)
    assert type(optimizer).__name__ == kind
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.2, 0.0]
    assert all(group["betas"] == betas and group["lr"] == 0.01 for group in optimizer.param_groups)
    if kind == "AdamW":
        assert all(group["fused"] and group["eps"] == ADAM_EPS for group in optimizer.param_groups)
