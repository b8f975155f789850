"""Batches as tensors, with prefetching. What a batch contains: samples/rows.py."""

from __future__ import annotations

import queue
import signal
import threading
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, get_worker_info

from megatronish.data.samples.sampler import MicroBatchSampler
from megatronish.data.samples.source import SampleSource
from megatronish.errors import DataError

Batch = dict[str, Any]
# Key of a batch under which a loader process returns the state of its streams.
_STREAMS = "stream states"


def to_tensors(batch: Mapping[str, Any]) -> Batch:
    """The batch with its arrays as tensors that share their memory."""
    return {key: torch.from_numpy(v) if isinstance(v, np.ndarray) else v for key, v in batch.items()}


class _Batches(Dataset[Batch]):
    """Batches by arrays of sample numbers, as one process of a rank reads them.

    Each process reads a part of its own of what is streamed, and a resumed run continues with the same parts: micro batch m
    of a rank is made by its process m % workers in an uninterrupted run; a run that resumes at micro batch m starts with
    process 0, which therefore takes part m % workers.
    """

    def __init__(
        self,
        source: SampleSource,
        sampler: MicroBatchSampler,
        workers: int,
        document_mask: bool,
        states: dict[int, Any],
    ) -> None:
        self._source = source
        self._document_mask = document_mask
        self._workers, self._rank, self._ranks = workers, sampler.dp_rank, sampler.dp_size
        self._first_part = sampler.consumed_samples // sampler.samples_per_micro_step
        self._states = states
        self._part = 0
        self._opened: SampleSource | None = None

    def __getitem__(self, numbers: np.ndarray) -> Batch:
        if self._opened is None:
            info = get_worker_info()
            self._part = (self._first_part + (info.id if info else 0)) % self._workers
            part, parts = self._rank * self._workers + self._part, self._ranks * self._workers
            self._opened = self._source.open(part, parts, self._states.get(self._part))
        batch = to_tensors(self._opened.batch(numbers, self._document_mask))
        state = self._opened.state()
        return batch if state is None else {**batch, _STREAMS: (self._part, state)}

    def close(self) -> None:
        """Closes what this process has opened."""
        if self._opened is not None:
            self._opened.close()
        self._opened = None


def _ignore_signals(worker: int) -> None:
    """In a loader process: a signal to stop is for its rank, which stops the process after it has saved."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)


class MicroBatchLoader:
    """Endless iterator over one rank's micro batches, starting at the sampler's `consumed_samples`.

    num_workers: 0 reads in this process (with `prefetch` > 0 in a background thread that keeps that many batches ready),
    more reads in that many persistent processes, `prefetch` batches each. The batches are the same either way, except those
    of streams, of which each process reads its own part.
    pin_memory: page-locked tensors for asynchronous copies to a GPU. stream_states: what `stream_states` returned, to resume.
    `consumed_samples` counts the samples returned over all ranks, not those prefetched: save it, and pass it to the sampler
    to resume. Use as a context manager or call `close`.
    """

    def __init__(
        self,
        dataset: SampleSource,
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
        self._workers = max(num_workers, 1)
        self._states = self._checked_states(stream_states)
        self._batches = _Batches(dataset, sampler, self._workers, document_mask, dict(self._states))
        self._pin_memory = pin_memory
        self._thread: _PrefetchThread | None = None
        self._source: Iterator[Batch]
        if num_workers > 0:
            if not dataset.streamed:  # computes the first epoch's order here, so that forked processes share its memory
                dataset.batch(next(iter(sampler)), document_mask)
            self._source = iter(
                DataLoader(
                    self._batches,
                    batch_size=None,
                    sampler=sampler,  # yields one array of numbers per batch
                    num_workers=num_workers,
                    prefetch_factor=max(prefetch, 1),
                    persistent_workers=True,
                    pin_memory=pin_memory,
                    worker_init_fn=_ignore_signals,
                )
            )
        elif prefetch > 0:
            self._source = self._thread = _PrefetchThread(self._inline(), prefetch)
        else:
            self._source = self._inline()

    def _checked_states(self, saved: Mapping[str, Any] | None) -> dict[int, Any]:
        """Saved states by part of this rank. Raises DataError if another number of processes saved them."""
        if saved is None or not self.dataset.streamed:
            return {}
        ranks = self.sampler.dp_size
        if (saved["workers"], saved["ranks"]) != (self._workers, ranks):
            raise DataError(
                f"the streams were read by {saved['ranks']} ranks x {saved['workers']} loader processes, this run has "
                f"{ranks} x {self._workers}: each reads its own part, so a run resumes only with the same numbers. Set "
                f"--data.num_workers {saved['workers']} and start {saved['ranks']} ranks."
            )
        return {int(part): state for part, state in saved["parts"].items()}

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
            part, state = streams
            self._states[part] = state
        self.consumed_samples += self.sampler.samples_per_micro_step
        return batch

    def stream_states(self) -> dict[str, Any] | None:
        """State of this rank's streams after the batches returned, as JSON values; None if nothing is streamed."""
        if not self.dataset.streamed:
            return None
        parts = {str(part): state for part, state in sorted(self._states.items())}
        return {"workers": self._workers, "ranks": self.sampler.dp_size, "parts": parts}

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
    """Prefetches from an endless iterator in a thread, at most `depth` batches; its exception is raised by `next`."""

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
            except BaseException as error:  # the consumer raises it
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
        """Stops the thread; prefetched batches are dropped."""
        self._stopping.set()
        self._thread.join(timeout=5.0)
