"""Several sources as one: which source each sample of a run comes from, without an index of the run.

Samples come in blocks of B, of which each source has its share: after any number of whole blocks it has given the share of all
samples rounded down or up (largest remainders first), so it is never a whole sample off at the end of a block. Within a block the
order is a permutation keyed by (seed, block). So sample n is a function of n alone, and lengthening a run changes nothing.
"""

from __future__ import annotations

import hashlib
import math
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from fractions import Fraction

import numpy as np

from megatronish.data.samples.permutation import keyed_permutation
from megatronish.data.samples.sample import Rows, SampleSource, StreamReader, StreamSource
from megatronish.errors import DataError

MIN_BLOCK = 1024
# A block is laid out in one go: below 10 ms up to here.
MAX_BLOCK = 1 << 18
KEPT_BLOCKS = 4


def apportion(total: int, shares: Sequence[Fraction]) -> list[int]:
    """Whole numbers that sum to `total`, each its share rounded down or up: largest remainders are rounded up.

    Equal remainders: the first source first. (Hamilton's method.)
    """
    exact = [total * share for share in shares]
    counts = [int(value) for value in exact]
    order = sorted(range(len(shares)), key=lambda i: (counts[i] - exact[i], i))
    for i in order[: total - sum(counts)]:
        counts[i] += 1
    return counts


class Blend:
    """Samples of several sources in fixed shares (a SampleSource, if none of them is a stream).

    sources: at least one, of equal seq_length; weights: positive, of any scale, exact if whole; seed: of the order within blocks.
    `samples_per_epoch` and `tokens_per_epoch` are the sums over the indexed sources.
    Raises DataError for a share below one in MAX_BLOCK.
    """

    def __init__(
        self, sources: Sequence[SampleSource | StreamSource], weights: Sequence[float | int], seed: int
    ) -> None:
        if not sources or len(sources) != len(weights) or not all(weight > 0 for weight in weights):
            raise ValueError(f"{len(sources)} sources with weights {list(weights)}: each needs a positive weight")
        if len({source.seq_length for source in sources}) != 1:
            raise ValueError(f"sources of unequal sequence lengths {[source.seq_length for source in sources]}")
        self.sources = list(sources)
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
        self._blocks: OrderedDict[int, tuple[np.ndarray, np.ndarray]] = OrderedDict()

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_blocks": OrderedDict()}

    @property
    def name(self) -> str:
        """The names of the sources."""
        return " + ".join(source.name for source in self.sources)

    @property
    def identity(self) -> str:
        """Hash of the sources' identities, the shares and the seed."""
        parts = [(source.identity, str(share)) for source, share in zip(self.sources, self.shares, strict=True)]
        return hashlib.sha256(repr(("blend", self.seed, parts)).encode("utf-8")).hexdigest()

    @property
    def seq_length(self) -> int:
        """Inputs of a sample."""
        return self.sources[0].seq_length

    @property
    def indexed(self) -> list[SampleSource]:
        """The sources that have sample numbers."""
        return [source for source in self.sources if isinstance(source, SampleSource)]

    @property
    def samples_per_epoch(self) -> int:
        """Samples of one epoch of each indexed source."""
        return sum(source.samples_per_epoch for source in self.indexed)

    @property
    def tokens_per_epoch(self) -> int:
        """Tokens of the indexed sources."""
        return sum(source.tokens_per_epoch for source in self.indexed)

    def counts(self, total: int) -> list[int]:
        """How many of the first `total` samples come from each source."""
        block, rest = divmod(total, self.block_size)
        counts = apportion(block * self.block_size, self.shares)
        if rest:
            slots, _ = self._block(block)
            counts = (np.array(counts) + np.bincount(slots[:rest], minlength=len(counts))).tolist()
        return counts

    def _block(self, block: int) -> tuple[np.ndarray, np.ndarray]:
        """Source and number within the source of each of a block's samples, int64[block_size] each."""
        known = self._blocks.get(block)
        if known is None:
            begins = apportion(block * self.block_size, self.shares)
            quotas = np.array(apportion((block + 1) * self.block_size, self.shares)) - np.array(begins)
            assert (quotas >= 0).all()
            order = keyed_permutation(self.block_size, "blend", self.seed, block)
            slots = np.repeat(np.arange(len(quotas)), quotas)[order]
            numbers = np.empty(self.block_size, dtype=np.int64)
            numbers[np.argsort(slots, kind="stable")] = np.concatenate(
                [np.arange(begin, begin + quota) for begin, quota in zip(begins, quotas.tolist(), strict=True)]
            )
            known = self._blocks[block] = (slots, numbers)
            while len(self._blocks) > KEPT_BLOCKS:
                self._blocks.popitem(last=False)
        return known

    def places(self, numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Which source each sample comes from, and its number there: int64[b] each. Raises ValueError below 0."""
        if len(numbers) and int(numbers.min()) < 0:
            raise ValueError(f"sample number {int(numbers.min())} must not be negative")
        blocks, slots = np.divmod(numbers, self.block_size)
        sources, ordinals = np.empty_like(numbers), np.empty_like(numbers)
        for block in np.unique(blocks).tolist():
            here = blocks == block
            source_of_slot, number_of_slot = self._block(block)
            sources[here] = source_of_slot[slots[here]]
            ordinals[here] = number_of_slot[slots[here]]
        return sources, ordinals

    def rows(self, numbers: np.ndarray, readers: Mapping[int, StreamReader] | None = None) -> Rows:
        """Samples int64[b]. readers: of the sources that are streams, by their place among the sources."""
        sources, ordinals = self.places(np.asarray(numbers, dtype=np.int64))
        used = np.unique(sources).tolist()
        parts = []
        for i in used:
            source, wanted = self.sources[i], ordinals[sources == i]
            if isinstance(source, SampleSource):
                parts.append(source.rows(wanted))
            else:
                assert readers is not None
                parts.append(Rows.of([readers[i].next_sample() for _ in range(len(wanted))]))
        if len(parts) == 1:
            return parts[0]
        return Rows.merged(parts, [np.flatnonzero(sources == i) for i in used])

    def lengths(self, numbers: np.ndarray) -> np.ndarray:
        """Real tokens of samples int64[b]: inputs and the one more."""
        sources, ordinals = self.places(np.asarray(numbers, dtype=np.int64))
        lengths = np.full(len(ordinals), self.seq_length + 1, dtype=np.int64)
        for i, source in enumerate(self.sources):
            if isinstance(source, SampleSource):
                lengths[sources == i] = source.lengths(ordinals[sources == i])
        return lengths
