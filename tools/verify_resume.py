"""Verify that a run which is killed at any moment resumes bit for bit as if it had not been.

    python tools/verify_resume.py                                              a small run on 2 ranks, ZeRO 2, 20 kills
    python tools/verify_resume.py --zero_optimization.stage 1 --parallel.pipeline 2      any field of the run can be set
    python tools/verify_resume.py --deepspeed_config ds_configs/zero3.json --ranks 4 --json proof.json     any run file

The run is trained once without interruption, and once with kills by SIGKILL: during steps, during the writing of checkpoints
and during their commit, at moments drawn from --seed, one rank first or all at once; each time the same command resumes it.
Each step that any attempt completed, on each rank, must have the same batches (by hash), random number state, loss and
gradient norm (by bits) as in the uninterrupted run, and the last checkpoints the same tensors, by hash, and counters. A
checkpoint is saved every --save-interval steps, and the number of steps follows from the number of kills.
Exit status 0: all is equal; 1: something differs; 2: bad input.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # run from a checkout that is not installed

from megatronish.config.cli import parse_options
from megatronish.errors import ConfigError, exit_on_user_error
from megatronish.launch.process import initialize_process


def build_parser() -> argparse.ArgumentParser:
    """The command line; options with a dot are fields of the run."""
    parser = argparse.ArgumentParser(
        prog="verify_resume.py",
        description=__doc__,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--ranks", type=int, default=2, help="processes of the run (2)")
    parser.add_argument("--kills", type=int, default=20, help="number of kills (20)")
    parser.add_argument("--save-interval", type=int, default=2, help="steps between checkpoints (2)")
    parser.add_argument("--seed", type=int, default=0, help="of the kills' moments (0)")
    parser.add_argument(
        "--folder", type=Path, help="keep checkpoints, traces and logs here (default: a temporary folder)"
    )
    parser.add_argument("--json", type=Path, metavar="PATH", help="write the proof as JSON")
    return parser


def main() -> int:
    arguments, rest = build_parser().parse_known_args()
    with exit_on_user_error():
        initialize_process()
        from megatronish.config.base import merge
        from megatronish.config.deepspeed_json import load_json
        from megatronish.verify.progress_line import ProgressLine
        from megatronish.verify.resume import ResumeProof, fresh_folder, small_run

        file, overrides = parse_options(rest, "verify_resume.py")
        if min(arguments.ranks, arguments.kills, arguments.save_interval) < 1:
            raise ConfigError("verify_resume.py: --ranks, --kills and --save-interval must be at least 1.")
        progress = ProgressLine()
        with tempfile.TemporaryDirectory() as temporary:
            folder = fresh_folder((arguments.folder or Path(temporary) / "proof").resolve())
            base = load_json(file) if file else small_run(folder)
            proof_run = ResumeProof(
                merge(base, overrides), arguments.ranks, arguments.kills, arguments.save_interval, arguments.seed,
                folder, progress.show,
            )  # fmt: skip
            print(
                f"{proof_run.steps} steps, a checkpoint every {arguments.save_interval}, {arguments.kills} kills",
                flush=True,
            )
            proof = proof_run.prove(progress.print)
        print(
            f"compared: {proof.steps_compared} steps over all ranks, {len(proof.tensors)} tensors and headers, "
            f"samples {proof.state.get('samples')}; {proof.seconds:.0f} s"
        )
        if arguments.json:
            command = " ".join(["python tools/verify_resume.py", *sys.argv[1:]])
            content = {"command": command, "run": merge(base, overrides), **proof.to_json()}
            arguments.json.write_text(json.dumps(content, indent=1) + "\n")
        for problem in proof.problems:
            print(f"FAILED: {problem}")
        happened = len(proof.kills)
        if not proof.problems:
            print(f"{happened} of {arguments.kills} kills survived: equal to the uninterrupted run, bit for bit")
        return 1 if proof.problems else 0


if __name__ == "__main__":
    sys.exit(main())
