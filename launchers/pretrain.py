"""Pretrain a transformer: `deepspeed launchers/pretrain.py --deepspeed_config ds_configs/zero2_h100.json [--name value]`.

Also under torchrun, mpirun, srun or plain python. --help lists every option.
"""

from __future__ import annotations

import sys

from megatronish.config.cli import parse
from megatronish.errors import exit_on_user_error
from megatronish.launch.exit import run_program
from megatronish.launch.process import initialize_process


def main() -> int:
    with exit_on_user_error():
        rank = initialize_process()
    with exit_on_user_error(rank.is_first, rank.name):
        config = parse(sys.argv[1:], "launchers/pretrain.py")
        from megatronish.training.loop import pretrain  # torch and deepspeed: only after the process is settled

        return pretrain(config, rank)


if __name__ == "__main__":
    run_program(main)
