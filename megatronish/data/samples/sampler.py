"""Which samples a data-parallel rank takes, from one number: how many the run has consumed over all ranks.

Optimizer step t covers samples [t*G, (t+1)*G) of the global order; micro batches and ranks are slices of that range, so
the order does not depend on the data-parallel size or the micro batch size.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np


class MicroBatchSampler:
    """Endless sample numbers of one rank, int64[micro_batch_size] per micro batch.

    Micro step a of an optimizer step gives rank r the samples a*b*dp + r*b ... + b of the step's range (b: micro batch
    size, dp: data-parallel size). The order of a step's samples over (a, r) is the global order.
    Raises ValueError if sizes do not divide or a rank is out of range.
    """

    def __init__(
        self, consumed_samples: int, global_batch_size: int, micro_batch_size: int, dp_rank: int = 0, dp_size: int = 1
    ) -> None:
        if micro_batch_size < 1 or dp_size < 1 or global_batch_size < 1:
            raise ValueError(
                f"global batch {global_batch_size}, micro batch {micro_batch_size} and data-parallel size {dp_size} must be positive"
            )
        if not 0 <= dp_rank < dp_size:
            raise ValueError(f"data-parallel rank {dp_rank} is outside 0..{dp_size - 1}")
        if global_batch_size % (micro_batch_size * dp_size):
            raise ValueError(
                f"global batch {global_batch_size} is not a multiple of micro batch {micro_batch_size} x data-parallel size {dp_size} "
                f"= {micro_batch_size * dp_size}; change one of them"
            )
        if consumed_samples < 0:
            raise ValueError(f"consumed samples {consumed_samples} must not be negative")
        self.consumed_samples = consumed_samples
        self.global_batch_size = global_batch_size
        self.micro_batch_size = micro_batch_size
        self.dp_rank = dp_rank
        self.dp_size = dp_size

    @property
    def samples_per_micro_step(self) -> int:
        """Samples that all ranks together take in one micro step."""
        return self.micro_batch_size * self.dp_size

    def __iter__(self) -> Iterator[np.ndarray]:
        """Micro batches from `consumed_samples` on; iterating does not change it."""
        start = self.consumed_samples + self.dp_rank * self.micro_batch_size
        while True:
            yield np.arange(start, start + self.micro_batch_size, dtype=np.int64)
            start += self.samples_per_micro_step
