"""Decoding with a cache gives the logits of a forward pass over the full sequence."""

import pytest
import torch

from megatronish.config.model import KernelConfig, ModelConfig
from megatronish.config.presets import resolve_model
from megatronish.model.kv_cache import KVCache, kv_cache_bytes
from megatronish.model.transformer import Transformer

SHAPE = {
    "vocab_size": 61,
    "num_layers": 3,
    "hidden_size": 32,
    "num_attention_heads": 4,
    "ffn_hidden_size": 48,
    "seq_length": 16,
    "init_std": 0.2,
}
VARIANTS = {
    "mqa": {"num_kv_heads": 1},
    "gqa_qk_norm": {"num_kv_heads": 2, "qk_norm": True},
    "sliding": {"num_kv_heads": 2, "sliding_window": 5},
    "alternating": {"sliding_window": 5, "full_attention_interval": 2},
    "window_1": {"sliding_window": 1},
    "neox": {"parallel_block": True, "norm": "layernorm", "activation": "gelu", "rope_fraction": 0.5, "mlp_bias": True},
    "post_interleaved": {"norm_position": "post", "rope_interleaved": True},
    "yarn": {"rope_scaling": {"type": "yarn", "factor": 4.0, "original_seq_length": 16}},
}


@pytest.mark.parametrize("backend", ["sdpa", "reference"])
@pytest.mark.parametrize("variant", VARIANTS)
@torch.no_grad()
def test_cached_equals_uncached(variant: str, backend: str) -> None:
    config = ModelConfig(**SHAPE, **VARIANTS[variant])
    model = Transformer(config, KernelConfig(attention=backend))
    tokens = torch.randint(61, (2, 24), generator=torch.Generator().manual_seed(0))
    expected = model(tokens)  # also beyond the training context of 16
    cache = KVCache(config, 2, 24)
    pieces, start = [], 0
    for size in (6, 1, 1, 7, 1, 8):  # a prompt, single tokens, and chunks after them
        pieces.append(model(tokens[:, start : start + size], cache=cache))
        start += size
    assert cache.length == 24
    logits = torch.cat(pieces, dim=1)
    # The same products in matrices of other sizes: fp32 sums in another order.
    torch.testing.assert_close(logits, expected, rtol=0, atol=2e-5 * expected.abs().max().item())
    assert torch.equal(logits.argmax(-1), expected.argmax(-1))


@torch.no_grad()
def test_rewind_forgets_what_came_later() -> None:
    config = ModelConfig(**SHAPE, sliding_window=4)
    model, cache = Transformer(config), KVCache(config, 1, 12)
    tokens = torch.arange(12)[None]
    model(tokens[:, :8], cache=cache)
    expected = model(tokens[:, 8:9], cache=cache)
    model(tokens[:, 9:], cache=cache)
    cache.rewind(8)
    torch.testing.assert_close(model(tokens[:, 8:9], cache=cache), expected, rtol=0, atol=0)
    cache.reset()
    assert cache.length == 0
    with pytest.raises(ValueError, match="cannot rewind a cache of 0 tokens to 3"):
        cache.rewind(3)


def test_messages() -> None:
    config = ModelConfig(**SHAPE)
    model, cache = Transformer(config), KVCache(config, 1, 4)
    with pytest.raises(ValueError, match="5 tokens do not fit after the 0 in a cache of 4"):
        model(torch.zeros(1, 5, dtype=torch.long), cache=cache)
    with pytest.raises(ValueError, match="made for a batch of 1, got tokens of 2 rows"):
        model(torch.zeros(2, 1, dtype=torch.long), cache=cache)
    with pytest.raises(ValueError, match="at least 1, got 0 and 4"):
        KVCache(config, 0, 4)
    with pytest.raises(ValueError, match=r"tokens must be \[batch, sequence\], got shape \(3,\)"):
        model(torch.zeros(3, dtype=torch.long))
    model(torch.zeros(1, 2, dtype=torch.long), cache=cache)
    with pytest.raises(ValueError, match="packed documents cannot follow a key/value cache"):
        model(torch.zeros(1, 2, dtype=torch.long), cache=cache, cu_seqlens=torch.tensor([0, 2], dtype=torch.int32))


def test_cache_bytes() -> None:
    config = resolve_model({"preset": "tiny"})
    cache = KVCache(config, 3, 20, dtype=torch.bfloat16)
    assert kv_cache_bytes(config, 3, 20) == cache.nbytes
