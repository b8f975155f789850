"""Check checkpoints: every file's size and hash against the manifest.

    python tools/check_checkpoints.py runs/demo                        all checkpoints of a run
    python tools/check_checkpoints.py runs/demo/checkpoints/step-00000420
    python tools/check_checkpoints.py --adopt CHECKPOINT               write a new manifest of the files as they are

Use --adopt for checkpoints of versions without manifests, and for those that were changed on purpose: the present contents of
their files are then taken as correct. Exit status 0: all are good; 1: some are not; 2: bad input.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # run from a checkout that is not installed

from megatronish.checkpoint.manifest import MANIFEST_FILE, write_manifest
from megatronish.checkpoint.paths import CHECKPOINTS, STATE_FILE
from megatronish.checkpoint.store import CheckpointStore
from megatronish.errors import ConfigError, exit_on_user_error


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("paths", type=Path, nargs="+", help="runs or checkpoints")
    parser.add_argument("--adopt", action="store_true", help="write new manifests of these checkpoints")
    arguments = parser.parse_args()
    with exit_on_user_error():
        found = [checkpoint for path in arguments.paths for checkpoint in checkpoints_of(path)]
        if arguments.adopt:
            for checkpoint in found:
                adopt(checkpoint)
        good = [check(checkpoint) for checkpoint in found]
    print(f"{sum(good)} of {len(good)} checkpoints are good")
    return 0 if all(good) else 1


def checkpoints_of(path: Path) -> list[Path]:
    """The checkpoint at `path`, or those of the run there, damaged ones included. Raises ConfigError if there is none."""
    for folder in (path, path / CHECKPOINTS):
        if any((folder / name).exists() for name in (MANIFEST_FILE, STATE_FILE)):
            return [folder]
        if found := sorted(
            inner for inner in folder.glob("*step-*") if inner.is_dir() and not inner.name.startswith(".")
        ):
            return found
    raise ConfigError(f"{path}: holds no checkpoint. Give a run's folder (--train.save_dir) or one of its checkpoints.")


def adopt(checkpoint: Path) -> None:
    """Write the manifest of the files as they are. Raises ConfigError if this is not the checkpoint of a run."""
    name = checkpoint.resolve().name.rpartition("step-")[2]
    if not (checkpoint / STATE_FILE).exists() or not name.isdigit():
        raise ConfigError(
            f"--adopt {checkpoint}: is not a checkpoint with a {STATE_FILE} and a name such as step-00000500."
        )
    (checkpoint / MANIFEST_FILE).unlink(missing_ok=True)
    write_manifest(checkpoint, int(name))


def check(checkpoint: Path) -> bool:
    """Whether all files of a checkpoint are as they were written; prints one line, and one for each fault."""
    begin = time.monotonic()
    store = CheckpointStore(checkpoint.parent)
    faults, size = store.faults(checkpoint), 0
    if not faults:
        manifest = store.manifest(checkpoint)
        faults, size = store.faults(checkpoint, manifest.files), manifest.bytes
    seconds = time.monotonic() - begin
    print(f"{checkpoint}: {'DAMAGED' if faults else 'good'} ({size / 1e6:,.1f} MB in {seconds:.2f} s)")
    for fault in faults:
        print(f"    {fault}")
    return not faults


if __name__ == "__main__":
    sys.exit(main())
