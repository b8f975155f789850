"""What training reads from: numbered samples of indexed data, or samples read in order from a stream.

A sample is (tokens int64[n + 1], document starts int64[k]): n inputs and one more token for the last label, and the offsets
in 0..n at which a document begins. The first offset is always 0, even inside a document; offset n says that the last
label begins a document. Packed samples have n = seq_length.

An indexed source gives any sample at once, by its number. A stream is read in order, and each reader of it gets a part of
its own: part rank * workers + worker of ranks * workers, where a rank without worker processes counts as one worker.
Blend (blend.py) mixes both: which source a sample of the run comes from is a function of its number alone; which sample of
the source it is, too, if the source is indexed, and otherwise the next one of the reader's part.
"""

from __future__ import annotations

from typing import Any, Protocol, runtime_checkable

import numpy as np

Sample = tuple[np.ndarray, np.ndarray]


@runtime_checkable
class SampleSource(Protocol):
    """Endless numbered samples: sample n is sample n % samples_per_epoch of epoch n // samples_per_epoch.

    name: as in data.path. identity: hash of everything that sample n depends on besides n. seq_length: inputs of a
    (full) sample. tokens_per_epoch counts the tokens of its documents.
    """

    name: str
    identity: str
    seq_length: int
    samples_per_epoch: int
    tokens_per_epoch: int

    def sample(self, number: int) -> Sample:
        """Sample `number` from 0, without end. A pure function of it."""
        ...


class StreamReader(Protocol):
    """One part of a stream, read in order."""

    def next_sample(self) -> Sample:
        """The next sample; a source that ends begins again. Raises DataError for a fault that retrying did not mend."""
        ...

    def state(self) -> dict[str, Any]:
        """JSON values that let `open` go on behind the last sample given. Called after every batch: cheap, and small."""
        ...

    def close(self) -> None:
        """Ends threads and connections."""
        ...


@runtime_checkable
class StreamSource(Protocol):
    """A source without sample numbers. Must be picklable: each loader process opens its own part.

    name, seq_length: as in SampleSource. identity: hash of the locations, tokenizer and options (contents cannot be
    known beforehand).
    """

    name: str
    identity: str
    seq_length: int

    def open(self, part: int, parts: int, state: dict[str, Any] | None) -> StreamReader:
        """A reader of part `part` of `parts`: parts are disjoint and cover the stream. state: of an earlier reader."""
        ...
