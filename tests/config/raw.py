"""The smallest complete run description, and how tests change it."""

from __future__ import annotations

from typing import Any

from megatronish.config.base import merge
from megatronish.config.run import RunConfig

SMALLEST: dict[str, Any] = {
    "train_micro_batch_size_per_gpu": 2,
    "gradient_clipping": 1.0,
    "zero_optimization": {"stage": 1},
    "optimizer": {"type": "AdamW", "params": {"lr": 1e-3}},
    "megatronish": {"model": {"preset": "tiny"}, "train": {"steps": 10, "save_dir": "runs/x"}},
}
ABSENT = object()  # as a value of `changes`: the key is taken out


def changed(changes: dict[str, Any]) -> dict[str, Any]:
    """SMALLEST with `changes` laid on it, section by section."""
    return _without_absent(merge(SMALLEST, changes))


def _without_absent(raw: dict[str, Any]) -> dict[str, Any]:
    kept = {key: value for key, value in raw.items() if value is not ABSENT}
    return {key: _without_absent(value) if isinstance(value, dict) else value for key, value in kept.items()}


def read(**changes: Any) -> RunConfig:
    """The checked run of SMALLEST with changes."""
    return RunConfig.from_dict(changed(changes), "run.json")
