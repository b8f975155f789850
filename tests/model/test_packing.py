"""Packed documents give the loss, logits and gradients of the documents read alone."""

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from megatronish.config.model import KernelConfig, ModelConfig
from megatronish.model.transformer import Transformer
from megatronish.ops.extension import EXTENSION

LENGTHS = ((5, 1, 10), (7, 9))  # documents of two rows of 16 tokens


@pytest.mark.parametrize("backend", ["sdpa", "reference"])
@pytest.mark.parametrize(
    "switches",
    [{"num_kv_heads": 2}, {"sliding_window": 4}, {"sliding_window": 4, "full_attention_interval": 2}],
    ids=["gqa", "sliding", "alternating"],
)
def test_packed_equals_alone(switches: dict[str, int], backend: str) -> None:
    config = ModelConfig(
        vocab_size=53,
        num_layers=2,
        hidden_size=32,
        num_attention_heads=4,
        ffn_hidden_size=48,
        seq_length=16,
        init_std=0.2,
        **switches,
    )
    model = Transformer(config, KernelConfig(attention=backend))
    generator = torch.Generator().manual_seed(0)
    tokens, labels = torch.randint(53, (2, 2, 16), generator=generator)
    labels[0, 4], labels[1, 15] = -100, -100
    flat_lengths = [length for row in LENGTHS for length in row]
    cu_seqlens = torch.tensor([0, *flat_lengths]).cumsum(0).to(torch.int32)
    positions = torch.cat([torch.arange(length) for length in flat_lengths]).view(2, 16)

    packed, count = model.loss(tokens, labels, positions, cu_seqlens, max(flat_lengths))
    packed.backward()
    gradients = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()
    alone, alone_count = torch.zeros(()), 0
    for row, lengths in enumerate(LENGTHS):
        start = 0
        for length in lengths:
            piece = slice(start, start + length)
            loss, n = model.loss(tokens[row : row + 1, piece], labels[row : row + 1, piece])
            loss.backward()
            alone, alone_count = alone + loss.detach(), alone_count + n.item()
            start += length

    assert count.item() == alone_count == 30
    assert packed.item() == pytest.approx(alone.item(), rel=1e-6)  # 30 terms, each right to a few fp32 roundings
    for name, parameter in model.named_parameters():
        scale = parameter.grad.abs().max().item()
        torch.testing.assert_close(gradients[name], parameter.grad, rtol=0, atol=2e-5 * scale, msg=name)

    # The boundaries do matter here, and so do the positions: without them the loss is another one.
    crossing, _ = model.loss(tokens, labels, positions)
    assert abs(crossing.item() - packed.item()) > 1e-3
    repeated = torch.cat((cu_seqlens, cu_seqlens[-1:], cu_seqlens[-1:]))
    padded, _ = model.loss(tokens, labels, positions, repeated, 16)
    assert padded.item() == packed.item()


@pytest.mark.parametrize("bounds", [[0, 16], [0, 16, 33], [0, 20, 32], [16, 32], [0, 20, 16, 32]])
def test_documents_that_do_not_cover_the_rows_are_refused(bounds: list[int]) -> None:
    config = ModelConfig(
        vocab_size=53, num_layers=1, hidden_size=32, num_attention_heads=4, ffn_hidden_size=48, seq_length=16
    )
    model, tokens = Transformer(config), torch.zeros(2, 16, dtype=torch.long)
    with pytest.raises(ValueError, match=r"must increase from 0 to 32 \(2 rows of 16 tokens\)"):
        model(tokens, cu_seqlens=torch.tensor(bounds, dtype=torch.int32))
    with pytest.raises(ValueError, match="cu_seqlens must be int32"):
        model(tokens, cu_seqlens=torch.tensor([0, 16, 32]))


class _Masks(TorchDispatchMode):
    """Elements of the largest boolean tensor that any operator makes."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        out = func(*args, **(kwargs or {}))
        if isinstance(out, Tensor) and out.dtype == torch.bool:
            self.elements = max(self.elements, out.numel())
        return out


@pytest.mark.skipif(not EXTENSION.cpu, reason=EXTENSION.cpu_problem or "built")
@pytest.mark.skipif(torch.backends.cpu.get_cpu_capability() == "DEFAULT", reason="SDPA is used where there is no AVX2")
@pytest.mark.parametrize(("dropout", "makes"), [(0.0, False), (0.1, True)])
def test_a_mask_is_made_where_one_is_read(dropout: float, makes: bool) -> None:
    """Our CPU kernel reads bounds of documents; of 128k tokens a mask would take 17 GB. Dropout is SDPA's, which needs one."""
    config = ModelConfig(
        vocab_size=53,
        num_layers=1,
        hidden_size=64,
        num_attention_heads=2,
        ffn_hidden_size=48,
        seq_length=256,
        attention_dropout=dropout,
    )
    tokens = torch.zeros(2, 256, dtype=torch.int64)
    cu_seqlens = torch.tensor([0, 100, 256, 512], dtype=torch.int32)
    with _Masks() as masks:
        Transformer(config, KernelConfig()).loss(tokens, tokens, None, cu_seqlens, 256)
    assert (masks.elements >= 256 * 256) == makes
