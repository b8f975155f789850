"""The compiled decoding step equals the eager one, with two graphs for any number of rows and lengths."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch

from megatronish.config.model import ModelConfig
from megatronish.errors import UserError
from megatronish.inference import compiled
from megatronish.inference.batch import Batch, Request
from megatronish.inference.sampling import Sampling
from megatronish.model.transformer import Transformer

SHAPE: dict[str, Any] = {
    "vocab_size": 61,
    "num_layers": 2,
    "hidden_size": 64,
    "num_kv_heads": 2,
    "ffn_hidden_size": 48,
    "seq_length": 64,
    "init_std": 0.3,
}
PROMPTS = [[5, 17, 2, 2, 60, 0, 33], [9, 4], list(range(1, 20)), [40, 41]]


def graphs() -> int:
    return int(torch._dynamo.utils.counters["stats"]["unique_graphs"])


# Heads of 16 use our kernel over the cache; heads of 8 torch's masked attention over the full cache. Tracing alone (eager)
# takes seconds; one case is compiled by inductor.
@pytest.mark.slow
@pytest.mark.parametrize(
    ("backend", "fields"),
    [
        ("eager", {"num_attention_heads": 4}),
        ("eager", {"num_attention_heads": 8, "sliding_window": 7}),
        ("inductor", {"num_attention_heads": 4, "num_layers": 1}),
    ],
)
def test_the_same_texts_and_scores(backend: str, fields: dict[str, int], monkeypatch: pytest.MonkeyPatch) -> None:
    torch._dynamo.reset()
    monkeypatch.setattr(compiled.torch, "compile", functools.partial(torch.compile, backend=backend, fullgraph=True))
    model = Transformer(ModelConfig(**{**SHAPE, **fields}), seed=3).eval()
    found = {}
    before = graphs()
    for kind in (False, True):
        batch = Batch(model, 3, compiled=kind)  # a row is used twice, and rows end at different times
        requests = [
            Request(ids, 12 + 8 * i, Sampling(1.1), torch.Generator().manual_seed(i), logprobs=0)
            for i, ids in enumerate(PROMPTS)
        ]
        generations = [batch.add(request) for request in requests]
        texts = [list(generation) for generation in generations]
        found[kind] = texts, [[score.logprob for score in generation.scores] for generation in generations]
    assert found[True][0] == found[False][0]
    for ours, plain in zip(found[True][1], found[False][1], strict=True):
        assert ours == pytest.approx(plain, abs=1e-4)
    assert 0 < graphs() - before <= 2


def test_without_a_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiled.shutil, "which", lambda name: None)
    model = Transformer(ModelConfig(**SHAPE, num_attention_heads=4)).eval()
    with pytest.raises(UserError, match="--compile needs a C"):
        Batch(model, 1, compiled=True)
