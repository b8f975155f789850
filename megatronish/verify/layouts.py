"""Parallel layouts by name, and the small run that each of them trains."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from megatronish.config.base import merge
from megatronish.config.parallel import ParallelConfig
from megatronish.config.run import BLOCK, RunConfig
from megatronish.errors import ConfigError

SAMPLES, ACCUMULATION = (
    12,
    3,
)  # per optimizer step in every layout: micro batches of 4 samples over all data-parallel ranks
DEFAULT_LAYOUTS = (
    "tp2",
    "tp2s",
    "tp4",
    "tp2dp2z0",
    "tp2dp2z1",
    "tp2dp2z2",
    "tp2sdp2z2",
    "dp2z3",
    "pp2",
    "pp4",
    "tp2pp2",
    "tp2spp2",
    "pp2dp2",
    "sp2",
    "sp2dp2z3",
    "sp4z0",
)
DEFAULT_MOVES = ("dp2z2", "tp2", "pp2", "tp2pp2", "dp1")
MODEL: dict[str, Any] = {
    "vocab_size": 131,
    "num_layers": 4,
    "hidden_size": 64,
    "num_attention_heads": 8,
    "num_kv_heads": 2,
    "ffn_hidden_size": 96,
    "seq_length": 32,
}


@dataclass(frozen=True)
class ParallelLayout:
    """A layout, named as in tp2sdp2z1: axis sizes, `s` for sequence parallelism within tp, `z` for the ZeRO stage (1)."""

    name: str
    parallel: ParallelConfig
    data: int
    stage: int

    @property
    def ranks(self) -> int:
        """The number of processes."""
        return self.data * self.parallel.tensor * self.parallel.pipeline * self.parallel.sequence


def parse_layout(name: str) -> ParallelLayout:
    """The layout of a name: tp, pp, dp, sp and z, each at most once and followed by a number, and s after tpN.

    Raises ConfigError for any other name.
    """
    found = re.findall(r"(tp|pp|dp|sp|z)(\d+)(s(?!p\d))?", name)
    sizes = {axis: int(number) for axis, number, _ in found}
    divided = [axis for axis, _, mark in found if mark]
    spelled = "".join(axis + number + mark for axis, number, mark in found)
    if spelled != name or len(sizes) != len(found) or divided not in ([], ["tp"]) or not name:
        raise ConfigError(
            f'layout "{name}" cannot be read: write sizes as in tp2, tp2s (sequence divided too), pp2dp2, tp2dp2z2 (ZeRO '
            "stage 2; 1 when left out) or sp2z3."
        )
    if 0 in [size for axis, size in sizes.items() if axis != "z"]:
        raise ConfigError(f'layout "{name}": sizes are at least 1.')
    parallel = ParallelConfig(
        tensor=sizes.get("tp", 1),
        pipeline=sizes.get("pp", 1),
        sequence=sizes.get("sp", 1),
        tensor_sequence=bool(divided),
    )
    return ParallelLayout(name, parallel, sizes.get("dp", 1), sizes.get("z", 1))


def layout_run(layout: ParallelLayout, dtype: str, steps: int, tied: bool, overrides: dict[str, Any]) -> RunConfig:
    """The run of a layout: 12 samples per step in 3 micro batches per rank, AdamW, and clipping that takes effect.

    Raises ConfigError for a layout that cannot be trained, and for overrides that no run has.
    """
    micro, rest = divmod(SAMPLES, ACCUMULATION * layout.data)
    if rest:
        raise ConfigError(
            f"{layout.name}: {SAMPLES} samples in {ACCUMULATION} micro batches do not divide over {layout.data} ranks."
        )
    raw: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": micro,
        "gradient_accumulation_steps": ACCUMULATION,
        "gradient_clipping": 0.5,
        # AdamW divides a gradient by its own size: with its usual eps, 1e-8, the rounding of a gradient near 0 moves a weight
        # by a full learning rate, and a wrong scale of all gradients has no effect. An eps of 1e-6 avoids the first, and the
        # second for small gradients; gradient norms and clipping expose it for all.
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-3, "weight_decay": 0.1, "eps": 1e-6}},
        BLOCK: {
            "model": {**MODEL, "tie_embeddings": tied},
            "schedule": {"type": "constant"},
            "train": {"steps": steps, "save_dir": "unused"},
        },
    }
    raw = merge(raw, overrides)
    raw["zero_optimization"] = {"stage": layout.stage, **raw.get("zero_optimization", {})}
    if layout.stage == 3:
        raw["zero_optimization"].setdefault("stage3_param_persistence_threshold", 0)
    raw[BLOCK]["parallel"] = layout.parallel.model_dump()
    if dtype == "bf16":
        raw["bf16"] = {"enabled": True}
        if layout.stage:
            raw["data_types"] = {"grad_accum_dtype": "fp32"}
    return RunConfig.from_dict(raw, layout.name)
