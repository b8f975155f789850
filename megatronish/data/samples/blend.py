"""Several sources as one: which source each sample of a run comes from, without an index of the run.

Samples come in blocks of B, of which each source has its share: after any number of full blocks it has given the share of all
samples rounded down or up (largest remainders first), so it is less than one sample off at the end of a block. Within a block
the order is a permutation keyed by (seed, block). So sample n is a function of n alone, and lengthening a run changes nothing.
"""

from __future__ import annotations

import copy
import hashlib
import math
from collections.abc import Sequence
from fractions import Fraction
from typing import Any

import numpy as np

from megatronish.data.samples.permutation import keyed_permutation
from megatronish.data.samples.rows import SampleRows
from megatronish.data.samples.source import RecentValues, SampleSource, look_up
from megatronish.errors import DataError

MIN_BLOCK = 1024
# A block is computed at once: in less than 10 ms up to this size.
MAX_BLOCK = 1 << 18
KEPT_BLOCKS = 4


def apportion(total: int, shares: Sequence[Fraction]) -> list[int]:
    """Integers that sum to `total`, each its share rounded down or up: largest remainders are rounded up.

    Equal remainders: the first source first. (Hamilton's method.)
    """
    exact = [total * share for share in shares]
    counts = [int(value) for value in exact]
    order = sorted(range(len(shares)), key=lambda i: (counts[i] - exact[i], i))
    for i in order[: total - sum(counts)]:
        counts[i] += 1
    return counts


class BlendedDataset(SampleSource):
    """Samples of several sources in fixed shares.

    sources: at least one, of equal seq_length; weights: positive, of any scale, exact if integers; seed: of the order within
    blocks. `samples_per_epoch` and `tokens_per_epoch` are the sums over the indexed sources.
    Raises DataError for a share below one in MAX_BLOCK.
    """

    def __init__(self, sources: Sequence[SampleSource], weights: Sequence[float | int], seed: int) -> None:
        if not sources or len(sources) != len(weights) or not all(weight > 0 for weight in weights):
            raise ValueError(f"{len(sources)} sources with weights {list(weights)}: each needs a positive weight")
        if len({source.seq_length for source in sources}) != 1:
            raise ValueError(f"sources of unequal sequence lengths {[source.seq_length for source in sources]}")
        self.sources = list(sources)
        self.name = " + ".join(source.name for source in sources)
        self.seq_length = sources[0].seq_length
        self.samples_per_epoch = sum(source.samples_per_epoch for source in sources)
        self.tokens_per_epoch = sum(source.tokens_per_epoch for source in sources)
        self.streamed = any(source.streamed for source in sources)
        self.padded = any(source.padded for source in sources)
        exact = [Fraction(weight) for weight in weights]
        self.shares = [weight / sum(exact) for weight in exact]
        self.seed = seed
        # A block has room for a sample of every source: then no source's count falls from one block to the next.
        least = min(range(len(self.shares)), key=self.shares.__getitem__)
        needed = math.ceil(1 / self.shares[least])
        if needed > MAX_BLOCK:
            raise DataError(
                f"{sources[least].name} would give {float(self.shares[least]):.2g} of the samples, less than one in {MAX_BLOCK:,}; "
                "raise its weight or leave it out"
            )
        self.block_size = MIN_BLOCK
        while self.block_size < needed:
            self.block_size *= 2
        self._blocks: RecentValues[np.ndarray] = RecentValues(KEPT_BLOCKS)

    @property
    def identity(self) -> str:
        """Hash of the sources' identities, the shares and the seed."""
        parts = [(source.identity, str(share)) for source, share in zip(self.sources, self.shares, strict=True)]
        return hashlib.sha256(repr(("blend", self.seed, parts)).encode("utf-8")).hexdigest()

    def counts(self, total: int) -> list[int]:
        """How many of the first `total` samples come from each source."""
        block, rest = divmod(total, self.block_size)
        counts = apportion(block * self.block_size, self.shares)
        if rest:
            slots = self._block(block)[0]
            counts = (np.array(counts) + np.bincount(slots[:rest], minlength=len(counts))).tolist()
        return counts

    def _block(self, block: int) -> np.ndarray:
        """Source and number within the source of each of a block's samples, int64[2, block_size]."""
        return self._blocks.get_or(block, self._compute_block)

    def _compute_block(self, block: int) -> np.ndarray:
        begins = apportion(block * self.block_size, self.shares)
        quotas = np.array(apportion((block + 1) * self.block_size, self.shares)) - np.array(begins)
        assert (quotas >= 0).all()
        order = keyed_permutation(self.block_size, "blend", self.seed, block)
        slots = np.repeat(np.arange(len(quotas)), quotas)[order]
        numbers = np.empty(self.block_size, dtype=np.int64)
        numbers[np.argsort(slots, kind="stable")] = np.concatenate(
            [np.arange(begin, begin + quota) for begin, quota in zip(begins, quotas.tolist(), strict=True)]
        )
        return np.stack((slots, numbers))

    def locate(self, numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Which source each sample comes from, and its number there: int64[b] each. Raises ValueError below 0."""
        which, ordinals = look_up(numbers, self.block_size, self._block)
        return which, ordinals

    def batch(self, numbers: np.ndarray, document_mask: bool) -> dict[str, Any]:
        """See SampleSource."""
        which, ordinals = self.locate(numbers)
        if len(which) == 1 or (which == which[0]).all():
            return self.sources[which[0]].batch(ordinals, document_mask)
        return self._rows(which, ordinals).batch(document_mask)

    def rows(self, numbers: np.ndarray) -> SampleRows:
        """See SampleSource."""
        return self._rows(*self.locate(numbers))

    def _rows(self, which: np.ndarray, ordinals: np.ndarray) -> SampleRows:
        used = np.unique(which).tolist()
        parts = [self.sources[i].rows(ordinals[which == i]) for i in used]
        if len(parts) == 1:
            return parts[0]
        return SampleRows.merged(parts, [np.flatnonzero(which == i) for i in used])

    def lengths(self, numbers: np.ndarray) -> np.ndarray:
        """See SampleSource."""
        which, ordinals = self.locate(numbers)
        lengths = np.empty(len(ordinals), dtype=np.int64)
        for i in np.unique(which).tolist():
            lengths[which == i] = self.sources[i].lengths(ordinals[which == i])
        return lengths

    def documents(self, number: int) -> tuple[str, list[int] | None]:
        """See SampleSource."""
        which, ordinals = self.locate(np.array([number], dtype=np.int64))
        return self.sources[which[0]].documents(int(ordinals[0]))

    def describe(self) -> list[str]:
        """See SampleSource."""
        return [line for source in self.sources for line in source.describe()]

    def open(self, part: int, parts: int, state: dict[str, Any] | None = None) -> SampleSource:
        """The same blend with its streams opened; states are stored by the index of their source."""
        opened = copy.copy(self)
        opened.sources = [source.open(part, parts, (state or {}).get(str(i))) for i, source in enumerate(self.sources)]
        return opened

    def state(self) -> dict[str, Any] | None:
        """See SampleSource."""
        states = {str(i): source.state() for i, source in enumerate(self.sources) if source.streamed}
        return states or None

    def close(self) -> None:
        """See SampleSource."""
        for source in self.sources:
            source.close()
