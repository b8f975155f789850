"""The file of a small run, as a user would write it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from megatronish.config.base import merge
from tests.runs import MODEL


def run_file(folder: Path, data: str, changes: dict[str, Any] | None = None) -> Path:
    """A file that describes a small run on `data`."""
    raw = {
        "train_micro_batch_size_per_gpu": 2,
        "gradient_clipping": 1.0,
        "zero_optimization": {"stage": 1},
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-3}},
        "megatronish": {
            "model": MODEL,
            "data": {"path": data, "validation_fraction": 0.1, "num_workers": 0},
            "train": {"steps": 3, "save_dir": str(folder / "run"), "eval_interval": 0, "log_interval": 1},
            "log": {"tensorboard": False},
        },
    }
    path = folder / "run.json"
    path.write_text(json.dumps(merge(raw, changes or {})))
    return path
