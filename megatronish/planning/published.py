"""What Megatron-LM and torchtitan report for themselves, as layouts of this planner, with its predictions.

Sources, all at github.com: NVIDIA/Megatron-LM images/cases_april2021.png with examples/sc21/run_table_1.sh (Narayanan et al.
2021, table 1) and README.md with images/model_table.png (weak scaling on H100, July 2024); pytorch/torchtitan
docs/performance.md of August 2024, benchmarks/llama3_h100_202412_torchtitan.md and
benchmarks/asyncTP_llama3_h100_2025-06_torchtitan.md (bf16 rows only).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from megatronish.config.model import ModelConfig
from megatronish.config.presets import resolve_model
from megatronish.planning.hardware import A100, H100, H100_HBM2E, Hardware
from megatronish.planning.layout import PlannedLayout, Recompute
from megatronish.planning.stack import MEGATRON_2021, MEGATRON_CORE, TORCHTITAN, Stack
from megatronish.planning.throughput import Estimate, estimate


@dataclass(frozen=True)
class PublishedRun:
    """A reported run. tokens_per_gpu_second: as reported, or from reported TFLOP/s by the reporter's own formula.

    fitted: the share of the peak that matrix products reach was fitted on it. assumed: what the source does not report.
    """

    table: str
    name: str
    model: ModelConfig
    layout: PlannedLayout
    stack: Stack
    hardware: Hardware
    tokens_per_gpu_second: float
    fitted: bool = False
    assumed: str = ""

    def predict(self) -> Estimate:
        """The planner's estimate."""
        return estimate(self.model, self.layout, self.hardware, self.stack)

    @property
    def error(self) -> float:
        """Predicted over reported throughput, less 1."""
        return self.predict().tokens_per_gpu_second / self.tokens_per_gpu_second - 1


def published_runs() -> list[PublishedRun]:
    """All of them."""
    return [*_megatron_2021(), *_megatron_h100(), *_torchtitan()]


def gpt(layers: int, hidden: int, heads: int, vocabulary: int, length: int, tied: bool) -> ModelConfig:
    """A GPT-3 style model: LayerNorm, GELU, biases, four times as wide inside."""
    return ModelConfig(
        vocab_size=vocabulary,
        num_layers=layers,
        hidden_size=hidden,
        num_attention_heads=heads,
        ffn_hidden_size=4 * hidden,
        seq_length=length,
        activation="gelu",
        norm="layernorm",
        attention_qkv_bias=True,
        attention_out_bias=True,
        mlp_bias=True,
        rope_fraction=0.0,
        tie_embeddings=tied,
    )


def llama3(size: str) -> ModelConfig:
    """Llama 3 8B, 70B or 405B on 8,192 tokens (Grattafiori et al. 2024, table 3)."""
    base = resolve_model({"preset": "llama3_8b"})
    if size == "8B":
        return base
    layers, hidden, heads, ffn = {"70B": (80, 8192, 64, 28672), "405B": (126, 16384, 128, 53248)}[size]
    shape = {"num_layers": layers, "hidden_size": hidden, "num_attention_heads": heads, "ffn_hidden_size": ffn}
    return ModelConfig.model_validate({**base.model_dump(), **shape, "preset": None})


def _megatron_2021() -> list[PublishedRun]:
    """Table 1 of Narayanan et al. 2021: TFLOP/s with recomputation, F = 96 B s l h^2 (1 + s / 6h + V / 16lh)."""
    # layers, hidden, heads, tp, pp, micro batch, batch, GPUs, layers of an interleaved part (0: plain), TFLOP/s
    rows = {
        "1.7B": (24, 2304, 24, 1, 1, 16, 512, 32, 0, 137),
        "3.6B": (30, 3072, 32, 2, 1, 16, 512, 64, 0, 138),
        "7.5B": (36, 4096, 32, 4, 1, 16, 512, 128, 0, 142),
        "18B": (40, 6144, 48, 8, 1, 8, 1024, 256, 0, 135),
        "39B": (48, 8192, 64, 8, 2, 4, 1536, 512, 0, 138),
        "76B": (60, 10240, 80, 8, 4, 2, 1792, 1024, 5, 140),
        "145B": (80, 12288, 96, 8, 8, 2, 2304, 1536, 5, 148),
        "310B": (96, 16384, 128, 8, 16, 1, 2160, 1920, 3, 155),
        "530B": (105, 20480, 128, 8, 35, 1, 2520, 2520, 1, 163),
        "1T": (128, 25600, 160, 8, 64, 1, 3072, 3072, 0, 163),
    }
    runs = []
    for name, (layers, hidden, heads, tp, pp, micro, batch, gpus, part, teraflops) in rows.items():
        data = gpus // tp // pp
        layout = PlannedLayout(
            tensor=tp,
            pipeline=pp,
            data=data,
            zero=0,
            micro_batch=micro,
            accumulation=batch // data // micro,
            recompute="full",
            interleave=layers // pp // part if part else 1,
        )
        flops = 96 * layers * hidden**2 * (1 + 2048 / (6 * hidden) + 51200 / (16 * layers * hidden))
        model = gpt(layers, hidden, heads, 51200, 2048, tied=True)
        speed = teraflops * 1e12 / flops
        runs.append(PublishedRun("Megatron-LM 2021, A100", name, model, layout, MEGATRON_2021, A100, speed, pp == 1))
    return runs


def _megatron_h100() -> list[PublishedRun]:
    """The README's weak scaling table; FLOP as Megatron-Core 0.8 counts them: 72 B s l h^2 (1 + s / 6h + V / 12lh)."""
    # layers, hidden, heads, tp, pp, batch, TFLOP/s; data-parallel 48 throughout
    rows = {
        "1.7B": (24, 2048, 16, 1, 1, 192, 408.8),
        "7.1B": (30, 4096, 32, 2, 1, 192, 465.9),
        "16B": (32, 6144, 48, 4, 1, 192, 489.1),
        "32B": (48, 7168, 56, 8, 1, 192, 459.6),
        "70B": (84, 8192, 64, 8, 2, 384, 419.7),
        "119B": (92, 10240, 80, 8, 4, 768, 420.5),
        "177B": (96, 12288, 96, 8, 6, 1152, 432.8),
        "314B": (96, 16384, 128, 8, 8, 1536, 474.4),
        "462B": (112, 18432, 144, 8, 16, 3072, 459.9),
    }
    runs = []
    for name, (layers, hidden, heads, tp, pp, batch, teraflops) in rows.items():
        micro = 4 if pp == 1 else 1
        layout = PlannedLayout(
            tensor=tp,
            tensor_sequence=tp > 1,
            pipeline=pp,
            data=48,
            micro_batch=micro,
            accumulation=batch // 48 // micro,
            interleave=layers // pp if pp > 1 else 1,
        )
        flops = 72 * layers * hidden**2 * (1 + 4096 / (6 * hidden) + 131072 / (12 * layers * hidden))
        model = gpt(layers, hidden, heads, 131072, 4096, tied=False)  # the stated sizes count two tables
        assumed = "micro batch 4" if pp == 1 else "micro batch 1, interleaved layer by layer"
        speed = teraflops * 1e12 / flops
        runs.append(
            PublishedRun("Megatron-LM 2024, H100", name, model, layout, MEGATRON_CORE, H100, speed, pp == 1, assumed)
        )
    return runs


def _torchtitan() -> list[PublishedRun]:
    # size, hardware, FSDP, TP, micro batch, recomputation, tokens/s a GPU
    rows: list[tuple[str, Hardware, int, int, int, Recompute, float]] = [
        ("8B", A100, 64, 1, 1, "selective", 2973),
        ("70B", A100, 64, 1, 1, "full", 331),
        ("8B", H100_HBM2E, 8, 1, 2, "selective", 6667),
        ("8B", H100_HBM2E, 128, 1, 2, "selective", 6514),
        ("8B", H100_HBM2E, 8, 8, 12, "selective", 4378),
        ("70B", H100_HBM2E, 32, 8, 16, "full", 597.3),
        ("405B", H100_HBM2E, 16, 8, 2, "full", 109),
    ]
    runs = []
    for size, hardware, data, tensor, micro, recompute, speed in rows:
        layout = PlannedLayout(
            tensor=tensor,
            tensor_sequence=tensor > 1,
            data=data,
            zero=3,
            micro_batch=micro,
            recompute=recompute,
        )
        kind = "A100" if hardware is A100 else "H100"
        name = f"Llama 3 {size}" + (f", TP {tensor}" if tensor > 1 else "")
        runs.append(PublishedRun(f"torchtitan, {kind}", name, llama3(size), layout, TORCHTITAN, hardware, speed))
    return runs


def fit_matmul_share(table: str) -> float:
    """The share, to half a percent of the peak, with the least squared error of log throughput on a table's fitted runs."""
    runs = [run for run in published_runs() if run.table == table and run.fitted]
    if not runs:
        raise ValueError(f"no run of {table!r} is marked for fitting")

    def cost(share: float) -> float:
        return sum(math.log1p(_with_share(run, share).error) ** 2 for run in runs)

    return min((step / 200 for step in range(60, 181)), key=cost)


def _with_share(run: PublishedRun, share: float) -> PublishedRun:
    return replace(run, hardware=replace(run.hardware, matmul_share=share))
