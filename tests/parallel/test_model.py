"""A tensor-parallel model is the single-process one: loss, every gradient, every initial weight."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from megatronish.config.model import KernelConfig, ModelConfig
from megatronish.config.parallel import ParallelConfig
from megatronish.model.sharded_layers import full_shapes
from megatronish.model.transformer import Transformer
from megatronish.parallel.layers import TensorParallel, shard_of
from megatronish.parallel.mesh import build_mesh
from tests.distributed import run_ranks

SMALL: dict[str, Any] = {
    "vocab_size": 67,
    "num_layers": 2,
    "hidden_size": 32,
    "num_attention_heads": 4,
    "num_kv_heads": 2,
    "ffn_hidden_size": 48,
    "seq_length": 16,
}
MODELS: dict[str, dict[str, Any]] = {
    "llama": SMALL,
    "tied, QK-norm, one KV head": {**SMALL, "tie_embeddings": True, "qk_norm": True, "num_kv_heads": 1},
    "biases, LayerNorm, GELU, parallel": {
        **SMALL,
        "norm": "layernorm",
        "activation": "gelu",
        "parallel_block": True,
        "attention_qkv_bias": True,
        "attention_out_bias": True,
        "mlp_bias": True,
        "rope_fraction": 0.5,
        "num_kv_heads": 1,
    },
    "post-norm, window": {**SMALL, "norm_position": "post", "sliding_window": 5, "full_attention_interval": 2},
}
# Of a tensor's largest entry, in float64: a chain of some thirty products and norms whose sums run in another order.
CLOSE = 1e-11


def batch(vocab: int) -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(3)
    tokens = torch.randint(0, vocab, (2, 16), generator=draw)
    labels = torch.randint(0, vocab, (2, 16), generator=draw)
    labels[1, 4:7] = -100
    positions = torch.cat([torch.arange(6), torch.arange(10)]).expand(2, -1)
    cu_seqlens = torch.tensor([0, 6, 16, 22, 32], dtype=torch.int32)
    return {"tokens": tokens, "labels": labels, "positions": positions, "cu_seqlens": cu_seqlens}


def build(config: ModelConfig, tp: TensorParallel, recompute: str) -> Transformer:
    model = Transformer(config, KernelConfig(ops="reference"), seed=5, tp=tp).double()
    model.set_activation_checkpointing(recompute)
    with torch.no_grad():
        for name, parameter, shape in full_shapes(model):
            if len(shape) == 1:  # norms start as 1 and biases as 0: give them values that differ by channel
                shard = shard_of(parameter)
                full = torch.randn(shape, generator=torch.Generator().manual_seed(len(name)), dtype=torch.float64)
                parameter.add_(full if shard is None else shard.take(full))
    return model


def run(rank: int, config: ModelConfig, tensor: int, sequence: bool, recompute: str) -> dict[str, Tensor]:
    """Loss, and by full name the rank's part of every gradient and weight in a full tensor of zeros."""
    axis = build_mesh(ParallelConfig(tensor=tensor), "cpu").tp if tensor > 1 else TensorParallel().axis
    model = build(config, TensorParallel(axis, sequence), recompute)
    loss, count = model.loss(**batch(config.vocab_size))
    loss.backward()
    found = {"loss": loss.detach(), "count": count}
    for name, parameter, shape in full_shapes(model):
        assert parameter.grad is not None, name
        shard = shard_of(parameter)
        for kind, value in (("grad", parameter.grad), ("weight", parameter.detach())):
            full = found.setdefault(f"{kind} {name}", torch.zeros(shape, dtype=torch.float64))
            if shard is None:
                full.copy_(value)
            elif not shard.replicated:
                shard.put(full, value)
            else:
                found[f"{kind} copy {name}"] = shard.take(full).copy_(value)
                if rank == 0:
                    shard.put(full, value)
    return found


@pytest.mark.distributed
@pytest.mark.parametrize("sequence", [False, True], ids=["plain", "sequence"])
@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("name", MODELS)
def test_loss_and_gradients_equal_one_process(name: str, size: int, sequence: bool) -> None:
    """In float64, with documents, positions, ignored labels, 67 rows of vocabulary, fewer KV heads than ranks."""
    config = ModelConfig(**MODELS[name])
    recompute = {(2, False): "none", (2, True): "full", (4, False): "selective", (4, True): "none"}[size, sequence]
    expected = run(0, config, 1, False, recompute)
    ranks = run_ranks(size, run, config, size, sequence, recompute)
    probe = Transformer(config, KernelConfig(ops="reference"), seed=None, tp=TensorParallel())
    assert {n for n, _, _ in full_shapes(probe)} == {key.split(" ", 1)[1] for key in expected if key.startswith("grad")}
    for key, value in expected.items():
        if key in ("loss", "count"):
            versions = [found[key] for found in ranks]
        elif all(torch.equal(found[key], ranks[0][key]) for found in ranks):
            versions = [ranks[0][key]]  # a replicated parameter
        else:
            versions = [sum(found[key] for found in ranks)]  # zeros outside each rank's part
        for found_value in versions:
            error = (found_value - value).abs().max() / value.abs().max()
            assert error < (CLOSE if not key.startswith("weight") else 1e-15), f"{key}: off by {error:.1e}"
    for key in [key for key in ranks[0] if " copy " in key]:
        assert all(torch.equal(found[key], ranks[0][key]) for found in ranks), f"{key}: replicas differ"


def dropout_run(rank: int, config: ModelConfig, sequence: bool, recompute: str) -> dict[str, Any]:
    """Quantities that reveal the dropout masks of a rank: zeros of the embedding and residual stream, attention outputs, gradients."""
    tp = TensorParallel(build_mesh(ParallelConfig(tensor=2), "cpu").tp, sequence)
    model = build(config, tp, recompute)
    seen: dict[str, Any] = {"attention": [], "embedding": [], "residual": []}
    model.embedding.register_forward_hook(lambda m, i, o: seen["embedding"].append((o == 0).detach()))
    for block in model.blocks:
        block.dropout.register_forward_hook(lambda m, i, o: seen["residual"].append((o == 0).detach()))
    torch.manual_seed(11 + (rank if sequence else 0))
    loss, _ = model.loss(**batch(config.vocab_size))
    seen["random"] = torch.rand(3)
    loss.backward()
    seen["loss"] = loss.detach()
    seen["grads"] = {name: p.grad for name, p in model.named_parameters() if shard_of(p) is None}
    return seen


@pytest.mark.distributed
@pytest.mark.parametrize("sequence", [False, True], ids=["plain", "sequence"])
def test_dropout_agrees_where_it_must(sequence: bool) -> None:
    """Without sequence parallelism ranks drop the same entries of the residual stream; with it each its own part's."""
    config = ModelConfig(**SMALL, embedding_dropout=0.3, residual_dropout=0.3, attention_dropout=0.3)
    first, second = run_ranks(2, dropout_run, config, sequence, "none")
    for kind in ("embedding", "residual"):
        same = [torch.equal(a, b) for a, b in zip(first[kind], second[kind], strict=True)]
        assert all(same) != sequence and any(same) != sequence, kind
    assert torch.equal(first["random"], second["random"]) != sequence  # generators agree again after attention
    assert torch.equal(first["loss"], second["loss"])
    for name, grad in first["grads"].items():  # replicas stay replicas
        assert torch.equal(grad, second["grads"][name]), name


def attention_masks(rank: int) -> Tensor:
    """Which keys the heads of a rank keep under attention dropout: the heads' inputs are equal, so masks show."""
    from megatronish.parallel.rng import fork_rng_per_rank

    torch.manual_seed(4)
    with fork_rng_per_rank(rank, torch.device("cpu")):
        first = torch.rand(64) < 0.5
    with fork_rng_per_rank(rank, torch.device("cpu")):
        second = torch.rand(64) < 0.5
    return torch.stack([first, second, torch.rand(64) < 0.5])


def test_forked_numbers_differ_by_rank_and_use_and_leave_the_generators_equal() -> None:
    zero, one = attention_masks(0), attention_masks(1)
    assert not torch.equal(zero[0], one[0]) and not torch.equal(zero[0], zero[1])
    assert torch.equal(zero[2], one[2])
    assert torch.equal(attention_masks(1), one)


def recomputed(rank: int, config: ModelConfig) -> list[dict[str, Tensor]]:
    tp = TensorParallel(build_mesh(ParallelConfig(tensor=2), "cpu").tp)
    found = []
    for recompute in ("none", "full", "selective"):
        model = build(config, tp, recompute)
        torch.manual_seed(2)
        model.loss(**batch(config.vocab_size))[0].backward()
        found.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    return found


@pytest.mark.distributed
def test_recomputed_blocks_drop_what_they_dropped() -> None:
    config = ModelConfig(**SMALL, residual_dropout=0.3, attention_dropout=0.3)
    for plain, *others in run_ranks(2, recomputed, config):
        for other in others:
            assert plain.keys() == other.keys()
            for name, grad in plain.items():
                assert torch.equal(grad, other[name]), name
