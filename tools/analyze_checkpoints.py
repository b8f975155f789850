"""Analyze a run from its metrics and checkpoints.

    python tools/analyze_checkpoints.py --run-dir runs/demo

writes, into the run's folder:
    loss.png       loss, learning rate, gradient norm and speed, from metrics.jsonl
    spectra.png    norms, ranks and singular values of the weight matrices, by step, from the checkpoints
    weights.json   the numbers of spectra.png, for each matrix and step

For attention qkv and out, MLP in and out, embedding and head: RMS of the entries, spectral norm, stable rank and effective rank.
A run with one checkpoint is drawn by layer. Checkpoints are measured from the newest and the oldest to those between, as many
as fit into --minutes, and of each at most --layers layers and 16,384 rows of a matrix.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # run from a checkout that is not installed

from megatronish.errors import UserError, exit_on_user_error


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="analyze_checkpoints.py",
        description=__doc__,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--run-dir", required=True, type=Path, metavar="DIR", help="a run's folder (--train.save_dir)")
    parser.add_argument(
        "--output", type=Path, metavar="PATH", help="picture of the curves: .png, .svg or .pdf (DIR/loss.png)"
    )
    parser.add_argument("--layers", type=int, default=8, metavar="N", help="most layers measured per checkpoint (8)")
    parser.add_argument("--minutes", type=float, default=5.0, metavar="M", help="time for measuring checkpoints (5)")
    return parser


def main() -> int:
    arguments = build_parser().parse_args()
    with exit_on_user_error():
        if arguments.layers < 1 or arguments.minutes <= 0:
            raise UserError("analyze_checkpoints.py: --layers must be at least 1 and --minutes above 0")
        from megatronish.training.monitoring.curves import draw_curves

        curves = draw_curves(arguments.run_dir, arguments.output)
        print(f"wrote {curves}")
        analyze_weights(arguments.run_dir, curves, arguments.layers, arguments.minutes)
    return 0


def analyze_weights(run_dir: Path, curves: Path, layers: int, minutes: float) -> None:
    """Measure the checkpoints, print the table and write spectra and numbers into the folder of the picture `curves`."""
    from tqdm import tqdm

    from megatronish.training.monitoring.spectra import WEIGHTS_JSON, draw_spectra, measure_run, table, write_measures

    bar = tqdm(desc="singular values", unit="", file=sys.stderr, disable=None, leave=False, bar_format=BAR)

    def progress(done: float, total: float) -> None:
        bar.total = total
        bar.update(done - bar.n)

    with bar:
        measures = measure_run(run_dir, minutes, layers, progress)
    if not measures:
        print(f"{run_dir} has no checkpoint yet: no spectra")
        return
    print(table(measures))
    title = f"{run_dir.resolve().name}   ·   weight matrices"
    print(f"wrote {draw_spectra(measures, title, curves.with_name('spectra' + curves.suffix))}")
    print(f"wrote {write_measures(measures, curves.with_name(WEIGHTS_JSON))}")


BAR = "{desc} {percentage:3.0f}%|{bar}| {elapsed}, {remaining} left"

if __name__ == "__main__":
    sys.exit(main())
