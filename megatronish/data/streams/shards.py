"""The documents of one source from any position in it, as streams read them and resume."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path

from megatronish.data.readers.documents import START, StreamPosition, read_records
from megatronish.data.readers.inputs import TextSource
from megatronish.data.readers.records import RecordReader
from megatronish.data.readers.remote import RemoteFile, Retry
from megatronish.errors import DataError

log = logging.getLogger(__name__)


class ShardReader:
    """Iterates over (text, position after it) of the documents of a source whose number modulo `parts` is `part`.

    A document is the texts of `keys`, joined by a blank line, empty ones left out; empty documents are skipped. on_error:
    "fail" raises DataError at a record without text, "skip" warns.
    """

    def __init__(
        self,
        source: TextSource,
        keys: tuple[str, ...],
        on_error: str = "fail",
        retry: Retry | None = None,
        start: StreamPosition = START,
        part: int = 0,
        parts: int = 1,
    ) -> None:
        self.source = source
        self._remote: RemoteFile | None = None
        self._retry = retry
        self._start = start
        self._fail = on_error == "fail"
        self._reader = RecordReader(keys, self._fault, first=start.document, part=part, parts=parts)

    @property
    def tag(self) -> str:
        """Size (and ETag) of the source, once something was read; "" of a file of the hub, which its commit fixes."""
        if self._remote is not None:
            return self._remote.tag
        path = Path(self.source.location)
        return str(path.stat().st_size) if path.exists() else ""

    def __iter__(self) -> Iterator[tuple[str, StreamPosition]]:
        reader, start = self._reader, self._start
        with self.source.open(self._retry) as stored:
            self._remote = stored if isinstance(stored, RemoteFile) else None
            for texts in read_records(self.source, stored, reader, start=start):
                if text := "\n\n".join(filter(None, texts)):
                    byte = start.byte + reader.position if self.source.format == "jsonl" else 0
                    yield text, StreamPosition(reader.counts.records, byte)

    def _fault(self, number: int, reason: str) -> None:
        place = self.source.place(number)
        if self._fail:
            raise DataError(f'{place}: {reason} (data.on_error "skip" skips such documents)')
        log.warning("%s: skipped: %s", place, reason)
