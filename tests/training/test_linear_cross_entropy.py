"""kernels.cross_entropy "linear": DeepSpeed's loss of the head and the cross-entropy in one, in the model and the engine."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from megatronish.config.model import KernelConfig, ModelConfig
from megatronish.model.transformer import Transformer
from megatronish.training.engine import linear_cross_entropy
from tests.distributed import run_ranks
from tests.runs import engine_loop, make_dataset, plain_loop, small_run

CONFIG = ModelConfig(
    vocab_size=1000,
    num_layers=1,
    hidden_size=32,
    num_attention_heads=2,
    ffn_hidden_size=48,
    seq_length=64,
    init_std=0.1,
)
TOKENS = torch.randint(1000, (4, 65), generator=torch.Generator().manual_seed(0))


class _Largest(TorchDispatchMode):
    """Elements of the largest tensor that any operator makes."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple) else (out,):
            if isinstance(tensor, Tensor):
                self.elements = max(self.elements, tensor.numel())
        return out


def _gradients(kind: str, dtype: torch.dtype) -> tuple[dict[str, Tensor], int]:
    """Loss and gradients, and the elements of the largest tensor made on the way."""
    model = Transformer(CONFIG, KernelConfig(cross_entropy=kind)).to(dtype)
    if kind == "linear":
        model.linear_cross_entropy = linear_cross_entropy
    labels = TOKENS[:, 1:].clone()
    labels[1, 5:20] = -100
    with _Largest() as largest:
        loss, count = model.loss(TOKENS[:, :-1], labels)
        loss.backward()
    assert loss.dtype == torch.float32 and count == 4 * 64 - 15
    return {name: p.grad for name, p in model.named_parameters()} | {"loss": loss.detach()}, largest.elements


def test_the_same_loss_and_gradients_without_logits() -> None:
    plain, with_logits = _gradients("reference", torch.float32)
    linear, without = _gradients("linear", torch.float32)
    for name, gradient in plain.items():
        # The same sums in another order: a few fp32 roundings.
        torch.testing.assert_close(linear[name], gradient, rtol=0, atol=5e-6 * gradient.abs().max().item(), msg=name)
    assert with_logits == 4 * 64 * 1000
    # Nothing larger than the head's weight and its gradient: 8 times less than the logits.
    assert without == 32 * 1000


def test_bf16_is_as_far_from_fp32_as_with_logits() -> None:
    exact, _ = _gradients("reference", torch.float32)
    errors = []
    for kind in ("reference", "linear"):
        found, _ = _gradients(kind, torch.bfloat16)
        errors.append({n: ((found[n].float() - g).norm() / g.norm()).item() for n, g in exact.items()})
    for name, error in errors[0].items():
        assert errors[1][name] <= 1.2 * error + 1e-3, name


def test_linear_cross_entropy_without_an_implementation_is_an_error() -> None:
    model = Transformer(CONFIG, KernelConfig(cross_entropy="linear"))
    assert model(TOKENS[:, :-1]).shape == (4, 64, 1000)  # logits as ever
    with pytest.raises(ValueError, match=r"cross_entropy is 'linear', but Transformer.linear_cross_entropy is not set"):
        model.loss(TOKENS[:, :-1], TOKENS[:, 1:])


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("stage", "parallel"),
    [(2, {}), (3, {}), (1, {"tensor": 2}), (1, {"tensor": 2, "tensor_sequence": True}), (1, {"sequence": 2})],
    ids=["zero2", "zero3", "tensor", "tensor sequence", "sequence"],
)
def test_the_engine_uses_the_one_of_deepspeed(stage: int, parallel: dict[str, Any], tmp_path: Path) -> None:
    """Two ranks with tied embeddings (under ZeRO-3 the head gathers a weight that it does not own), 10 steps; a vocabulary of
    257 rows divided over them, or the tokens."""
    data, size = make_dataset(tmp_path), 1 if parallel else 2
    zero = {"stage": stage} | ({"stage3_param_persistence_threshold": 0} if stage == 3 else {})
    ours = {"kernels": {"cross_entropy": "linear"}, "parallel": parallel}
    changes = {"zero_optimization": zero, "megatronish": ours}
    plain = plain_loop(small_run(data, tmp_path), data_size=size)
    trace, _ = run_ranks(2, engine_loop, small_run(data, tmp_path, changes), size)
    torch.testing.assert_close(trace.losses, plain.losses, rtol=1e-5, atol=0)
    torch.testing.assert_close(trace.norms, plain.norms, rtol=1e-5, atol=0)
