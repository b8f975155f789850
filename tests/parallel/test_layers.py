"""Tensor-parallel layers equal one process in float64: outputs and gradients, to the rounding of another order of sums."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megatronish.config.parallel import ParallelConfig
from megatronish.errors import ConfigError
from megatronish.ops.cross_entropy import token_losses
from megatronish.parallel.layers import (
    ColumnParallelLinear,
    RowParallelLinear,
    SharedKVLinear,
    TensorParallel,
    TensorShard,
    VocabParallelEmbedding,
    part_of,
    shard_of,
)
from megatronish.parallel.mesh import Axis, ParallelMesh, build_mesh
from tests.distributed import run_ranks

B, S, H, V = 2, 8, 12, 23
HEADS, HEAD_DIM = 4, 3
# Of a tensor's largest entry: chains of five sums of at most 40 float64 products, taken in another order, err by less
# than 5 * 40 * 2^-53 = 2e-14 of the sizes that are summed, which cancel to a tenth or so.
CLOSE = 1e-12


def full_tensors() -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=draw, dtype=torch.float64)

    return {
        "x": normal(B, S, H),
        "up": normal(2 * 20, H),
        "up_bias": normal(2 * 20),
        "down": normal(H, 20),
        "down_bias": normal(H),
        "table": normal(V, H),
        "out": normal(B, S, H),
        "qkv": normal((HEADS + 2) * HEAD_DIM, H),
        "qkv_bias": normal((HEADS + 2) * HEAD_DIM),
        "qkv_out": normal(B, S, HEADS, HEAD_DIM),
    }


def shared_kv_sum(qkv: Tensor, heads: int) -> Tensor:
    """A stand-in for attention with one KV head: every query head times k plus v. qkv [b, s, heads + 2, d]."""
    q, k, v = qkv.split((heads, 1, 1), dim=2)
    return q * k + v


def single_process() -> dict[str, Tensor]:
    """Outputs and gradients of: embedding; gated MLP of x; logits and loss; attention-like use of one KV head."""
    t = {name: tensor.requires_grad_(name not in ("out", "qkv_out")) for name, tensor in full_tensors().items()}
    tokens, labels = batch()
    embedded = F.embedding(tokens, t["table"])
    gate, up = F.linear(t["x"] + embedded, t["up"], t["up_bias"]).chunk(2, -1)
    y = F.linear(gate * up, t["down"], t["down_bias"])
    logits = F.linear(y, t["table"])
    loss = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum")
    qkv = F.linear(t["x"], t["qkv"], t["qkv_bias"]).view(B, S, HEADS + 2, HEAD_DIM)
    heads = shared_kv_sum(qkv, HEADS)
    (loss + (y * t["out"]).sum() + (heads * t["qkv_out"]).sum()).backward()
    grads = {f"grad {name}": tensor.grad for name, tensor in t.items() if tensor.grad is not None}
    return {"y": y.detach(), "loss": loss.detach(), "heads": heads.detach(), **grads}


def batch() -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(1)
    tokens = torch.randint(0, V, (B, S), generator=draw)
    labels = torch.randint(0, V, (B, S), generator=draw)
    labels[0, :3] = -100
    return tokens, labels


def parallel(rank: int, size: int, sequence: bool) -> dict[str, Tensor]:
    """The same on one of `size` ranks; gradients are put into full tensors of zeros, so that ranks' results add up."""
    tp = TensorParallel(build_mesh(ParallelConfig(tensor=size), "cpu").tp, sequence)
    torch.set_default_dtype(torch.float64)
    t = full_tensors()
    parts = slice(S // size * rank, S // size * (rank + 1)) if sequence else slice(None)
    layers = {
        "table": VocabParallelEmbedding(V, H, tp),
        "up": ColumnParallelLinear(H, (20, 20), True, tp),
        "down": RowParallelLinear(20, H, True, tp),
        "head": ColumnVocab(tp),
        "qkv": SharedKVLinear(H, HEADS, 1, HEAD_DIM, True, tp),
    }
    layers["head"].weight = layers["table"].weight  # tied
    for name, layer in layers.items():
        for kind, parameter in layer.named_parameters():
            shard = shard_of(parameter)
            full = t[f"{name}_bias" if "bias" in kind else name if name != "head" else "table"]
            with torch.no_grad():
                parameter.copy_(full if shard is None else shard.take(full))
    x = t["x"][:, parts].clone().requires_grad_()
    tokens, labels = batch()
    y = layers["down"](gated(layers["up"](x + layers["table"](tokens))))
    start, _ = part_of(V, size, rank)
    logits = layers["head"](y)
    loss = token_losses(logits, labels, group=tp.group, vocab_start=start, vocab_size=V).sum()
    local = HEADS // size
    qkv = layers["qkv"](x).view(B, S, local + 2, HEAD_DIM)
    heads = shared_kv_sum(qkv, local)
    mine = slice(rank * local, (rank + 1) * local)
    (loss + (y * t["out"][:, parts]).sum() + (heads * t["qkv_out"][:, :, mine]).sum()).backward()
    found = {"y": place(y, (B, S, H), parts), "loss": loss.detach(), "grad x": place(x.grad, (B, S, H), parts)}
    found["heads"] = torch.zeros(B, S, HEADS, HEAD_DIM)
    found["heads"][:, :, mine] = heads.detach()
    for name, layer in layers.items():
        for kind, parameter in layer.named_parameters():
            if name != "head":
                key = f"grad {name}_bias" if "bias" in kind else f"grad {name}"
                collect(found, key, parameter, full_shape=tuple(t[key.removeprefix("grad ")].shape), rank=rank)
    return found


class ColumnVocab(nn.Module):
    """A head: its weight is the embedding's."""

    def __init__(self, tp: TensorParallel) -> None:
        super().__init__()
        self.tp = tp

    def forward(self, x: Tensor) -> Tensor:
        from megatronish.parallel.layers import column_linear

        return column_linear(x, self.weight, None, self.tp)


def gated(x: Tensor) -> Tensor:
    gate, up = x.chunk(2, -1)
    return gate * up


def place(part: Any, shape: tuple[int, ...], where: slice) -> Tensor:
    full = torch.zeros(shape)
    full[:, where] = part.detach()
    return full


def collect(found: dict[str, Tensor], key: str, parameter: Tensor, full_shape: tuple[int, ...], rank: int) -> None:
    full = found.setdefault(key, torch.zeros(full_shape))
    assert parameter.grad is not None
    shard = shard_of(parameter)
    if shard is None:
        full += parameter.grad
    elif not shard.replicated or rank == 0:
        shard.put(full, parameter.grad)
    else:
        found[f"copy of {key}"] = parameter.grad


@pytest.mark.distributed
@pytest.mark.parametrize("sequence", [False, True], ids=["plain", "sequence"])
@pytest.mark.parametrize("size", [2, 4])
def test_layers_equal_one_process(size: int, sequence: bool) -> None:
    """Packed gate and up, biases, a tied uneven vocabulary (23 rows), one shared KV head, labels to ignore."""
    expected = single_process()
    ranks = run_ranks(size, parallel, size, sequence)
    divided = {"heads", "grad up", "grad up_bias", "grad down", "grad table", "grad qkv", "grad qkv_bias"}
    if sequence:
        divided |= {"y", "grad x"}
    for name, value in expected.items():
        for found in [sum(r[name] for r in ranks)] if name in divided else [r[name] for r in ranks]:
            error = (found - value).abs().max() / value.abs().max()
            assert error < CLOSE, f"{name}: off by {error:.1e} of its largest entry"
    kv_rows = ranks[0]["grad qkv"][HEADS * HEAD_DIM :]
    for other in ranks[1:]:  # the shared rows have the same gradient everywhere, bit for bit: they must stay replicas
        assert torch.equal(other["copy of grad qkv"], kv_rows)


def mesh_axes(rank: int, config: ParallelConfig) -> dict[str, tuple[int, int, list[int]]]:
    import torch.distributed as dist

    mesh = build_mesh(config, "cpu")
    axes = {name: getattr(mesh, name) for name in ("pp", "dp", "sp", "tp", "data")}
    return {
        name: (axis.size, axis.rank, [rank] if axis.group is None else dist.get_process_group_ranks(axis.group))
        for name, axis in axes.items()
    }


@pytest.mark.distributed
def test_ranks_are_ordered_as_in_deepspeeds_topology() -> None:
    from deepspeed.runtime.pipe.topology import ProcessTopology

    config = ParallelConfig(pipeline=2, tensor=2)
    topology = ProcessTopology(["pp", "dp", "sp", "tp"], [2, 1, 1, 2])
    for rank, axes in enumerate(run_ranks(4, mesh_axes, config)):
        place = topology.get_coord(rank)
        for name in ("pp", "dp", "sp", "tp"):
            size, index, members = axes[name]
            assert (size, index) == (topology.get_dim(name), getattr(place, name)), (rank, name)
            assert members in (topology.get_axis_comm_lists(name) or [[rank]]), (rank, name)


@pytest.mark.distributed
def test_sequence_parallel_ranks_share_the_optimizer_with_data_parallel_ones() -> None:
    for rank, axes in enumerate(run_ranks(4, mesh_axes, ParallelConfig(sequence=2))):
        assert axes["data"] == (4, rank, [0, 1, 2, 3])
        assert axes["sp"] == (2, rank % 2, [rank - rank % 2, rank - rank % 2 + 1])


def test_one_process_has_a_mesh_without_groups() -> None:
    mesh = ParallelMesh()
    assert mesh.tp == Axis(1, 0, None) and mesh.random_stream == 0
    one = torch.ones(2)
    assert mesh.dp.sum_(one) is one


def test_shards_take_and_put_back() -> None:
    full = torch.arange(24.0).view(8, 3)
    shards = [TensorShard((8, 3), 0, ((2 * r, 2 * r + 2), (4 + 2 * r, 6 + 2 * r))) for r in range(2)]
    again = torch.full((8, 3), -1.0)
    for shard in shards:
        shard.put(again, shard.take(full))
    assert torch.equal(again, full)
    assert torch.equal(shards[1].take(full), full[[2, 3, 6, 7]])
    assert shards[0].full_name("a.b.q_weight") == "a.b.q_weight"
    assert TensorShard((8, 3), 0, ((0, 2),), "weight").full_name("a.b.q_weight") == "a.b.weight"
    with pytest.raises(ValueError, match=r"shape \(8, 4\) was given, expected \(8, 3\)"):
        shards[0].take(torch.zeros(8, 4))


def test_parts_cover_everything_once() -> None:
    for total in range(30):
        for size in range(1, 8):
            parts = [part_of(total, size, rank) for rank in range(size)]
            assert parts[0][0] == 0 and parts[-1][1] == total
            assert all(left[1] == right[0] for left, right in itertools.pairwise(parts))
            sizes = [stop - start for start, stop in parts]
            assert max(sizes) - min(sizes) <= 1


def test_sizes_that_do_not_divide_are_refused() -> None:
    tp = TensorParallel(Axis(4, 0, None))
    with pytest.raises(ValueError, match="6 output features do not divide over 4"):
        ColumnParallelLinear(8, (8, 6), False, tp)
    with pytest.raises(ValueError, match="6 input features do not divide over 4"):
        RowParallelLinear(6, 8, False, tp)
    with pytest.raises(ValueError, match="12 query heads and 3 key/value heads do not divide over 4"):
        SharedKVLinear(8, 12, 3, 2, False, tp)
    with pytest.raises(ConfigError, match="do not divide the world of 6"):
        ParallelConfig(tensor=4).data_size(6)
