"""Activation checkpointing and compilation change what is kept and how fast it runs, not what is computed."""

import pytest
import torch
from torch import Tensor

from megatronish.config.model import KernelConfig, ModelConfig
from megatronish.model.transformer import Transformer

SHAPE = {
    "vocab_size": 61,
    "num_layers": 3,
    "hidden_size": 64,
    "num_attention_heads": 4,
    "num_kv_heads": 2,
    "ffn_hidden_size": 96,
    "seq_length": 64,
    "init_std": 0.1,
}


def _gradients(config: ModelConfig, mode: str, backend: str = "sdpa", compiled: bool = False) -> dict[str, Tensor]:
    model = Transformer(config, KernelConfig(attention=backend))
    model.set_activation_checkpointing(mode)
    if compiled:
        model.compile_blocks()
    tokens = torch.randint(61, (2, 65), generator=torch.Generator().manual_seed(0))
    torch.manual_seed(5)
    loss, _ = model.loss(tokens[:, :-1], tokens[:, 1:])
    loss.backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()} | {"loss": loss.detach()}


@pytest.mark.parametrize("mode", ["full", "selective"])
@pytest.mark.parametrize("backend", ["sdpa", "reference"])
@pytest.mark.parametrize("switches", [{"qk_norm": True}, {"residual_dropout": 0.2, "attention_dropout": 0.2}])
def test_gradients_are_identical(switches: dict[str, object], backend: str, mode: str) -> None:
    config = ModelConfig(**SHAPE, **switches)
    kept, recomputed = _gradients(config, "none", backend), _gradients(config, mode, backend)
    for name, gradient in kept.items():
        assert torch.equal(gradient, recomputed[name]), name


def test_memory_kept_falls_from_none_to_selective_to_full() -> None:
    config = ModelConfig(**SHAPE)
    kept = {mode: _saved_bytes(config, mode) for mode in ("none", "selective", "full")}
    tokens = 2 * 64
    # full: the input of each block, [tokens, hidden] fp32, and nothing else in a block.
    blocks = kept["full"] - _outside_blocks(config, tokens)
    assert blocks == config.num_layers * tokens * config.hidden_size * 4
    assert kept["full"] < kept["none"]


def _outside_blocks(config: ModelConfig, tokens: int) -> int:
    """Saved by embedding, final norm, head and loss: token ids, norm input and rstd, head input, logits, log Z, labels."""
    return tokens * (8 + 4 * config.hidden_size + 4 + 4 * config.hidden_size + 4 * config.vocab_size + 4 + 8)


def _saved_bytes(config: ModelConfig, mode: str) -> int:
    """Bytes of distinct activations that autograd holds at the end of the forward pass."""
    model = Transformer(config, KernelConfig(attention="sdpa"))
    model.set_activation_checkpointing(mode)
    tables = model.rotary.get(torch.device("cpu"), 64)
    own = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *tables)}
    storages: dict[int, int] = {}
    alive = []

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            storages[storage.data_ptr()] = storage.nbytes()
            alive.append(tensor)  # so that no other tensor takes its address
        return tensor

    tokens = torch.zeros(2, 64, dtype=torch.long)
    labels = torch.ones(2, 64, dtype=torch.long)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model.loss(tokens, labels)
    return sum(storages.values())


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["none", "full", "selective"])
def test_compiled_blocks_agree_and_keep_their_names(mode: str) -> None:
    config = ModelConfig(**SHAPE, qk_norm=True)
    plain, compiled = _gradients(config, "none"), _gradients(config, mode, compiled=True)
    assert plain.keys() == compiled.keys()
    for name, gradient in plain.items():
        # Fused kernels sum in another order: a few fp32 roundings over three blocks.
        torch.testing.assert_close(compiled[name], gradient, rtol=0, atol=2e-5 * gradient.abs().max().item(), msg=name)


def test_unknown_mode() -> None:
    with pytest.raises(ValueError, match="unknown activation checkpointing 'some': choose none, full or selective"):
        Transformer(ModelConfig(**SHAPE)).set_activation_checkpointing("some")
