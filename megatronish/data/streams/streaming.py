"""Training samples straight from text: shards are read, shuffled, tokenised and packed while training runs.

Order. Shards are permuted by the seed. With at least as many shards as parts (ranks x loader processes), part p of P owns
shards p, p+P, p+2P, ... of that order; with fewer, shard s is shared by the parts p = s (mod S), document by document. The
shards of a part never change, so parts stay disjoint in every epoch; each reads its own shards in an order drawn for each
epoch, and begins the next epoch when it has read them all. Documents are shuffled in windows of `buffer_documents` (or
BUFFER_BYTES of text, if that is less): a window is read completely, permuted by (seed, position), and emitted. Tokens with an
end-of-document token after each document are cut into samples as in packing.py.

Resuming. All of this is a function of (seed, locations, part, parts, position), so the state is the position where the open
window begins, the number of documents emitted from it, and of tokens of the next one: a few hundred bytes, no buffer. A reader
that is opened with a state reads that window again and gives exactly the samples that the first would have given: always from
local files and hub data sets (fixed to a commit), from other servers as long as size and ETag of the shard are unchanged,
which is checked. The parts must be the same.
"""

from __future__ import annotations

import hashlib
import logging
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from megatronish.data.indexed.manifest import TokenizerRecord
from megatronish.data.readers.documents import START, StreamPosition
from megatronish.data.readers.inputs import HUB, TextSource
from megatronish.data.readers.locations import TextLocation, resolve
from megatronish.data.readers.remote import Retry
from megatronish.data.samples.permutation import keyed_permutation
from megatronish.data.samples.rows import Sample, SampleRows
from megatronish.data.samples.source import SampleSource
from megatronish.data.streams.shards import ShardReader
from megatronish.data.tokenizers.backends import Encoder, choose_encoder
from megatronish.data.tokenizers.tokenizer import Tokenizer, load_tokenizer, tokenizer_file_at
from megatronish.errors import DataError

BUFFER_BYTES = 64_000_000
ENCODE_DOCUMENTS = 32  # enough to amortise a call, few enough to keep a seek short
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class StreamOptions:
    """How text becomes samples. tokenizer: as `load_tokenizer` takes it; text_key: instead of the source's own fields.

    eod_id: the end-of-document token, where the tokenizer's file does not name one. on_error: "fail" or "skip" for documents
    without text. Raises DataError for invalid values.
    """

    tokenizer: str
    seq_length: int
    seed: int
    buffer_documents: int = 10_000
    text_key: str | None = None
    eod_id: int | None = None
    on_error: str = "fail"
    retry: Retry = field(default_factory=Retry)

    def __post_init__(self) -> None:
        if self.seq_length < 1 or self.buffer_documents < 1:
            raise DataError(
                f"sequence length {self.seq_length} and stream buffer {self.buffer_documents} must be at least 1"
            )
        if self.on_error not in ("fail", "skip"):
            raise DataError(f"data.on_error {self.on_error!r}: choose fail or skip")


class DocumentStream(SampleSource):
    """A source of which each part is read in order, by the PackedReader that `open` returns.

    identity: hash of URLs or of names and sizes of local shards, commit, tokenizer and options. `tokenizer_record` and
    `tokenizer_file` describe the tokenizer as those of an IndexedDataset do.
    """

    streamed = True

    def __init__(self, location: TextLocation, options: StreamOptions) -> None:
        tokenizer = load_tokenizer(options.tokenizer, eod_id=options.eod_id)
        if tokenizer.eod_id is None:
            raise DataError(
                f"tokenizer {options.tokenizer} names no end-of-document token, which streamed documents end with"
            )
        self.name = location.name
        self.location = location
        self.options = options
        self.seq_length = options.seq_length
        self.eod_id: int = tokenizer.eod_id
        self.tokenizer_file = None if tokenizer.kind == "bytes" else tokenizer_file_at(Path(options.tokenizer))
        name = self.tokenizer_file.name if self.tokenizer_file else None
        self.tokenizer_record = TokenizerRecord(
            tokenizer.kind, name, tokenizer.fingerprint, tokenizer.vocab_size, tokenizer.eod_id
        )
        self.keys = (options.text_key,) if options.text_key else location.keys
        order = keyed_permutation(len(location.sources), "shards", options.seed, self.identity)
        self.shards = tuple(location.sources[number] for number in order)

    @cached_property
    def identity(self) -> str:
        """See SampleSource."""
        options, location = self.options, self.location
        digest = hashlib.sha256()
        for source in location.sources:  # a folder may be moved: of local shards names and sizes count
            elsewhere = source.remote or source.location.startswith(HUB)
            what = (source.name, "") if elsewhere else (Path(source.location).name, source.size)
            digest.update(repr(what).encode())
        how = (options.seq_length, options.seed, options.buffer_documents, options.on_error, *self.keys)
        digest.update(repr((how, location.revision, self.tokenizer_record.sha256)).encode())
        return digest.hexdigest()

    def describe(self) -> list[str]:
        """Lines to print before the start: shards, commit and licence."""
        revision = f" at commit {self.location.revision[:12]}" if self.location.revision else ""
        lines = [f"{self.name}: {len(self.shards):,} shards{revision}, streamed; fields {', '.join(self.keys)}"]
        if self.location.licence:
            lines.append(f"{self.name}: licence: {self.location.licence}")
        return lines

    def rows(self, numbers: np.ndarray) -> SampleRows:
        """Not for a stream: its samples are not numbered. `open` returns a reader of them."""
        raise TypeError(f"{self.name}: streamed samples are read from a part that `open` returns")

    def documents(self, number: int) -> tuple[str, list[int] | None]:
        """See SampleSource."""
        return self.name, None

    def open(self, part: int, parts: int, state: dict[str, Any] | None = None) -> PackedReader:
        """The reader of one part, after the last sample of the reader that gave `state`. Raises DataError."""
        if not 0 <= part < parts:
            raise ValueError(f"part {part} is outside 0..{parts - 1}")
        return PackedReader(self, part, parts, state)


def open_stream(location: str, options: StreamOptions) -> DocumentStream:
    """The stream at a location of `data.path` (see readers/locations.py). Raises DataError."""
    return DocumentStream(resolve(location), options)


@dataclass(frozen=True)
class _Start:
    """Where a window begins: the `shard`-th of the part's shards in this epoch's order."""

    epoch: int = 0
    shard: int = 0
    position: StreamPosition = START

    @property
    def key(self) -> tuple[str, ...]:
        """What the window's permutation is drawn by; fixed, as saved states depend on it."""
        position = f"Place(document={self.position.document}, byte={self.position.byte})"
        return repr(self.epoch), repr(self.shard), position


@dataclass(frozen=True)
class _Window:
    """Texts in the order they are emitted, where they begin and where the next window does."""

    start: _Start
    texts: list[str]
    following: _Start
    tag: str


@dataclass(frozen=True)
class _Tokens:
    """A tokenised document: number `index` of a window."""

    ids: np.ndarray
    window: _Window
    index: int


class PackedReader(SampleSource):
    """Samples of one part of a stream, in order."""

    streamed = True

    def __init__(self, stream: DocumentStream, part: int, parts: int, state: dict[str, Any] | None) -> None:
        self.name = stream.name
        self.seq_length = stream.seq_length
        self._stream = stream
        self._part, self._parts = part, parts
        count = len(stream.shards)
        if count >= parts:
            self._owned, self._number, self._of = stream.shards[part::parts], 0, 1
        else:
            shared = part % count
            self._owned, self._number = (stream.shards[shared],), part // count
            self._of = len(range(shared, parts, count))
        self._open: tuple[_Start, ShardReader, Iterator[tuple[str, StreamPosition]]] | None = None
        self._queue: deque[_Tokens] = deque()
        self._offset = 0
        start, skip = _Start(), 0
        if state:
            start, skip, self._offset = self._parse(state)
        self._expected_tag = str(state["tag"]) if state else None
        self._documents = self._tokenised(start, skip)

    def _parse(self, state: dict[str, Any]) -> tuple[_Start, int, int]:
        stream = self._stream
        if state.get("identity") != stream.identity:
            raise DataError(
                f"{stream.name}: its shards, tokenizer or options are not those of the saved state "
                f"({str(state.get('identity'))[:12]}..., now {stream.identity[:12]}...); restore them to resume, or start again without it"
            )
        if (state["part"], state["parts"]) != (self._part, self._parts):
            raise DataError(
                f"{stream.name}: the saved state is of part {state['part']} of {state['parts']}, this is part {self._part} of "
                f"{self._parts}; a stream resumes with the same data-parallel ranks x data.num_workers"
            )
        position = StreamPosition(state["document"], state["byte"])
        return _Start(state["epoch"], state["shard"], position), state["given"], state["token"]

    @property
    def identity(self) -> str:
        """That of the stream."""
        return self._stream.identity

    def rows(self, numbers: np.ndarray) -> SampleRows:
        """The next len(numbers) samples."""
        return SampleRows.of([self.next_sample() for _ in numbers])

    def documents(self, number: int) -> tuple[str, list[int] | None]:
        """See SampleSource."""
        return self.name, None

    def next_sample(self) -> Sample:
        """Tokens int64[s + 1] and where documents begin in them, int64[k], as `PackedDataset.sample` gives them.

        The last token is the first of the next sample. Raises DataError for faults that retrying did not fix.
        """
        length = self._stream.seq_length + 1
        tokens = np.empty(length, dtype=np.int64)
        starts = [0]
        filled, number, offset = 0, 0, self._offset
        while True:
            if number == len(self._queue):
                self._queue.append(next(self._documents))
            ids = self._queue[number].ids
            if offset == 0 and filled:
                starts.append(filled)
            taken = ids[offset : offset + length - filled]
            tokens[filled : filled + len(taken)] = taken
            filled, offset = filled + len(taken), offset + len(taken)
            if filled == length:
                break
            number, offset = number + 1, 0
        for _ in range(number):
            self._queue.popleft()
        self._offset = offset - 1
        return tokens, np.array(starts, dtype=np.int64)

    def state(self) -> dict[str, Any]:
        """What `open` needs to resume after the last sample: a few hundred bytes of JSON. Empty before the first."""
        if not self._queue:
            return {}
        document = self._queue[0]
        start = document.window.start
        return {
            "identity": self._stream.identity,
            "part": self._part,
            "parts": self._parts,
            "epoch": start.epoch,
            "shard": start.shard,
            "document": start.position.document,
            "byte": start.position.byte,
            "tag": document.window.tag,
            "given": document.index,
            "token": self._offset,
        }

    def close(self) -> None:
        """Closes the connection or file that is open."""
        self._documents = iter(())
        self._queue.clear()
        self._close_shard()

    def _tokenised(self, start: _Start, skip: int) -> Iterator[_Tokens]:
        """Documents from number `skip` of the window at `start` on, without end."""
        tokenizer: Tokenizer = load_tokenizer(self._stream.options.tokenizer, eod_id=self._stream.eod_id)
        eod = np.array([self._stream.eod_id], dtype=np.uint32)
        encoder: Encoder | None = None
        while True:
            window = self._read_window(start)
            if encoder is None:  # a faster library, where it gives these texts the same ids
                encoder = choose_encoder("auto", tokenizer, window.texts[:ENCODE_DOCUMENTS], log.warning)
            for first in range(skip, len(window.texts), ENCODE_DOCUMENTS):
                encoded = encoder.encode(window.texts[first : first + ENCODE_DOCUMENTS])
                for index, ids in enumerate(encoded, start=first):
                    yield _Tokens(np.concatenate((ids, eod)), window, index)
            start, skip = window.following, 0

    def _read_window(self, start: _Start) -> _Window:
        """The window at `start`; where that would be empty, at the end of an epoch, the first of the next epoch."""
        texts: list[str] = []
        size, here, tag = 0, start, ""
        while len(texts) < self._stream.options.buffer_documents and size < BUFFER_BYTES:
            found = self._next_text(here)
            if not tag and self._open is not None and here.shard == start.shard:
                tag = self._checked_tag(self._open[1])
            if found is not None:
                text, here = found
                texts.append(text)
                size += len(text)
            elif here.shard + 1 < len(self._owned):
                here = _Start(here.epoch, here.shard + 1)
            elif texts:
                here = _Start(here.epoch + 1)
                break
            elif start == _Start(start.epoch):
                raise DataError(
                    f"{self._stream.name}: part {self._part} of {self._parts} has no document in {len(self._owned)} of "
                    f"{len(self._stream.shards)} shards; use fewer ranks or loader processes, or more text"
                )
            else:
                start = here = _Start(here.epoch + 1)
                tag = ""
        key = (self._stream.options.seed, self._stream.identity, self._part, self._parts)
        order = keyed_permutation(len(texts), "window", *map(repr, key), *start.key)
        return _Window(start, [texts[i] for i in order], here, tag)

    def _checked_tag(self, reader: ShardReader) -> str:
        expected, self._expected_tag = self._expected_tag, None
        if expected not in (None, "", reader.tag):
            raise DataError(
                f"{reader.source.name}: it was {expected!r} (size, ETag) when the state was saved and is {reader.tag!r}: another "
                "file is stored there now; restore it to resume, or start again without the saved state"
            )
        return reader.tag

    def _next_text(self, here: _Start) -> tuple[str, _Start] | None:
        """The next document at or after a position and the position after it; None at the end of the shard."""
        if self._open is None or self._open[0] != here:
            self._close_shard()
            stream, options = self._stream, self._stream.options
            reader = ShardReader(
                self._shard(here), stream.keys, options.on_error, options.retry, here.position, self._number, self._of
            )
            self._open = (here, reader, iter(reader))
        _, reader, documents = self._open
        found = next(documents, None)
        if found is None:
            return None
        text, position = found
        following = _Start(here.epoch, here.shard, position)
        self._open = (following, reader, documents)
        return text, following

    def _shard(self, here: _Start) -> TextSource:
        order = keyed_permutation(
            len(self._owned), "epoch", self._stream.options.seed, self._stream.identity, self._part, here.epoch
        )
        return self._owned[int(order[here.shard])]

    def _close_shard(self) -> None:
        if self._open is not None:
            self._open[2].close()  # type: ignore[attr-defined]  # a generator: its `with` closes the file
            self._open = None
