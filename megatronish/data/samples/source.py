"""What training reads batches from: the one interface of packed, unpacked, bucketed, blended and streamed data.

An indexed source returns any sample by its number: sample n is sample n % samples_per_epoch of epoch n // samples_per_epoch.
A stream is read in order, and each reader of it gets a part of its own: part rank * workers + worker of ranks * workers,
where a rank without worker processes counts as one worker. A blend (blend.py) mixes both: which source a sample of the run
comes from depends on its number alone; which sample of that source it is also does if the source is indexed, and is the
next one of the reader's part otherwise.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, Self, TypeVar

import numpy as np

from megatronish.data.samples.rows import Sample, SampleRows

Value = TypeVar("Value")


class SampleSource(ABC):
    """Endless numbered samples. Picklable, so that each loader process can read its own copy.

    name: as in data.path. seq_length: inputs of a (full) sample. samples_per_epoch, tokens_per_epoch: of indexed documents;
    0 for a stream, whose size is unknown. streamed: samples are read in order, by a reader that `open` returns.
    padded: samples have fewer than seq_length inputs where their document is shorter.
    """

    name: str
    seq_length: int
    samples_per_epoch: int = 0
    tokens_per_epoch: int = 0
    streamed: bool = False
    padded: bool = False

    @property
    @abstractmethod
    def identity(self) -> str:
        """Hash of everything but its number that a sample depends on."""

    @abstractmethod
    def rows(self, numbers: np.ndarray) -> SampleRows:
        """Samples int64[b] from 0, without end, each a pure function of its number. Raises ValueError below 0.

        The reader of a stream returns its next b samples.
        """

    def batch(self, numbers: np.ndarray, document_mask: bool) -> dict[str, Any]:
        """The arrays of a batch (rows.py) of samples int64[b]."""
        return self.rows(numbers).batch(document_mask)

    def sample(self, number: int) -> Sample:
        """Tokens int[n + 1] of one sample and the offsets in 0..n at which documents begin."""
        return self.rows(np.array([number], dtype=np.int64)).sample(0)

    def lengths(self, numbers: np.ndarray) -> np.ndarray:
        """Tokens of samples int64[b] without padding, int64[b]: inputs and the one more. Reads none of them."""
        return np.full(len(numbers), self.seq_length + 1, dtype=np.int64)

    def num_inputs(self, first: int, count: int) -> int:
        """Input tokens of samples first .. first + count - 1, without padding."""
        if not self.padded:
            return count * self.seq_length
        return int(self.lengths(np.arange(first, first + count, dtype=np.int64)).sum()) - count

    @abstractmethod
    def documents(self, number: int) -> tuple[str, list[int] | None]:
        """The data set that sample `number` is from and its documents there, in order; None for a stream."""

    def counts(self, total: int) -> list[int]:
        """How many of the first `total` samples come from each of the sources that this one blends."""
        return [total]

    def describe(self) -> list[str]:
        """Lines to print before the start."""
        return []

    def open(self, part: int, parts: int, state: dict[str, Any] | None = None) -> SampleSource:
        """The source for one loader process: streams are read as part `part` of `parts`, from `state` on if given."""
        return self

    def state(self) -> dict[str, Any] | None:
        """JSON values from which `open` resumes after the last sample; None if nothing is streamed. Cheap and small."""
        return None

    def close(self) -> None:  # noqa: B027  # only streams have anything to close
        """Stops threads and closes connections of an opened stream."""


class RecentValues(dict[int, Value]):
    """The values of the last `size` keys. A pickled copy is empty: loader processes compute their own."""

    def __init__(self, size: int) -> None:
        self._size = size

    def get_or(self, key: int, compute: Callable[[int], Value]) -> Value:
        """The value of a key, computed if it is not among the last."""
        found = self.get(key)
        if found is None:
            found = self[key] = compute(key)
            while len(self) > self._size:
                del self[next(iter(self))]
        return found

    def __reduce__(self) -> tuple[type[Self], tuple[int]]:
        return type(self), (self._size,)


def look_up(numbers: np.ndarray, size: int, table: Callable[[int], np.ndarray]) -> np.ndarray:
    """table(n // size)[..., n % size] for each n of `numbers`, int64[..., b]. Raises ValueError below 0."""
    numbers = np.asarray(numbers, dtype=np.int64)
    if len(numbers) and int(numbers.min()) < 0:
        raise ValueError(f"sample number {int(numbers.min())} must not be negative")
    blocks, offsets = np.divmod(numbers, size)
    used = np.unique(blocks).tolist()
    if len(used) == 1:
        return table(used[0])[..., offsets]
    found = np.empty((*table(used[0] if used else 0).shape[:-1], len(numbers)), dtype=np.int64)
    for block in used:
        here = blocks == block
        found[..., here] = table(block)[..., offsets[here]]
    return found
