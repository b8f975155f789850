"""Where things are in a run's folder, and which checkpoint a path means. Reads names only: no torch, no weights.

save_dir/checkpoints/step-00000500/   a checkpoint: complete when it holds state.json
save_dir/checkpoints/latest, best     pointers: text files with the name of a checkpoint
"""

from __future__ import annotations

from pathlib import Path

from megatronish.errors import ConfigError

CHECKPOINTS = "checkpoints"
STATE_FILE = "state.json"
RUN_FILE = "run.json"
EVALUATION_FILE = "evaluation.json"
TOKENIZER_RECORD_FILE = "tokenizer_record.json"
LATEST, BEST = "latest", "best"


def find_checkpoint(path: Path, prefer: str = LATEST) -> Path:
    """The checkpoint folder a user means by a checkpoint, a run folder or its checkpoints folder.

    prefer: which pointer of a run decides, "latest" or "best" (falls back to latest). Raises ConfigError.
    """
    if (path / STATE_FILE).exists():
        return path
    for folder in (path / CHECKPOINTS, path):
        pointed = read_pointer(folder, prefer) or read_pointer(folder, LATEST)
        found = pointed or max((p.parent for p in folder.glob(f"step-*/{STATE_FILE}")), default=None)
        if found:
            return found
    if not path.exists():
        raise ConfigError(f"{path}: no such folder. Give a run's folder (--train.save_dir) or one of its checkpoints.")
    raise ConfigError(f"{path}: holds no complete checkpoint. Give a run's folder (--train.save_dir).")


def read_pointer(folder: Path, name: str) -> Path | None:
    """The checkpoint folder that the pointer file names, if both exist."""
    try:
        target = folder / (folder / name).read_text(encoding="utf-8").strip()
    except OSError:
        return None
    return target if target.parent == folder and (target / STATE_FILE).exists() else None


def run_folder(checkpoint: Path) -> Path:
    """The run's folder that a checkpoint lies in; a checkpoint that was copied elsewhere stands for its own run."""
    parent = checkpoint.resolve().parent
    return parent.parent if parent.name == CHECKPOINTS else checkpoint
