"""Run tasks of the lm-eval harness: `python launchers/evaluate_tasks.py --checkpoint runs/demo --tasks hellaswag,arc_easy`.

Needs `pip install 'megatronish[eval]'`. Results are printed and written to RUN/tasks.json. Most tasks fetch their data.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import signal
import sys
from pathlib import Path

from megatronish.errors import UserError, exit_on_user_error
from megatronish.launch.process import initialize_process


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(prog="evaluate_tasks.py", description=__doc__, allow_abbrev=False)
    add = parser.add_argument
    add("--checkpoint", required=True, metavar="DIR", help="a run's folder, one checkpoint, or an imported folder")
    add("--tasks", required=True, metavar="A,B", help="names of tasks or groups")
    add("--tasks-dir", metavar="DIR", help="a folder with tasks of your own (YAML)")
    add("--num-fewshot", type=int, metavar="N", help="examples before each question (as the task says)")
    add("--limit", type=int, metavar="N", help="only the first N documents of each task (all)")
    add("--device", choices=("auto", "cpu", "cuda"), default="auto", help="auto: a GPU where there is one")
    add("--dtype", choices=("auto", "fp32", "bf16", "fp16"), default="auto", help="auto: as saved")
    return parser


def main() -> int:
    arguments = build_parser().parse_args()
    with exit_on_user_error():
        if importlib.util.find_spec("lm_eval") is None:
            raise UserError("lm_eval is not installed: pip install 'megatronish[eval]'")
        initialize_process()
        run(arguments)
    return 0


def run(arguments: argparse.Namespace) -> None:
    """Check the names, then evaluate, print and write. Raises UserError."""
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager
    from lm_eval.utils import make_table

    from megatronish.inference.harness import HarnessModel
    from megatronish.inference.load import load_for_inference, resolve_device
    from megatronish.ops.dtypes import DTYPES

    names = [name for name in arguments.tasks.split(",") if name]
    manager = TaskManager(include_path=arguments.tasks_dir, include_defaults=False)
    if not set(names) <= set(
        manager.all_subtasks
    ):  # not all of your own: the harness's thousands take seconds to index
        manager = TaskManager(include_path=arguments.tasks_dir)
    if unknown := [name for name in names if name not in manager.all_tasks]:
        raise UserError(
            f"--tasks {unknown[0]}: no such task; `lm-eval ls tasks` lists the names, --tasks-dir adds yours"
        )
    device, dtype = resolve_device(arguments.device), DTYPES.get(arguments.dtype)
    model, tokenizer, info = load_for_inference(arguments.checkpoint, device, dtype)
    result = simple_evaluate(
        model=HarnessModel(model, tokenizer),
        tasks=names,
        num_fewshot=arguments.num_fewshot,
        limit=arguments.limit,
        task_manager=manager,
        bootstrap_iters=0,
    )
    print(make_table(result))
    path = Path(info.run_dir) / "tasks.json"
    kept = {name: result[name] for name in ("results", "versions", "n-shot", "n-samples")}
    path.write_text(
        json.dumps({"checkpoint": str(info.folder), **kept}, indent=2, default=str) + "\n", encoding="utf-8"
    )
    print(f"written to {path}")


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    sys.exit(main())
