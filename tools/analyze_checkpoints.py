"""Draw a run's curves: `python tools/analyze_checkpoints.py --run-dir runs/demo` writes runs/demo/loss.png."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # run from a checkout that is not installed

from megatronish.errors import exit_on_user_error


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(prog="analyze_checkpoints.py", description=__doc__, allow_abbrev=False)
    parser.add_argument("--run-dir", required=True, type=Path, metavar="DIR", help="a run's folder (--train.save_dir)")
    parser.add_argument("--output", type=Path, metavar="PATH", help="the picture: .png, .svg or .pdf (DIR/loss.png)")
    return parser


def main() -> int:
    arguments = build_parser().parse_args()
    with exit_on_user_error():
        from megatronish.training.monitoring.curves import draw_curves

        print(f"wrote {draw_curves(arguments.run_dir, arguments.output)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
