"""Check checkpoints: every file's size and hash against the manifest.

    python tools/check_checkpoints.py runs/demo                        all checkpoints of a run
    python tools/check_checkpoints.py runs/demo/checkpoints/step-00000420
    python tools/check_checkpoints.py --adopt CHECKPOINT               write the manifest that is missing, as the files are now

--adopt is for checkpoints of versions before manifests, and for those that were changed on purpose: what their files hold
is then taken for right. Exit status 0: all are good; 1: some are not; 2: bad input.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # run from a checkout that is not installed

from megatronish.checkpoint.manifest import (
    MANIFEST_FILE,
    DamagedCheckpointError,
    content_faults,
    read_manifest,
    size_faults,
    write_manifest,
)
from megatronish.checkpoint.paths import CHECKPOINTS, STATE_FILE
from megatronish.errors import ConfigError, exit_on_user_error


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("paths", type=Path, nargs="+", help="runs or checkpoints")
    parser.add_argument("--adopt", action="store_true", help="write the manifests of these checkpoints anew")
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
    """The checkpoint at `path`, or those of the run there, oldest first. Raises ConfigError when there is none."""
    for folder in (path, path / CHECKPOINTS):
        if any((folder / name).exists() for name in (MANIFEST_FILE, STATE_FILE)):
            return [folder]
        if found := sorted(
            place for place in folder.glob("*step-*") if place.is_dir() and not place.name.startswith(".")
        ):
            return found
    raise ConfigError(f"{path}: holds no checkpoint. Give a run's folder (--train.save_dir) or one of its checkpoints.")


def adopt(checkpoint: Path) -> None:
    """Write the manifest of the files as they are. Raises ConfigError for what is no checkpoint of a run."""
    name = checkpoint.resolve().name.rpartition("step-")[2]
    if not (checkpoint / STATE_FILE).exists() or not name.isdigit():
        raise ConfigError(
            f"--adopt {checkpoint}: is no checkpoint with a {STATE_FILE} and a name such as step-00000500."
        )
    (checkpoint / MANIFEST_FILE).unlink(missing_ok=True)
    write_manifest(checkpoint, int(name))


def check(checkpoint: Path) -> bool:
    """Whether all of a checkpoint is as it was written; prints a line, and one for each fault."""
    begin = time.monotonic()
    try:
        manifest = read_manifest(checkpoint)
        faults, size = size_faults(checkpoint, manifest), manifest.bytes
        faults = faults or content_faults(checkpoint, manifest, manifest.files)
    except DamagedCheckpointError as error:
        faults, size = [str(error)], 0
    seconds = time.monotonic() - begin
    print(f"{checkpoint}: {'DAMAGED' if faults else 'good'} ({size / 1e6:,.1f} MB in {seconds:.2f} s)")
    for fault in faults:
        print(f"    {fault}")
    return not faults


if __name__ == "__main__":
    sys.exit(main())
