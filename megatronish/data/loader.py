"""Batches as tensors: packed training samples with prefetching, and fixed validation windows.

Shapes: b micro batch size, s sequence length. A batch is a dict of
    tokens      int64 [b, s]
    labels      int64 [b, s], the next token, or -100 where there is none to learn
and with `document_mask` also
    positions   int64 [b, s], restarting in each document
    cu_seqlens  int32 [n + 1], where the n documents (or parts) begin in the b*s flattened tokens, then b*s
    max_seqlen  int, the longest of them
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch.utils.data import DataLoader
from torch.utils.data import Dataset as TorchDataset

from megatronish.data.errors import DataError
from megatronish.data.indexed import IndexedReader
from megatronish.data.packing import (
    IGNORED_LABEL,
    PackedDataset,
    TokenStream,
    labels_within_documents,
    positions_in_documents,
)
from megatronish.data.sampler import MicroBatchSampler
from megatronish.data.tokenizer import Tokenizer

Batch = dict[str, Any]


def collate(samples: list[tuple[np.ndarray, np.ndarray]], document_mask: bool) -> Batch:
    """Batch of samples (tokens [s + 1], document starts) as `PackedDataset.sample` gives them."""
    stacked = np.stack([tokens for tokens, _ in samples])
    inputs = torch.from_numpy(np.ascontiguousarray(stacked[:, :-1]))
    if not document_mask:
        return {"tokens": inputs, "labels": torch.from_numpy(np.ascontiguousarray(stacked[:, 1:]))}
    length = stacked.shape[1] - 1
    labels = np.stack([labels_within_documents(tokens, starts) for tokens, starts in samples])
    positions = np.stack([positions_in_documents(starts, length) for _, starts in samples])
    edges = [starts[starts < length] + row * length for row, (_, starts) in enumerate(samples)]
    cu_seqlens = np.concatenate([*edges, [len(samples) * length]]).astype(np.int32)
    return {
        "tokens": inputs,
        "labels": torch.from_numpy(labels),
        "positions": torch.from_numpy(positions),
        "cu_seqlens": torch.from_numpy(cu_seqlens),
        "max_seqlen": int(np.diff(cu_seqlens).max()),
    }


class _Batches(TorchDataset[Batch]):
    """Batches by arrays of sample numbers, for DataLoader's processes."""

    def __init__(self, dataset: PackedDataset, document_mask: bool) -> None:
        self.dataset = dataset
        self.document_mask = document_mask

    def __getitem__(self, numbers: np.ndarray) -> Batch:
        return collate([self.dataset.sample(int(number)) for number in numbers], self.document_mask)


class MicroBatchLoader:
    """Endless iterator over one rank's micro batches, starting at the sampler's `consumed_samples`.

    num_workers: 0 reads in this process (with `prefetch` > 0 in a background thread that keeps so many batches ready),
    more reads in that many persistent processes, `prefetch` batches each. The batches are the same either way.
    pin_memory: page-locked tensors for asynchronous copies to a GPU.
    `consumed_samples` counts what was handed out over all ranks, not what was prefetched: save it, and give it to the
    sampler to go on. Use as a context manager or call `close`.
    """

    def __init__(
        self,
        dataset: PackedDataset,
        sampler: MicroBatchSampler,
        *,
        document_mask: bool = False,
        num_workers: int = 0,
        prefetch: int = 2,
        pin_memory: bool = False,
    ) -> None:
        if num_workers < 0 or prefetch < 0:
            raise ValueError(f"num_workers {num_workers} and prefetch {prefetch} must not be negative")
        self.dataset = dataset
        self.sampler = sampler
        self.consumed_samples = sampler.consumed_samples
        self._batches = _Batches(dataset, document_mask)
        self._pin_memory = pin_memory
        self._thread: _PrefetchThread | None = None
        self._source: Iterator[Batch]
        if num_workers > 0:
            self._source = iter(
                DataLoader(
                    self._batches,
                    batch_size=None,
                    sampler=sampler,  # yields arrays of numbers, one a batch
                    num_workers=num_workers,
                    prefetch_factor=max(prefetch, 1),
                    persistent_workers=True,
                    pin_memory=pin_memory,
                )
            )
        elif prefetch > 0:
            self._source = self._thread = _PrefetchThread(self._inline(), prefetch)
        else:
            self._source = self._inline()

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
        self.consumed_samples += self.sampler.samples_per_micro_step
        return batch

    def close(self) -> None:
        """Stops the background thread or processes."""
        if self._thread is not None:
            self._thread.stop()
        self._source = iter(())

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


class ValidationLoader:
    """The held-out documents in order, each token a label exactly once, the same batches at every pass.

    Documents are laid end to end behind one end-of-document token (so that the first token is predicted too; without
    one it is not) and cut into windows that do not overlap. The last is padded with label -100, as are batches that
    make all ranks take equally many. Window w goes to batch w // (b*dp), rank (w // b) % dp.
    With `document_mask` a document's first token has no label, as in training.

    max_windows: at most so many windows, evenly spread over the text. Attributes: `num_windows`; `num_labels`, labels
    over all ranks. Raises DataError if there is nothing to predict.
    """

    def __init__(
        self,
        reader: IndexedReader,
        document_ids: npt.ArrayLike,
        seq_length: int,
        micro_batch_size: int,
        dp_rank: int = 0,
        dp_size: int = 1,
        *,
        eod_id: int | None = None,
        document_mask: bool = False,
        max_windows: int | None = None,
    ) -> None:
        if not 0 <= dp_rank < dp_size or micro_batch_size < 1 or seq_length < 1:
            raise ValueError(
                f"rank {dp_rank} of {dp_size}, micro batch {micro_batch_size}, sequence length {seq_length}: "
                "sizes must be positive and the rank below its size"
            )
        documents = np.asarray(document_ids, dtype=np.int64)
        documents = documents[reader.document_lengths[documents] > 0]
        self._stream = TokenStream(reader, documents)
        self._lead = np.array([] if eod_id is None else [eod_id], dtype=np.int64)
        self._total = int(self._stream.stream_starts[-1]) + len(self._lead)
        if self._total < 2:
            raise DataError(
                f"{reader.prefix}: nothing is held out for validation ({len(documents)} documents); raise the validation fraction, "
                "or prepare the text as more than one document (--doc-separator)"
            )
        windows = -(-(self._total - 1) // seq_length)
        self.window_numbers = np.arange(windows)
        if max_windows is not None and max_windows < windows:
            if max_windows < 1:
                raise ValueError(f"max_windows {max_windows} must be at least 1")
            self.window_numbers = np.arange(max_windows) * windows // max_windows
        self.num_windows = len(self.window_numbers)
        self.seq_length = seq_length
        self.micro_batch_size = micro_batch_size
        self.dp_rank = dp_rank
        self.dp_size = dp_size
        self.document_mask = document_mask

    def __len__(self) -> int:
        """Batches of this (and every) rank in one pass."""
        return -(-self.num_windows // (self.micro_batch_size * self.dp_size))

    def __iter__(self) -> Iterator[Batch]:
        for batch in range(len(self)):
            first = (batch * self.dp_size + self.dp_rank) * self.micro_batch_size
            numbers = self.window_numbers[first : first + self.micro_batch_size]
            rows = [self._window(int(number)) for number in numbers]
            rows += [self._padded(np.empty(0, dtype=np.int64), np.zeros(1, dtype=np.int64))] * (
                self.micro_batch_size - len(rows)
            )
            result = collate([(tokens, starts) for tokens, starts, _ in rows], self.document_mask)
            for row, (_, _, known) in enumerate(rows):
                result["labels"][row, max(known - 1, 0) :] = IGNORED_LABEL
            yield result

    @property
    def num_labels(self) -> int:
        """Labels to learn from over all ranks in one pass."""
        return sum(len(self._label_tokens(int(number))) for number in self.window_numbers)

    def label_bytes(self, tokenizer: Tokenizer) -> int:
        """Bytes of text that the labels of one pass stand for, over all ranks (an end of document stands for none).

        The sum of all losses in bits, divided by this, is the model's bits per byte.
        """
        return sum(len(tokenizer.decode_bytes(self._label_tokens(int(number)))) for number in self.window_numbers)

    def _label_tokens(self, number: int) -> np.ndarray:
        tokens, starts, known = self._window(number)
        labels = labels_within_documents(tokens, starts) if self.document_mask else tokens[1:]
        real = labels[: known - 1]
        return real[real != IGNORED_LABEL]

    def _window(self, number: int) -> tuple[np.ndarray, np.ndarray, int]:
        """Tokens int64[s + 1] padded, document starts, and how many tokens are real."""
        begin = number * self.seq_length
        length = min(self.seq_length + 1, self._total - begin)
        lead = self._lead[begin : begin + 1] if begin == 0 else self._lead[:0]
        tokens, starts = self._stream.window(max(begin - len(self._lead), 0), length - len(lead))
        if len(lead):
            starts = np.concatenate(([0], starts[1:] + 1))  # the leading token counts to the first document
        return self._padded(np.concatenate((lead, tokens)), starts)

    def _padded(self, tokens: np.ndarray, starts: np.ndarray) -> tuple[np.ndarray, np.ndarray, int]:
        missing = self.seq_length + 1 - len(tokens)
        fill = int(self._lead[0]) if len(self._lead) else 0
        if missing and len(tokens):
            starts = np.concatenate((starts, [len(tokens)]))  # padding is a document of its own: nothing attends to it
        return np.concatenate((tokens, np.full(missing, fill, dtype=np.int64))), starts, len(tokens)
