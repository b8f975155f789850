"""Which AdamW should step offloaded optimizer states: torch's fused one, or DeepSpeed's CPU Adam?

Times both on the same flat fp32 tensor, alternating, and prints medians and the ratio. DeepSpeed compiles its kernel
at the first run (a minute or two). Usage: python tools/bench/cpu_adam.py [--elements 50000000] [--repeats 9]
"""

from __future__ import annotations

import argparse
import logging
import statistics
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(
    0, str(Path(__file__).resolve().parents[2])
)  # the root of the checkout: `tools.bench` is no installed package

from megatronish.launch.process import initialize_process


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--elements", type=int, default=50_000_000, help="parameters of the flat tensor (50,000,000)")
    parser.add_argument("--repeats", type=int, default=9, help="timed steps of each (9)")
    arguments = parser.parse_args()
    initialize_process()
    import torch
    from deepspeed.ops.adam import DeepSpeedCPUAdam
    from deepspeed.utils import logger

    logger.setLevel(logging.ERROR)
    settings: dict[str, Any] = {"lr": 1e-3, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}
    start = torch.randn(arguments.elements, generator=torch.Generator().manual_seed(0))
    grad = torch.randn(arguments.elements, generator=torch.Generator().manual_seed(1))

    def tensor() -> torch.nn.Parameter:
        flat = torch.nn.Parameter(start.clone())
        flat.grad = grad.clone()
        return flat

    flats = {"torch fused AdamW": tensor(), "DeepSpeed CPU Adam": tensor()}
    optimizers: dict[str, torch.optim.Optimizer] = {
        "torch fused AdamW": torch.optim.AdamW([flats["torch fused AdamW"]], fused=True, **settings),
        "DeepSpeed CPU Adam": DeepSpeedCPUAdam([flats["DeepSpeed CPU Adam"]], adamw_mode=True, **settings),
    }
    seconds: dict[str, list[float]] = {name: [] for name in optimizers}
    for repeat in range(arguments.repeats + 2):  # the first two allocate and warm up
        for name, optimizer in optimizers.items():
            begin = time.perf_counter()
            optimizer.step()
            if repeat >= 2:
                seconds[name].append(time.perf_counter() - begin)
    ours, theirs = (flats[name].detach() for name in optimizers)
    print(f"largest difference of the weights after {arguments.repeats + 2} steps: {(ours - theirs).abs().max():.1e}")
    for name, taken in seconds.items():
        middle = statistics.median(taken)
        rate = arguments.elements / middle / 1e6
        print(
            f"{name:20} median {middle * 1e3:7.1f} ms, {min(taken) * 1e3:.1f} to {max(taken) * 1e3:.1f}; {rate:,.0f} M/s"
        )
    ratios = [theirs / ours for ours, theirs in zip(*seconds.values(), strict=True)]
    print(
        f"DeepSpeed's time / torch's, pair by pair: median {statistics.median(ratios):.2f} "
        f"({min(ratios):.2f} to {max(ratios):.2f}), {torch.get_num_threads()} threads"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
