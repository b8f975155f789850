"""Compare the fused operators with plain torch, torch.compile, F.rms_norm, Liger, Apex, flash-attn and QuACK: errors, then time.

For each operator, dtype and width: the relative L2 error against float64 (what computes something else is not timed), then
GB/s of the bytes that must move, as a share of the bandwidth of a copy measured in the same loop, and how many times as long
every other implementation takes. They alternate, so that load on the machine affects all equally; medians over --repeats, and the
spread between the 10th and the 90th percentile. "fwd+bwd" counts the host's time too. Run it on one CPU thread, or on a GPU,
where inputs rotate over --rotate-mib so that no cache holds them.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(
    0, str(Path(__file__).resolve().parents[2])
)  # the root of the checkout: `tools.bench` is no installed package

from megatronish.launch.process import initialize_process, tune_allocator

OPS = ["rms_norm", "add_rms_norm", "swiglu", "rope", "rope_qkv_", "qk_norm_rope", "cross_entropy"]


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ops", nargs="+", default=OPS, choices=OPS)
    parser.add_argument("--dtypes", nargs="+", default=["fp32", "bf16"], choices=["fp32", "bf16", "fp16"])
    parser.add_argument("--widths", nargs="+", type=int, default=[1024, 4096], help="hidden sizes, or F of SwiGLU")
    parser.add_argument("--mib", type=int, default=0, help="size of x (default: 32 on a CPU, 256 on a GPU)")
    parser.add_argument("--copy-mib", type=int, default=0, help="size of what is copied (default: 64, 512 on a GPU)")
    parser.add_argument("--rotate-mib", type=int, help="inputs to take turns with (default: 0, 256 on a GPU)")
    parser.add_argument(
        "--host-row",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="also time forward and backward of [4096, 1024] with the host's time included",
    )
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--threads", type=int, default=1, help="CPU threads")
    parser.add_argument("--device", help="cpu, cuda or cuda:N (default: a GPU where there is one)")
    parser.add_argument("--bars", action="store_true", help="print which performance bars the fused operators meet")
    parser.add_argument("--json", type=Path, help="write the figures here")
    options = parser.parse_args(arguments)
    if min(options.widths) < 128 or any(width % 128 for width in options.widths):
        parser.error(f"--widths {options.widths}: heads have 128 channels, so each width is a multiple of 128")
    return options


def main(arguments: list[str] | None = None) -> int:
    """Exit status 1 where the fused operators are missing or wrong; a missed bar does not count."""
    options = parse(arguments)
    initialize_process()
    tune_allocator()
    from tools.bench.operators.run import run  # loads torch, for which the process had to be settled

    return run(options)


if __name__ == "__main__":
    sys.exit(main())
