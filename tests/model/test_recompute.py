"""Activation checkpointing and compilation change what is kept and how fast it runs, not what is computed."""

from collections import Counter

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from megatronish.config.model import KernelConfig, ModelConfig
from megatronish.model.transformer import Transformer
from megatronish.ops.extension import EXTENSION

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


def _gradients(
    config: ModelConfig, mode: str, backend: str = "sdpa", compiled: bool = False, ops: str = "reference"
) -> dict[str, Tensor]:
    model = Transformer(config, KernelConfig(attention=backend, ops=ops))
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
@pytest.mark.parametrize("ops", ["reference", "fused"])
@pytest.mark.parametrize(
    "switches",
    [{"qk_norm": True}, {"residual_dropout": 0.2, "attention_dropout": 0.2}, {"norm_position": "post"}],
    ids=["qk_norm", "dropout", "post"],
)
def test_gradients_are_identical(switches: dict[str, object], ops: str, backend: str, mode: str) -> None:
    config = ModelConfig(**SHAPE, **switches)
    kept, recomputed = _gradients(config, "none", backend, ops=ops), _gradients(config, mode, backend, ops=ops)
    for name, gradient in kept.items():
        assert torch.equal(gradient, recomputed[name]), name


def test_full_keeps_only_the_input_of_each_block() -> None:
    config = ModelConfig(**SHAPE)
    tokens = 2 * 64
    blocks = _saved_bytes(config, "full") - _outside_blocks(config, tokens)
    assert blocks == config.num_layers * tokens * config.hidden_size * 4
    assert _saved_bytes(config, "none") - _outside_blocks(config, tokens) > 10 * blocks


@pytest.mark.parametrize(
    ("ops", "repeated"),
    [
        ("reference", ("aten.silu.default", "aten.rsqrt.default")),  # of SwiGLU and RMSNorm
        ("fused", ("megatronish.swiglu_fwd.default", "megatronish.rms_norm_fwd.default")),
    ],
)
def test_selective_repeats_the_cheap_operations_only(ops: str, repeated: tuple[str, ...]) -> None:
    config = ModelConfig(**SHAPE)
    runs = {mode: _operators(config, mode, ops) for mode in ("none", "selective", "full")}
    # By torch or by oneDNN (ops/linear.py); by torch or by our kernel (ops/attention_cpu.py): as the machine has it.
    products, fused = "products", "fused attention"
    for run in runs.values():
        run[products] = run["aten.mm.default"] + run["mkldnn._linear_pointwise.default"]
        run[fused] = run["aten._scaled_dot_product_flash_attention_for_cpu.default"]
        run[fused] += run["megatronish.causal_attention_fwd.default"]
    # A block has 4 products forward and 8 backward, the head 1 and 2.
    assert runs["none"][products] == runs["selective"][products] == 3 * 12 + 3
    # Repeating a block stops once all that its backward pass reads is there: before the last product, if that is torch's;
    # an autograd function of our own hands over what it saves only when it has run.
    again = 4 if runs["full"]["mkldnn._linear_pointwise.default"] else 3
    assert runs["full"][products] == 3 * (12 + again) + 3
    assert runs["none"][fused] == runs["selective"][fused] == 3
    assert runs["full"][fused] == 6
    for cheap in repeated:
        assert runs["none"][cheap] < runs["selective"][cheap] == runs["full"][cheap]


class _Count(TorchDispatchMode):
    """Counts the operators that run."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        self.calls[str(func)] += 1
        return func(*args, **(kwargs or {}))


def _operators(config: ModelConfig, mode: str, ops: str) -> Counter[str]:
    """How often each operator runs in a forward and backward pass (an operator whose result was kept does not run)."""
    model = Transformer(config, KernelConfig(attention="sdpa", ops=ops))
    model.set_activation_checkpointing(mode)
    tokens = torch.zeros(2, 64, dtype=torch.long)
    with _Count() as count:
        model.loss(tokens, tokens)[0].backward()
    return count.calls


def _outside_blocks(config: ModelConfig, tokens: int) -> int:
    """Saved by embedding, final norm, head and loss: token ids, norm input and rstd, head input, logits, labels; and two
    statistics of the fused loss, or which labels count."""
    loss = 4 + 4 if EXTENSION.cpu else 1
    return tokens * (8 + 4 * config.hidden_size + 4 + 4 * config.hidden_size + 4 * config.vocab_size + 8 + loss)


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
@pytest.mark.parametrize("mode", ["none", "selective"])
@pytest.mark.parametrize("ops", ["reference", "fused"])
@pytest.mark.parametrize("qk_norm", [True, False])
def test_compiled_blocks_agree_and_keep_their_names(mode: str, ops: str, qk_norm: bool) -> None:
    config = ModelConfig(**SHAPE, qk_norm=qk_norm)
    plain, compiled = _gradients(config, "none"), _gradients(config, mode, compiled=True, ops=ops)
    assert plain.keys() == compiled.keys()
    for name, gradient in plain.items():
        # Fused kernels sum in another order: a few fp32 roundings over three blocks.
        torch.testing.assert_close(compiled[name], gradient, rtol=0, atol=2e-5 * gradient.abs().max().item(), msg=name)


def test_unknown_mode() -> None:
    with pytest.raises(ValueError, match="unknown activation checkpointing 'some': choose none, full or selective"):
        Transformer(ModelConfig(**SHAPE)).set_activation_checkpointing("some")
