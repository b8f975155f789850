"""Batches as tensors, with prefetching. What is in a batch: batches.py."""

from __future__ import annotations

import queue
import signal
import threading
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, get_worker_info
from torch.utils.data import Dataset as TorchDataset

from megatronish.data.samples.batches import batch_of
from megatronish.data.samples.blend import Blend
from megatronish.data.samples.sample import SampleSource, StreamReader, StreamSource
from megatronish.data.samples.sampler import MicroBatchSampler
from megatronish.errors import DataError

Batch = dict[str, Any]
# Key of a batch under which a loader process sends home where its streams stand.
_STREAMS = "stream states"


def to_tensors(batch: Mapping[str, Any]) -> Batch:
    """The batch with its arrays as tensors that share their memory."""
    return {key: torch.from_numpy(v) if isinstance(v, np.ndarray) else v for key, v in batch.items()}


class _Batches(TorchDataset[Batch]):
    """Batches by arrays of sample numbers, for DataLoader's processes."""

    def __init__(self, source: SampleSource | Blend, document_mask: bool, streams: _StreamParts) -> None:
        self._source = source
        self._document_mask = document_mask
        self._streams = streams
        self._readers: dict[int, StreamReader] | None = None
        self._part = 0

    def __getitem__(self, numbers: np.ndarray) -> Batch:
        if not isinstance(self._source, Blend) or not self._streams.sources:
            return to_tensors(batch_of(self._source.rows(numbers), self._document_mask))
        if self._readers is None:
            self._part, self._readers = self._streams.open()
        batch = to_tensors(batch_of(self._source.rows(numbers, self._readers), self._document_mask))
        states = {str(i): reader.state() for i, reader in self._readers.items()}
        return {**batch, _STREAMS: (self._part, states)}

    def close(self) -> None:
        """Closes the readers of this process."""
        for reader in (self._readers or {}).values():
            reader.close()
        self._readers = None


class _StreamParts:
    """Which part of the streams each process of a rank reads, so that a resumed run goes on with the same parts.

    Micro batch m of a rank is made by its process m % workers in an unbroken run; a run that goes on at micro batch m
    starts with process 0, which therefore takes part m % workers.
    """

    def __init__(
        self, source: SampleSource | Blend, sampler: MicroBatchSampler, workers: int, states: Mapping[str, Any] | None
    ) -> None:
        sources = source.sources if isinstance(source, Blend) else []
        self.sources: dict[int, StreamSource] = {i: s for i, s in enumerate(sources) if not isinstance(s, SampleSource)}
        self.workers = max(workers, 1)
        self.rank, self.ranks = sampler.dp_rank, sampler.dp_size
        self.first_process = sampler.consumed_samples // sampler.samples_per_micro_step
        self.states: dict[int, dict[str, Any]] = {}
        if states is not None and self.sources:
            if (states["workers"], states["ranks"]) != (self.workers, self.ranks):
                raise DataError(
                    f"the streams were read by {states['ranks']} ranks x {states['workers']} loader processes, this run has "
                    f"{self.ranks} x {self.workers}: each reads a part of its own, so only the same numbers can go on. Set "
                    f"--data.num_workers {states['workers']} and start {states['ranks']} ranks."
                )
            self.states = {int(part): state for part, state in states["parts"].items()}

    def open(self) -> tuple[int, dict[int, StreamReader]]:
        """This process's part of the rank's parts, and a reader of each stream by its place among the sources."""
        info = get_worker_info()
        part = (self.first_process + (info.id if info else 0)) % self.workers
        states = self.states.get(part, {})
        whole = self.rank * self.workers + part, self.ranks * self.workers
        return part, {i: source.open(*whole, states.get(str(i))) for i, source in self.sources.items()}

    def saved(self) -> dict[str, Any] | None:
        """JSON value that makes a later run go on here; None without streams."""
        if not self.sources:
            return None
        parts = {str(part): state for part, state in sorted(self.states.items())}
        return {"workers": self.workers, "ranks": self.ranks, "parts": parts}


def _hear_no_signals(worker: int) -> None:
    """In a loader process: a signal to stop is for its rank, which ends it when it has saved."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)


class MicroBatchLoader:
    """Endless iterator over one rank's micro batches, starting at the sampler's `consumed_samples`.

    num_workers: 0 reads in this process (with `prefetch` > 0 in a background thread that keeps so many batches ready),
    more reads in that many persistent processes, `prefetch` batches each. The batches are the same either way, streams
    apart: each process reads a part of its own.
    pin_memory: page-locked tensors for asynchronous copies to a GPU. stream_states: what `stream_states` gave, to go on.
    `consumed_samples` counts what was handed out over all ranks, not what was prefetched: save it, and give it to the
    sampler to go on. Use as a context manager or call `close`.
    """

    def __init__(
        self,
        dataset: SampleSource | Blend,
        sampler: MicroBatchSampler,
        *,
        document_mask: bool = False,
        num_workers: int = 0,
        prefetch: int = 2,
        pin_memory: bool = False,
        stream_states: Mapping[str, Any] | None = None,
    ) -> None:
        if num_workers < 0 or prefetch < 0:
            raise ValueError(f"num_workers {num_workers} and prefetch {prefetch} must not be negative")
        self.dataset = dataset
        self.sampler = sampler
        self.consumed_samples = sampler.consumed_samples
        self._streams = _StreamParts(dataset, sampler, num_workers, stream_states)
        self._batches = _Batches(dataset, document_mask, self._streams)
        self._pin_memory = pin_memory
        self._thread: _PrefetchThread | None = None
        self._source: Iterator[Batch]
        if num_workers > 0:
            self._warm()
            self._source = iter(
                DataLoader(
                    self._batches,
                    batch_size=None,
                    sampler=sampler,  # yields arrays of numbers, one a batch
                    num_workers=num_workers,
                    prefetch_factor=max(prefetch, 1),
                    persistent_workers=True,
                    pin_memory=pin_memory,
                    worker_init_fn=_hear_no_signals,
                )
            )
        elif prefetch > 0:
            self._source = self._thread = _PrefetchThread(self._inline(), prefetch)
        else:
            self._source = self._inline()

    def _warm(self) -> None:
        """Lays out the first epoch here, so that forked processes share its memory instead of making their own."""
        if not self._streams.sources:
            self.dataset.lengths(next(iter(self.sampler)))
            self.dataset.rows(next(iter(self.sampler)))

    def _inline(self) -> Iterator[Batch]:
        for numbers in self.sampler:
            batch = self._batches[numbers]
            if self._pin_memory:
                batch = {key: v.pin_memory() if isinstance(v, torch.Tensor) else v for key, v in batch.items()}
            yield batch

    def __iter__(self) -> MicroBatchLoader:
        return self

    def __next__(self) -> Batch:
        batch = next(self._source)
        if (streams := batch.pop(_STREAMS, None)) is not None:
            part, states = streams
            self._streams.states[part] = states
        self.consumed_samples += self.sampler.samples_per_micro_step
        return batch

    def stream_states(self) -> dict[str, Any] | None:
        """Where this rank's streams stand behind the batches handed out, as JSON values; None without streams."""
        return self._streams.saved()

    def close(self) -> None:
        """Stops the background thread or processes."""
        if self._thread is not None:
            self._thread.stop()
        self._source = iter(())
        self._batches.close()

    def __enter__(self) -> MicroBatchLoader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class _PrefetchThread(Iterator[Batch]):
    """Runs an endless iterator ahead in a thread, by at most `depth` batches; its failure is raised at `next`."""

    def __init__(self, source: Iterator[Batch], depth: int) -> None:
        self._source = source
        self._ready: queue.Queue[Batch | BaseException] = queue.Queue(maxsize=depth)
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="batch-prefetch", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        while not self._stopping.is_set():
            item: Batch | BaseException
            try:
                item = next(self._source)
            except BaseException as error:  # handed to the consumer, who raises it
                item = error
            while not self._stopping.is_set():
                try:
                    self._ready.put(item, timeout=0.1)
                    break
                except queue.Full:
                    continue
            if isinstance(item, BaseException):
                return

    def __next__(self) -> Batch:
        if self._stopping.is_set():
            raise StopIteration
        item = self._ready.get()
        if isinstance(item, BaseException):
            self._stopping.set()
            raise item
        return item

    def stop(self) -> None:
        """Ends the thread; batches not taken are dropped."""
        self._stopping.set()
        self._thread.join(timeout=5.0)
