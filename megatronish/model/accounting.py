"""Exact parameter counts, floating-point operations and memory of a model, from its configuration alone.

`python -m megatronish.model.accounting [PRESET ...]` prints them for the named presets, or for all.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass

from megatronish.config.model import ModelConfig
from megatronish.config.presets import preset_names, resolve_model

# Bytes per parameter in mixed-precision training with Adam: bf16 weight and gradient, fp32 weight and two fp32 moments.
TRAINING_BYTES_PER_PARAMETER = 2 + 2 + 4 + 4 + 4


@dataclass(frozen=True)
class ParameterCounts:
    """embedding: the token table, and the head unless tied to it; non_embedding: all other parameters."""

    embedding: int
    non_embedding: int

    @property
    def total(self) -> int:
        """All parameters, each counted once."""
        return self.embedding + self.non_embedding


@dataclass(frozen=True)
class Flops:
    """Floating-point operations per token, a multiply-add counted as two.

    linear: all weight matrices, including the head; attention: the score and value products over exactly the keys that the
    causal mask or window admits, averaged over a sequence. Norms, activations, rotations, softmax, embedding look-ups and
    recomputation are not counted: this is the count that MFU is computed from.
    """

    linear: float
    attention: float

    @property
    def forward(self) -> float:
        """A forward pass."""
        return self.linear + self.attention

    @property
    def train(self) -> float:
        """Forward and backward; the backward pass has two products for each one of the forward pass."""
        return 3 * self.forward


def parameter_counts(config: ModelConfig) -> ParameterCounts:
    """Parameters of Transformer(config)."""
    hidden = config.hidden_size
    norm = _norm_parameters(config, hidden)
    block = _block_matrices(config) + _block_biases(config)
    block += norm * (2 if config.has_mlp_norm else 1)
    if config.qk_norm:
        block += 2 * _norm_parameters(config, config.resolved_head_dim)
    tables = 1 if config.tie_embeddings else 2
    return ParameterCounts(
        embedding=tables * config.vocab_size * hidden,
        non_embedding=config.num_layers * block + (norm if config.has_final_norm else 0),
    )


def mean_attended_keys(seq_length: int, window: int | None) -> float:
    """Mean number of keys per query of a causal sequence: sum of min(i, window) for i = 1..s, divided by s."""
    if window is None or window >= seq_length:
        return (seq_length + 1) / 2
    return (window * (window + 1) / 2 + (seq_length - window) * window) / seq_length


def flops_per_token(config: ModelConfig, seq_length: int | None = None) -> Flops:
    """Operations per token in sequences of seq_length tokens (the training context by default)."""
    length = config.seq_length if seq_length is None else seq_length
    weights = config.num_layers * _block_matrices(config) + config.vocab_size * config.hidden_size
    keys = sum(mean_attended_keys(length, config.layer_window(layer)) for layer in range(config.num_layers))
    width = config.num_attention_heads * config.resolved_head_dim
    return Flops(linear=2.0 * weights, attention=2 * 2.0 * width * keys)


def layer_costs(config: ModelConfig, by: str) -> list[float]:
    """Cost of each layer of transformer.layer_specs: embedding, blocks, final norm, head.

    by: "time", forward operations per token; "parameters", elements held (a tied head counts the table again).
    """
    head = config.vocab_size * config.hidden_size
    if by == "time":
        width = config.num_attention_heads * config.resolved_head_dim
        windows = [config.layer_window(layer) for layer in range(config.num_layers)]
        keys = [mean_attended_keys(config.seq_length, window) for window in windows]
        blocks = [2.0 * _block_matrices(config) + 2 * 2.0 * width * read for read in keys]
        return [0.0, *blocks, *([0.0] if config.has_final_norm else []), 2.0 * head]
    assert by == "parameters", by
    norm = _norm_parameters(config, config.hidden_size) if config.has_final_norm else 0
    inside = (parameter_counts(config).non_embedding - norm) / config.num_layers
    return [float(head), *[inside] * config.num_layers, *([float(norm)] if norm else []), float(head)]


def _norm_parameters(config: ModelConfig, size: int) -> int:
    return 2 * size if config.norm == "layernorm" and config.norm_bias else size


def _block_matrices(config: ModelConfig) -> int:
    hidden, head_dim = config.hidden_size, config.resolved_head_dim
    attention = hidden * head_dim * (2 * config.num_attention_heads + 2 * config.resolved_kv_heads)
    return attention + hidden * config.ffn_hidden_size * (3 if config.is_gated else 2)


def _block_biases(config: ModelConfig) -> int:
    biases = 0
    if config.attention_qkv_bias:
        biases += (config.num_attention_heads + 2 * config.resolved_kv_heads) * config.resolved_head_dim
    if config.attention_out_bias:
        biases += config.hidden_size
    if config.mlp_bias:
        biases += config.ffn_hidden_size * (2 if config.is_gated else 1) + config.hidden_size
    return biases


def table(names: Sequence[str]) -> str:
    """Parameters, operations and memory of the named presets, one per line. Raises ValueError for an unknown name."""
    lines = [
        f"{'preset':<14}{'parameters':>15}{'embedding':>14}{'non-embedding':>15}{'context':>9}{'GFLOP/token fwd':>17}"
        f"{'train':>9}{'bf16 GB':>9}{'training GB':>13}"
    ]
    for name in names:
        config = resolve_model({"preset": name})
        counts, flops = parameter_counts(config), flops_per_token(config)
        lines.append(
            f"{name:<14}{counts.total:>15,}{counts.embedding:>14,}{counts.non_embedding:>15,}{config.seq_length:>9,}"
            f"{flops.forward / 1e9:>17.4f}{flops.train / 1e9:>9.4f}{2 * counts.total / 1e9:>9.2f}"
            f"{TRAINING_BYTES_PER_PARAMETER * counts.total / 1e9:>13.2f}"
        )
    lines.append(
        f"training GB: weights, gradients and Adam states at {TRAINING_BYTES_PER_PARAMETER} bytes per parameter, before any "
        "sharding and without activations; 1 GB = 1e9 bytes"
    )
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(prog="python -m megatronish.model.accounting", description=__doc__)
    parser.add_argument("preset", nargs="*", help="presets to show (default: all)")
    names = parser.parse_args(arguments).preset or preset_names()
    try:
        print(table(names))
    except ValueError as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
