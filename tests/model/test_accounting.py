"""Counts by formula equal the built model and published numbers; operations equal those that run."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from megatronish.config.model import KernelConfig, ModelConfig
from megatronish.config.presets import preset_names, resolve_model
from megatronish.model.accounting import (
    flops_per_token,
    main,
    mean_attended_keys,
    parameter_counts,
)
from megatronish.model.transformer import Transformer


@pytest.mark.parametrize("name", preset_names())
def test_formula_equals_the_built_model(name: str) -> None:
    config = resolve_model({"preset": name})
    with torch.device("meta"):
        model = Transformer(config)
    sizes = {parameter_name: p.numel() for parameter_name, p in model.named_parameters()}
    counts = parameter_counts(config)
    assert counts.total == sum(sizes.values())
    assert counts.embedding == sum(n for key, n in sizes.items() if key.startswith(("embedding.", "head.")))


@settings(max_examples=80, deadline=None)
@given(data=st.data())
def test_formula_equals_the_built_model_for_any_switches(data: st.DataObject) -> None:
    flag = st.booleans()
    kv_heads, groups = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 3))
    position, parallel = data.draw(st.sampled_from(["pre", "post"])), data.draw(flag)
    config = ModelConfig(
        vocab_size=data.draw(st.integers(1, 50)),
        num_layers=data.draw(st.integers(1, 3)),
        hidden_size=data.draw(st.integers(1, 20)),
        num_attention_heads=kv_heads * groups,
        num_kv_heads=kv_heads,
        head_dim=2 * data.draw(st.integers(1, 6)),
        ffn_hidden_size=data.draw(st.integers(1, 20)),
        seq_length=8,
        activation=data.draw(st.sampled_from(["swiglu", "geglu", "geglu_tanh", "gelu", "gelu_tanh", "relu"])),
        norm=data.draw(st.sampled_from(["rmsnorm", "layernorm"])),
        norm_position=position,
        parallel_block=parallel,
        parallel_block_shared_norm=parallel and position == "pre" and data.draw(flag),
        norm_bias=data.draw(flag),
        qk_norm=data.draw(flag),
        attention_qkv_bias=data.draw(flag),
        attention_out_bias=data.draw(flag),
        mlp_bias=data.draw(flag),
        tie_embeddings=data.draw(flag),
    )
    with torch.device("meta"):
        model = Transformer(config)
    assert parameter_counts(config).total == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("activation", ["swiglu", "gelu"])
def test_operations_equal_those_that_run(activation: str) -> None:
    """torch's counter sees the reference's full score matrix: with the causal half put in by hand, both agree exactly."""
    config = ModelConfig(
        vocab_size=40,
        num_layers=3,
        hidden_size=24,
        num_attention_heads=4,
        num_kv_heads=2,
        head_dim=8,
        ffn_hidden_size=20,
        seq_length=16,
        activation=activation,
    )
    model = Transformer(config, KernelConfig(attention="reference"))
    tokens = torch.zeros(2, 16, dtype=torch.long)
    flops = flops_per_token(config)
    full_attention = flops.attention * 16 / mean_attended_keys(16, None)
    with FlopCounterMode(display=False) as forward:
        loss, _ = model.loss(tokens, tokens)
    assert forward.get_total_flops() == 32 * (flops.linear + full_attention)
    with FlopCounterMode(display=False) as backward:
        loss.backward()
    # torch's counter takes the batched products of the backward pass in full as well
    assert backward.get_total_flops() == 2 * 32 * (flops.linear + full_attention)
    assert flops.train == 3 * (flops.linear + flops.attention)


@given(st.integers(1, 200), st.none() | st.integers(1, 250))
def test_attended_keys_are_counted_exactly(length: int, window: int | None) -> None:
    brute = sum(min(i, window or i) for i in range(1, length + 1)) / length
    assert mean_attended_keys(length, window) == pytest.approx(brute, rel=1e-12)


def test_window_layers_cost_less() -> None:
    window = {"sliding_window": 64, "full_attention_interval": 4}
    plain, sliding = resolve_model({"preset": "tiny"}), resolve_model({"preset": "tiny", **window})
    ratio = flops_per_token(sliding, 1024).attention / flops_per_token(plain, 1024).attention
    assert ratio == pytest.approx((3 * mean_attended_keys(1024, 64) / 512.5 + 1) / 4)
    assert flops_per_token(plain, 1024).linear == flops_per_token(plain).linear


def test_table(capsys: pytest.CaptureFixture[str]) -> None:
    main(["llama3_8b", "tiny"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].split()[:2] == ["llama3_8b", "8,030,261,248"]
    assert lines[2].split()[:2] == ["tiny", "4,000,512"]
    with pytest.raises(SystemExit):
        main(["llama3_9b"])
    assert 'unknown model preset "llama3_9b". Did you mean "llama3_8b"?' in capsys.readouterr().err
