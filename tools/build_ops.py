"""Compile now what DeepSpeed would compile at the first step of a run with optimizer offload (about a minute)."""

from __future__ import annotations

import os
import sys
import time

from megatronish.parallel.startup import settle_process


def main() -> int:
    settle_process()
    from megatronish.training.engine import OpBuildError, load_cpu_adam

    start = time.monotonic()
    print(f"DeepSpeed's CPU Adam kernel: building in {os.environ['TORCH_EXTENSIONS_DIR']} ...", flush=True)
    try:
        load_cpu_adam()
    except OpBuildError as error:
        print(f"not built: {error}", file=sys.stderr)
        return 1
    print(f"DeepSpeed's CPU Adam kernel: ready after {time.monotonic() - start:.0f} s.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
