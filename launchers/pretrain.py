"""Pretrain a transformer: `deepspeed launchers/pretrain.py --deepspeed_config ds_configs/zero2_h100.json [--name value]`.

Also under torchrun, mpirun, srun or plain python. --help lists every option; --print-config prints the resolved
configuration as JSON instead of training.
"""

from __future__ import annotations

import json
import signal
import sys

from megatronish.config.cli import parse
from megatronish.errors import exit_on_user_error
from megatronish.launch.exit import run_program
from megatronish.launch.process import initialize_process

PRINT_CONFIG = "--print-config"


def main() -> int:
    with exit_on_user_error():
        rank = initialize_process()
    with exit_on_user_error(rank.is_first, rank.name):
        arguments = [argument for argument in sys.argv[1:] if argument != PRINT_CONFIG]
        config = parse(arguments, "launchers/pretrain.py")
        if PRINT_CONFIG in sys.argv:
            if rank.is_first:
                signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `--print-config | head` ends quietly
                print(json.dumps(config.to_json(), indent=2))
            return 0
        from megatronish.training.loop import pretrain  # torch and deepspeed: only after the process is settled

        return pretrain(config, rank)


if __name__ == "__main__":
    run_program(main)
