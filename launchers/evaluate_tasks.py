"""Run tasks of the lm-eval harness: `python launchers/evaluate_tasks.py --checkpoint runs/demo --tasks hellaswag,arc_easy`.

Needs `pip install 'megatronish[eval]'`. Results are printed and written to RUN/tasks.json. Most tasks download their data.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import signal
import sys

from megatronish.errors import UserError, exit_on_user_error
from megatronish.inference.arguments import model_parser, open_model
from megatronish.launch.process import initialize_process


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = model_parser("evaluate_tasks.py", __doc__)
    add = parser.add_argument
    add("--tasks", required=True, metavar="A,B", help="names of tasks or groups")
    add("--tasks-dir", metavar="DIR", help="a folder with further tasks (YAML)")
    add("--num-fewshot", type=int, metavar="N", help="examples before each question (default: that of the task)")
    add("--limit", type=int, metavar="N", help="only the first N documents of each task (all)")
    return parser


def main() -> int:
    arguments = build_parser().parse_args()
    with exit_on_user_error():
        if importlib.util.find_spec("lm_eval") is None:
            raise UserError("lm_eval is not installed: pip install 'megatronish[eval]'")
        initialize_process()
        from lm_eval.utils import make_table  # torch: only after the process is set up

        from megatronish.inference.harness import evaluate_tasks

        loaded, names = open_model(arguments), [name for name in arguments.tasks.split(",") if name]
        result = evaluate_tasks(loaded, names, arguments.tasks_dir, arguments.num_fewshot, arguments.limit)
        print(make_table(result))
        path = loaded.info.run_dir / "tasks.json"
        kept = {name: result[name] for name in ("results", "versions", "n-shot", "n-samples")}
        content = {"checkpoint": str(loaded.info.folder), **kept}
        path.write_text(json.dumps(content, indent=2, default=str) + "\n", encoding="utf-8")
        print(f"written to {path}")
    return 0


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    sys.exit(main())
