"""Initial weights are a function of seed, name and shape alone."""

import contextlib

import pytest
import torch

from megatronish.config.model import ModelConfig
from megatronish.config.presets import resolve_model
from megatronish.model.init import init_weights, initial_weight
from megatronish.model.transformer import Transformer, layer_specs
from megatronish.ops.dispatch import Backends

CONFIG = ModelConfig(
    vocab_size=300,
    num_layers=2,
    hidden_size=128,
    num_attention_heads=4,
    ffn_hidden_size=256,
    seq_length=16,
    mlp_bias=True,
    norm="layernorm",
)


def test_order_of_construction_does_not_matter() -> None:
    model = Transformer(CONFIG, seed=7)
    torch.manual_seed(99)
    alone = {}
    for spec in reversed(layer_specs(CONFIG, Backends("sdpa", "reference"))):
        layer = spec.build()
        for name, parameter in layer.named_parameters():
            full_name = f"{spec.name}.{name}"
            with torch.no_grad():
                parameter.copy_(initial_weight(full_name, parameter.shape, CONFIG, 7))
            alone[full_name] = parameter
    expected = dict(model.named_parameters())
    assert alone.keys() == expected.keys()
    for name, parameter in alone.items():
        assert torch.equal(parameter, expected[name]), name


def test_global_generator_is_neither_read_nor_moved() -> None:
    torch.manual_seed(1)
    state = torch.get_rng_state()
    first = Transformer(CONFIG).state_dict()
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(2)
    for name, tensor in Transformer(CONFIG).state_dict().items():
        assert torch.equal(tensor, first[name]), name


def test_seed_and_name_give_different_weights() -> None:
    draw = initial_weight("blocks.0.mlp.up.weight", (8, 8), CONFIG, 0)
    assert not torch.equal(draw, initial_weight("blocks.0.mlp.up.weight", (8, 8), CONFIG, 1))
    assert not torch.equal(draw, initial_weight("blocks.1.mlp.up.weight", (8, 8), CONFIG, 0))


def test_distribution() -> None:
    state = Transformer(CONFIG).state_dict()
    for name, tensor in state.items():
        if name.endswith("bias"):
            assert torch.equal(tensor, torch.zeros_like(tensor)), name
        elif tensor.ndim == 1:
            assert torch.equal(tensor, torch.ones_like(tensor)), name
        else:
            std = 0.02 / (4**0.5 if name.endswith(("attention.out.weight", "mlp.down.weight")) else 1)
            # The deviation of n numbers is off by 1/sqrt(2 n) of itself, their mean by std / sqrt(n): five of those.
            n = tensor.numel()
            assert tensor.std().item() == pytest.approx(std, rel=5 / (2 * n) ** 0.5), name
            assert abs(tensor.mean().item()) < 5 * std / n**0.5, name
    unscaled = CONFIG.model_copy(update={"init_scale_residual": False})
    ratio = initial_weight("blocks.0.mlp.down.weight", (4, 4), unscaled, 0) / initial_weight(
        "blocks.0.mlp.down.weight", (4, 4), CONFIG, 0
    )
    torch.testing.assert_close(ratio, torch.full((4, 4), 2.0))


def test_precision_and_partitioning_see_the_same_numbers() -> None:
    expected = Transformer(CONFIG, seed=3).to(torch.bfloat16).state_dict()
    with torch.device("meta"):
        model = Transformer(CONFIG, seed=3)
    with pytest.raises(ValueError, match=r"embedding.weight is on the meta device: call module.to_empty"):
        init_weights(model, CONFIG, 3)
    model = model.to(torch.bfloat16).to_empty(device="cpu")
    gathered: list[torch.nn.Parameter] = []

    def gather(parameters: list[torch.nn.Parameter]) -> contextlib.AbstractContextManager[None]:
        gathered.extend(parameters)
        return contextlib.nullcontext()

    init_weights(model, CONFIG, 3, gather=gather)
    assert [id(p) for p in gathered] == [id(p) for p in model.parameters()]
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, expected[name]), name


def test_tied_head_is_the_embedding_also_after_to_empty() -> None:
    config = resolve_model({"preset": "tiny", "vocab_size": 64})
    with torch.device("meta"):
        model = Transformer(config, seed=None)
    model = model.to_empty(device="cpu")
    model.tie_weights()
    assert model.head.weight is model.embedding.weight
    assert "head.weight" not in dict(model.named_parameters())
