"""Run the step of a black box again: `deepspeed tools/replay.py runs/x/black_box/step-00000120`.

Start it with the launcher and number of ranks that recorded the box (torchrun, mpirun, srun, or plain python for one rank).
It loads the checkpoint in the box, trains the steps up to the recorded one and runs that one, prints the norm of each module's
output and of each weight and gradient, names the first module with a non-finite output, and reports whether micro batches,
loss and norms have the recorded bits: status 0 if they have, 1 if not. The data of the run must be in place; nothing is written.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from megatronish.errors import exit_on_user_error
from megatronish.launch.exit import run_program
from megatronish.launch.process import initialize_process

if TYPE_CHECKING:
    from megatronish.verify.replay import Replayed


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("box", type=Path, help="a folder SAVE_DIR/black_box/step-N")
    parser.add_argument("--local_rank", help=argparse.SUPPRESS)  # passed by the deepspeed launcher
    arguments = parser.parse_args()
    with exit_on_user_error():
        rank = initialize_process()
    with exit_on_user_error(rank.is_first, rank.name):
        from megatronish.verify.replay import replay  # torch: only after the process is settled

        found = replay(arguments.box, rank)
    report = describe(found, rank.rank)
    sys.stdout.write(report)
    return 0 if found.as_recorded else 1


def describe(found: Replayed, rank: int) -> str:
    """The report of a rank: the tables on the first rank, and on each rank its first non-finite output."""
    diagnosis, event = found.diagnosis, found.event
    lines = []
    if rank == 0:
        lines += [
            f"step {event.step}: {event.kind}, recorded loss {event.loss:.6g}; {found.steps_before} step(s) before it"
        ]
        lines += [f"  output    {norm:12.5g}  {name}" for name, norm in diagnosis.outputs.items()]
        for name, norm in diagnosis.weights.items():
            gradient = f"{diagnosis.gradients[name]:12.5g}" if name in diagnosis.gradients else f"{'-':>12}"
            lines += [f"  weight    {norm:12.5g}  gradient {gradient}  {name}"]
    if diagnosis.broken:
        module, micro = diagnosis.broken
        lines += [f"rank {rank}: the first non-finite output is that of {module}, in micro batch {micro}"]
    elif diagnosis.outputs:
        broken = diagnosis.broken_gradients
        gradients = f"; {len(broken)} gradients are not, among them that of {broken[-1]}" if broken else ""
        lines += [f"rank {rank}: all outputs are finite{gradients}"]
    same = {True: "the recorded bits", False: "NOT the recorded bits"}
    lines += [
        f"rank {rank}: micro batches have {same[found.same_batches]}, loss {same[found.same_loss]}, "
        f"norms {same[found.same_norms]}"
    ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    run_program(main)
