"""Pretrain a transformer: `deepspeed launchers/pretrain.py --deepspeed_config ds_configs/zero2_h100.json [--name value]`.

Also under torchrun, mpirun, srun or plain python. --help lists every option.
"""

from __future__ import annotations

import sys

from megatronish.config.base import explained
from megatronish.config.cli import parse
from megatronish.parallel.startup import settle_process


def main() -> int:
    with explained():
        rank = settle_process()
    with explained(rank.is_first, rank.name):
        config = parse(sys.argv[1:], "launchers/pretrain.py")
        from megatronish.training.loop import pretrain  # torch and deepspeed: only after the process is settled

        pretrain(config, rank)
    return 0


if __name__ == "__main__":
    sys.exit(main())
