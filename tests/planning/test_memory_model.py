"""Parameters of a rank equal those of the built model; kept activations equal what autograd saves."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import CheckpointPolicy

from megatronish.config.model import KernelConfig, ModelConfig
from megatronish.config.presets import preset_names, resolve_model
from megatronish.model.accounting import parameter_counts
from megatronish.model.block import _keep_expensive
from megatronish.model.transformer import Transformer
from megatronish.parallel.layers import TensorParallel
from megatronish.parallel.mesh import Axis, ParallelMesh
from megatronish.planning.layout import PlannedLayout
from megatronish.planning.memory_model import block_activation_bytes, rank_memory
from megatronish.planning.parameters import all_layers, rank_parameters, stage_layers
from megatronish.verify.tracked_memory import expected_bytes
from tests.runs import small_run

SHAPE: dict[str, Any] = {
    "vocab_size": 61,
    "num_layers": 3,
    "hidden_size": 64,
    "num_attention_heads": 8,
    "num_kv_heads": 2,
    "ffn_hidden_size": 160,
    "seq_length": 128,
}
FORMS: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen3": {"qk_norm": True, "tie_embeddings": True},
    "gpt": {
        "norm": "layernorm",
        "activation": "gelu",
        "attention_qkv_bias": True,
        "attention_out_bias": True,
        "mlp_bias": True,
    },
    "neox": {"parallel_block": True, "norm": "layernorm", "activation": "gelu"},
    "gpt-j": {"parallel_block": True, "parallel_block_shared_norm": True, "norm": "layernorm", "norm_bias": False},
    "post-norm": {"norm_position": "post"},
}


def tensor_rank(size: int, rank: int, sequence: bool) -> TensorParallel:
    """One of `size` ranks; no group is made, and none is needed to build layers."""
    return TensorParallel(Axis(size, rank, cast(Any, SimpleNamespace())), sequence)


@pytest.mark.parametrize("name", preset_names())
def test_a_single_rank_holds_the_full_model(name: str) -> None:
    model = resolve_model({"preset": name})
    assert rank_parameters(model, 1, all_layers(model)).total == parameter_counts(model).total


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("tensor", [2, 4, 8])
def test_tensor_ranks_hold_what_the_formula_gives(form: str, tensor: int) -> None:
    """Rank 0 of the built model, which has the larger part of the uneven vocabulary; 8 and 4 ranks share 2 KV heads."""
    model = ModelConfig(**SHAPE | FORMS[form])
    with torch.device("meta"):
        built = Transformer(model, seed=None, tp=tensor_rank(tensor, 0, sequence=True))
    assert rank_parameters(model, tensor, all_layers(model)).total == sum(p.numel() for p in built.parameters())


@settings(max_examples=40, deadline=None)
@given(
    stages=st.integers(1, 5),
    layers=st.integers(5, 9),
    tensor=st.sampled_from([1, 2]),
    form=st.sampled_from(list(FORMS)),
)
def test_stages_hold_the_model_between_them(stages: int, layers: int, tensor: int, form: str) -> None:
    """Every layer is on one stage; a tied table on both ends is the only thing held twice."""
    model = ModelConfig(**SHAPE | FORMS[form] | {"num_layers": layers})
    parts = stage_layers(model, stages)
    held = sum(rank_parameters(model, tensor, part).total for part in parts)
    table = -(-model.vocab_size // tensor) * model.hidden_size
    twice = table if model.tie_embeddings and stages > 1 else 0
    assert held - twice == rank_parameters(model, tensor, all_layers(model)).total
    assert [part.first for part in parts] == [True] + [False] * (stages - 1)
    assert [part.last for part in parts] == [False] * (stages - 1) + [True]


@pytest.mark.parametrize(("zero", "expected"), [(0, (2, 6, 12)), (1, (2, 6, 3)), (2, (2, 1, 3)), (3, (0.5, 1, 3))])
def test_states_by_zero_stage(zero: int, expected: tuple[float, float, float]) -> None:
    """Bytes per parameter on four ranks (Rajbhandari et al. 2020, figure 1, with gradients summed in fp32)."""
    model = ModelConfig(**SHAPE)
    memory = rank_memory(model, PlannedLayout(data=4, zero=zero), all_layers(model))
    count = parameter_counts(model).total
    assert (memory.weights, memory.gradients, memory.states) == tuple(count * size for size in expected)


@pytest.mark.parametrize(
    "layout",
    [
        PlannedLayout(data=2, zero=1),
        PlannedLayout(tensor=4, data=2, zero=2),
        PlannedLayout(data=8, zero=3),
        PlannedLayout(2, 1, 4, 2, zero=1),
    ],
    ids=PlannedLayout.describe,
)
def test_states_are_those_that_verify_parallel_counts(layout: PlannedLayout) -> None:
    """tools/verify_parallel.py holds its own formula against real runs; on the first rank both are equal."""
    sizes = {"tensor": layout.tensor, "pipeline": layout.pipeline}
    ours = {"model": SHAPE, "parallel": sizes}
    raw = {"bf16": {"enabled": True}, "zero_optimization": {"stage": layout.zero}, "megatronish": ours}
    config = small_run("unused", "unused", raw)
    mesh = ParallelMesh(
        pp=Axis(layout.pipeline), dp=Axis(layout.data), tp=Axis(layout.tensor), data=Axis(layout.shards)
    )
    model = config.megatronish.model
    found = rank_memory(model, layout, stage_layers(model, layout.pipeline)[0])
    expected = expected_bytes(config, mesh)
    for mine, theirs in zip((found.weights, found.gradients, found.states), vars(expected).values()):
        assert mine == pytest.approx(theirs, abs=12)  # theirs rounds a rank's numbers up to integers


def kept_bytes(model: ModelConfig, mode: str) -> float:
    """Bytes per token that autograd keeps for the backward pass of the model, each storage once, without weights."""
    built = Transformer(model, KernelConfig(attention="sdpa", ops="fused")).bfloat16()
    built.set_activation_checkpointing(mode)
    weights = {p.untyped_storage().data_ptr() for p in built.parameters()}
    storages: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            storages[storage.data_ptr()] = storage  # held, so that no address is used twice
        return tensor

    tokens = torch.zeros(2, model.seq_length, dtype=torch.long)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        built.loss(tokens, tokens)
    return sum(storage.nbytes() for storage in storages.values()) / tokens.numel()


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("mode", ["none", "full"])
def test_activations_of_a_block_are_those_that_autograd_keeps(form: str, mode: str) -> None:
    """Two blocks more keep twice the formula, and the norms' statistics: up to 8 bytes a normalised row, left out of it."""
    model = ModelConfig(**SHAPE | FORMS[form])
    fewer = model.model_copy(update={"num_layers": 1})
    counted = (kept_bytes(model, mode) - kept_bytes(fewer, mode)) / 2
    rows = 2 + (model.num_attention_heads + model.resolved_kv_heads if model.qk_norm else 0)
    formula = block_activation_bytes(model, PlannedLayout(recompute=cast(Any, mode)))
    assert formula <= counted <= formula + (8 * rows if mode == "none" else 0)


class _Kept(TorchDispatchMode):
    """Bytes that operators put out which selective recomputation keeps."""

    bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if _keep_expensive(None, func) == CheckpointPolicy.MUST_SAVE:
            outputs = result if isinstance(result, tuple) else (result,)
            self.bytes += sum(output.nbytes for output in outputs if isinstance(output, Tensor))
        return result


@pytest.mark.parametrize("form", ["llama", "gpt"])
def test_selective_recomputation_keeps_products_and_attention(form: str) -> None:
    model = ModelConfig(**SHAPE | FORMS[form])
    built = Transformer(model, KernelConfig(attention="sdpa", ops="fused")).bfloat16()
    tokens = torch.zeros(2, model.seq_length, dtype=torch.long)
    with _Kept() as kept:
        hidden = built.embedding(tokens) if built.embedding is not None else None
        assert hidden is not None
        inputs = built._attention_inputs(hidden, tokens, None, None, None, None)
        for block in built.local_blocks:
            hidden, _ = block(hidden, None, inputs)
    counted = kept.bytes / tokens.numel() / model.num_layers + 2 * model.hidden_size  # and the block's input
    assert counted == block_activation_bytes(model, PlannedLayout(recompute="selective"))


def test_pipelines_hold_micro_batches_in_flight() -> None:
    """1F1B: the first of four stages holds four micro batches, the last one; fewer where there are fewer."""
    model = ModelConfig(**SHAPE | {"num_layers": 8})
    layout = PlannedLayout(pipeline=4, micro_batch=2, accumulation=6)
    middle = stage_layers(model, 4)[1]
    one = 2 * model.seq_length * middle.blocks * block_activation_bytes(model, layout)
    found = [rank_memory(model, layout, middle, stage).activations for stage in range(4)]
    assert found == [4 * one, 3 * one, 2 * one, one]
    short = PlannedLayout(pipeline=4, micro_batch=2, accumulation=2)
    assert rank_memory(model, short, middle, 0).activations == 2 * one


@given(tensor=st.sampled_from([1, 2, 4]), data=st.integers(1, 64), micro=st.integers(1, 8), zero=st.integers(0, 2))
def test_dividing_more_never_takes_more_memory(tensor: int, data: int, micro: int, zero: int) -> None:
    model = ModelConfig(**SHAPE | {"num_kv_heads": 8})

    def total(**sizes: Any) -> float:
        layout = PlannedLayout(**{"tensor": tensor, "data": data, "micro_batch": micro, "zero": zero} | sizes)
        memory = rank_memory(model, layout, all_layers(model))
        return memory.total - memory.gathered  # what ZeRO-3 gathers comes on top, and may be more than it saves here

    assert total(zero=zero + 1) <= total()
    assert total(tensor=2 * tensor) < total()
    assert total(data=data + 1) <= total()
    assert total(micro_batch=micro + 1) > total()
    assert total(tensor_sequence=True) <= total()
