"""What training reads from: numbered samples of indexed data, or samples read in order from a stream.

A sample is n inputs and one more token for the last label, with the offsets in 0..n at which a document begins. The first
offset is always 0, even inside a document; offset n says that the last label begins a document. Packed samples have
n = seq_length; unpacked ones hold one document and are padded.

An indexed source gives any sample at once, by its number. A stream is read in order, and each reader of it gets a part of
its own: part rank * workers + worker of ranks * workers, where a rank without worker processes counts as one worker.
Blend (blend.py) mixes both: which source a sample of the run comes from is a function of its number alone; which sample of
the source it is, too, if the source is indexed, and otherwise the next one of the reader's part.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import numpy as np

Sample = tuple[np.ndarray, np.ndarray]  # tokens int[n + 1], offsets int64[k] at which documents begin


@dataclass(slots=True)
class Rows:
    """Samples as the rows of one array.

    tokens: integers [b, n + 1]. starts: int64[k], rising: where documents begin, as offsets into the flattened tokens;
    each row's first token is among them. known: int64[b], how many tokens of each row are real, the rest being padding;
    None where all are.
    """

    tokens: np.ndarray
    starts: np.ndarray
    known: np.ndarray | None = None

    @classmethod
    def of(cls, samples: Sequence[Sample]) -> Rows:
        """Rows of samples of equal length."""
        tokens = np.stack([tokens for tokens, _ in samples])
        width = tokens.shape[1]
        return cls(tokens, np.concatenate([starts + row * width for row, (_, starts) in enumerate(samples)]))

    @classmethod
    def merged(cls, parts: Sequence[Rows], places: Sequence[np.ndarray]) -> Rows:
        """Rows of several parts: row i of part p becomes row places[p][i]. Shorter rows are padded with token 0."""
        width = max(part.tokens.shape[1] for part in parts)
        count = sum(len(part.tokens) for part in parts)
        tokens = np.zeros((count, width), dtype=np.result_type(*(part.tokens.dtype for part in parts)))
        known = np.empty(count, dtype=np.int64)
        starts = []
        for part, rows in zip(parts, places, strict=True):
            own = part.tokens.shape[1]
            tokens[rows, :own] = part.tokens
            known[rows] = own if part.known is None else part.known
            row, offset = np.divmod(part.starts, own)
            starts.append(rows[row] * width + offset)
        return cls(tokens, np.sort(np.concatenate(starts)), None if (known == width).all() else known)

    def padded(self, width: int) -> Rows:
        """The same rows with token 0 behind them, `width` tokens each."""
        return (
            self
            if width == self.tokens.shape[1]
            else self.merged(
                [self, Rows(np.zeros((0, width), dtype=self.tokens.dtype), np.empty(0, dtype=np.int64))],
                [np.arange(len(self.tokens)), np.empty(0, dtype=np.int64)],
            )
        )

    def sample(self, row: int) -> Sample:
        """One row: its tokens, and its document starts counted from its own first token."""
        width = self.tokens.shape[1]
        first, last = np.searchsorted(self.starts, (row * width, (row + 1) * width))
        return self.tokens[row], self.starts[first:last] - row * width


@runtime_checkable
class SampleSource(Protocol):
    """Endless numbered samples: sample n is sample n % samples_per_epoch of epoch n // samples_per_epoch.

    name: as in data.path. identity: hash of everything that sample n depends on besides n. seq_length: inputs of a
    (full) sample. tokens_per_epoch counts the tokens of its documents.
    """

    @property
    def name(self) -> str: ...
    @property
    def identity(self) -> str: ...
    @property
    def seq_length(self) -> int: ...
    @property
    def samples_per_epoch(self) -> int: ...
    @property
    def tokens_per_epoch(self) -> int: ...

    def rows(self, numbers: np.ndarray) -> Rows:
        """Samples int64[b] from 0, without end, each a pure function of its number. Raises ValueError below 0."""
        ...

    def lengths(self, numbers: np.ndarray) -> np.ndarray:
        """Real tokens of samples int64[b], without reading them: inputs and the one more, int64[b]."""
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

    @property
    def name(self) -> str: ...
    @property
    def identity(self) -> str: ...
    @property
    def seq_length(self) -> int: ...

    def open(self, part: int, parts: int, state: dict[str, Any] | None) -> StreamReader:
        """A reader of part `part` of `parts`: parts are disjoint and cover the stream. state: of an earlier reader."""
        ...
