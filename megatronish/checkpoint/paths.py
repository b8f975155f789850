"""Names of the files and folders of a run.

save_dir/checkpoints/step-00000500/   a checkpoint
save_dir/checkpoints/latest, best     text files with the name of a checkpoint
"""

from __future__ import annotations

from pathlib import Path

CHECKPOINTS = "checkpoints"
STATE_FILE = "state.json"
RUN_FILE = "run.json"
EVALUATION_FILE = "evaluation.json"
TOKENIZER_RECORD_FILE = "tokenizer_record.json"
LATEST, BEST = "latest", "best"


def run_folder(checkpoint: Path) -> Path:
    """The folder of the run that a checkpoint belongs to; of a checkpoint that was copied elsewhere, its own folder."""
    parent = checkpoint.resolve().parent
    return parent.parent if parent.name == CHECKPOINTS else checkpoint
