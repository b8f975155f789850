"""Verify parallel layouts on this machine: each trains a small model and must agree with a single process.

    python tools/verify_parallel.py                                        all supported layouts
    python tools/verify_parallel.py --layouts tp2,tp2dp2z2 --dtype bf16    two layouts, in bf16
    python tools/verify_parallel.py --layouts tp4 --model.num_kv_heads 1   any field of the run can be set
    python tools/verify_parallel.py --layouts none --moves dp2,tp4         checkpoints moved in both directions

Losses, gradient norms and all weights after the last step are compared, and the bytes of weights, gradients and optimizer
state on each rank with a formula. Then some layouts train half of the steps and save, and each of the others resumes from
that checkpoint and trains the rest. In fp32 numbers must agree within 1e-5; in bf16 within twice the difference that another
order of summation makes in one process. Exit status 0: all agree; 1: some do not; 2: bad input.
The name of a layout gives its sizes: tp2 (tp2s: with sequence parallelism), pp2, dp2, sp2, and z2 for ZeRO stage 2 (else 1).
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # run from a checkout that is not installed

from megatronish.config.cli import parse_options
from megatronish.errors import ConfigError, exit_on_user_error
from megatronish.launch.process import initialize_process

if TYPE_CHECKING:
    from megatronish.verify.layouts import ParallelLayout


def build_parser() -> argparse.ArgumentParser:
    """The command line; options with a dot are fields of the run."""
    parser = argparse.ArgumentParser(
        prog="verify_parallel.py",
        description=__doc__,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--layouts", help="names, separated by commas, or none (default: all that --ranks allows)")
    parser.add_argument("--moves", help="layouts to move checkpoints between (default: some, or none with --layouts)")
    parser.add_argument("--ranks", type=int, default=4, help="largest number of processes (4)")
    parser.add_argument("--steps", type=int, default=10, help="optimizer steps (10)")
    parser.add_argument("--dtype", choices=["fp32", "bf16"], default="fp32")
    parser.add_argument("--ties", choices=["both", "tied", "untied"], default="both", help="embedding and head (both)")
    parser.add_argument("--json", type=Path, metavar="PATH", help="also write the table as JSON")
    return parser


def chosen(names: str | None, default: Sequence[str], arguments: argparse.Namespace) -> list[ParallelLayout]:
    """The named layouts, or those of `default` that the other arguments allow. Raises ConfigError."""
    from megatronish.verify.layouts import parse_layout

    if names is None:
        stages = {0, 1, 2, 3} if arguments.dtype == "fp32" else {1, 2, 3}  # bf16 with ZeRO-0 is refused
        layouts = [parse_layout(name) for name in default]
        return [one for one in layouts if one.ranks <= arguments.ranks and one.stage in stages]
    layouts = [parse_layout(name) for name in names.split(",")] if names != "none" else []
    for layout in layouts:
        if layout.ranks > arguments.ranks:
            raise ConfigError(f"layout {layout.name} takes {layout.ranks} ranks: add --ranks {layout.ranks}.")
    return layouts


def main() -> int:
    arguments, rest = build_parser().parse_known_args()
    with exit_on_user_error():
        initialize_process()
        from megatronish.verify.layout_report import HEADER, Verification
        from megatronish.verify.layouts import DEFAULT_LAYOUTS, DEFAULT_MOVES
        from megatronish.verify.progress_line import ProgressLine

        file, overrides = parse_options(rest, "verify_parallel.py")
        if file:
            raise ConfigError("verify_parallel.py: takes no --deepspeed_config: it trains a small run of its own.")
        if arguments.steps < 2 or arguments.ranks < 1:
            raise ConfigError(
                "verify_parallel.py: --steps must be at least 2, for moves halve it, and --ranks at least 1."
            )
        layouts = chosen(arguments.layouts, DEFAULT_LAYOUTS, arguments)
        moves = chosen(arguments.moves or ("none" if arguments.layouts else None), DEFAULT_MOVES, arguments)
        progress = ProgressLine()
        ties = {"both": (False, True), "tied": (True,), "untied": (False,)}[arguments.ties]
        verification = Verification(layouts, moves, arguments.dtype, arguments.steps, ties, overrides, progress.show)
        print(f"{arguments.steps} steps, {arguments.dtype}; largest difference from one process")
        print(HEADER, flush=True)
        verdicts = []
        for verdict in verification.verdicts():
            progress.print(verdict.line())
            verdicts.append(verdict)
        if arguments.json:
            arguments.json.write_text(json.dumps([verdict.to_json() for verdict in verdicts], indent=2) + "\n")
        failed = [verdict for verdict in verdicts if verdict.problem]
        print(f"{len(verdicts) - len(failed)} of {len(verdicts)} runs agree with one process")
        return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
