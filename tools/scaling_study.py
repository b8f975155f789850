"""The scale study of docs/scaling.md: what layouts send, their throughput on up to 4,096 GPUs, and how published runs compare.

`python tools/scaling_study.py --table published best traffic` prints Markdown; `--plot docs/images` draws. It computes from
configurations alone: no GPU is used.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # run from a checkout that is not installed

from megatronish.errors import ConfigError, did_you_mean, exit_on_user_error
from megatronish.planning.hardware import HARDWARE
from megatronish.planning.layout import PlannedLayout
from megatronish.planning.scaling_report import Study, best_table, published_table, studies, traffic_table

TABLES = ("published", "best", "traffic")


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(prog="scaling_study.py", description=__doc__, allow_abbrev=False)
    parser.add_argument("--table", nargs="+", choices=TABLES, default=[], help="tables to print")
    parser.add_argument("--plot", type=Path, metavar="DIR", help="draw the pictures into this folder")
    parser.add_argument("--hardware", choices=list(HARDWARE), default="h100", help="the cluster (h100)")
    parser.add_argument("--gpus", nargs="+", type=int, default=[8, 64, 512, 4096], metavar="N", help="numbers of GPUs")
    parser.add_argument("--models", nargs="+", metavar="NAME", help="models of the study (all)")
    parser.add_argument("--tokens", type=int, help="tokens an optimizer step (4,194,304; 16,777,216 from 70B on)")
    return parser


def chosen_studies(names: list[str] | None, tokens: int | None) -> list[Study]:
    """The models asked for. Raises ConfigError for an unknown one or too few tokens for a sequence."""
    every = {study.name: study for study in studies(tokens)}
    for name in names or []:
        if name not in every:
            raise ConfigError(f'--models: unknown "{name}".{did_you_mean(name, every)} Models: {", ".join(every)}.')
    found = [every[name] for name in names or every]
    for study in found:
        if tokens is not None and tokens < study.model.seq_length:
            raise ConfigError(f"--tokens {tokens} is less than a sequence of {study.name}, {study.model.seq_length}.")
    return found


def compared_layouts(gpus: int, samples: int) -> list[PlannedLayout]:
    """One way and another to divide the same batch over the same GPUs, of those that come out even."""
    shapes = [
        *[PlannedLayout(data=gpus, zero=zero) for zero in range(4)],
        *[PlannedLayout(tensor=width, data=gpus // width, tensor_sequence=True) for width in (2, 8)],
        PlannedLayout(tensor=8, data=gpus // 8),
        *[PlannedLayout(sequence=width, data=gpus // width, zero=3) for width in (2, 8)],
        *[PlannedLayout(pipeline=stages, data=gpus // stages) for stages in (2, 8)],
        PlannedLayout(tensor=2, pipeline=4, data=gpus // 8, tensor_sequence=True),
    ]
    fitting = [shape for shape in shapes if shape.ranks == gpus and samples % shape.data == 0]
    return [replace(shape, accumulation=samples // shape.data) for shape in fitting]


def main(arguments: list[str] | None = None) -> int:
    parser = build_parser()
    chosen = parser.parse_args(arguments)
    if not chosen.table and chosen.plot is None:
        parser.error(f"nothing to do: give --table ({', '.join(TABLES)}) or --plot DIR")
    hardware = HARDWARE[chosen.hardware]
    with exit_on_user_error():
        if min(chosen.gpus) < 1:
            raise ConfigError(f"--gpus {min(chosen.gpus)}: at least 1.")
        models = chosen_studies(chosen.models, chosen.tokens)
        for table in chosen.table:
            if table == "published":
                print(published_table(), end="\n\n")
            elif table == "best":
                print(best_table(models, chosen.gpus, hardware), end="\n\n")
            else:
                for study in models:
                    print(f"{study.name}, {study.samples:,} x {study.model.seq_length:,} tokens per step\n")
                    for gpus in chosen.gpus:
                        layouts = compared_layouts(gpus, study.samples)
                        print(f"{gpus:,} GPUs\n\n{traffic_table(study.model, layouts, hardware)}", end="\n\n")
        if chosen.plot is not None:
            from megatronish.planning.plots import draw_study

            for path in draw_study(chosen.plot, models, chosen.gpus, hardware):
                print(f"wrote {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
