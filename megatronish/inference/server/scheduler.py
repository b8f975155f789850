"""The thread that owns the model: takes requests from any thread, and sends their output back piece by piece."""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

import psutil
import torch

from megatronish.errors import UserError
from megatronish.inference.batch import Batch, Request
from megatronish.inference.chat_format import ChatFormat
from megatronish.inference.load import Loaded
from megatronish.inference.server.metrics import ServerMetrics
from megatronish.inference.text import Prompt, TextDelta, TextGeneration, check_stop
from megatronish.model.kv_cache import kv_cache_bytes
from megatronish.model.transformer import Transformer
from megatronish.ops.linear import FEW_ROWS

logger = logging.getLogger(__name__)

MAX_DEFAULT_SLOTS = FEW_ROWS  # on CPUs, rows of larger batches are not computed independently of each other
CACHE_FRACTION = 0.25  # of the free memory, for the default number of slots


def default_slots(model: Transformer, length: int) -> int:
    """Number of sequences of `length` tokens whose keys and values fit a quarter of the free memory, 1 to
    MAX_DEFAULT_SLOTS."""
    weight = next(model.parameters())
    if weight.device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(weight.device)
    else:
        free = psutil.virtual_memory().available
    each = kv_cache_bytes(model.config, 1, length, weight.element_size())
    return max(1, min(MAX_DEFAULT_SLOTS, int(CACHE_FRACTION * free / each)))


class RequestFailed(Exception):
    """A request ends with an error that is not the client's. status: of the HTTP response; kind: of the error object."""

    status, kind = 500, "server_error"


class QueueFull(RequestFailed):
    """The queue has no room for the request."""

    status, kind = 429, "rate_limit_error"


@dataclass(eq=False)
class ScheduledRequest:
    """A request of the server. `send` is called in the scheduler's thread with each new output, or with the error that
    ends the request."""

    request: Request
    prompt: Prompt
    stop: tuple[str, ...]
    send: Callable[[TextDelta | RequestFailed], None]
    arrived: float = field(default_factory=time.monotonic)
    first_token: bool = False  # whether there was one
    text: TextGeneration | None = None  # None while it waits


class Scheduler:
    """Runs a `Batch` in its own thread. Call `start` before the first request and `close` at the end."""

    def __init__(
        self, loaded: Loaded, *, slots: int | None = None, max_context: int | None = None, max_waiting: int = 64,
        keep_prefixes: bool = False, compiled: bool = False,
    ) -> None:  # fmt: skip
        """slots: sequences in the batch (default: `default_slots`). max_context: tokens of prompt and output together
        (default: the model's context). max_waiting: requests in the queue. Raises UserError for limits below 1."""
        for name, value in (("slots", slots), ("max context", max_context), ("max waiting", max_waiting)):
            if value is not None and value < 1:
                raise UserError(f"{name} {value} must be at least 1")
        model, self.tokenizer, info = loaded
        length = min(max_context or model.config.seq_length, model.config.seq_length)
        self.slots = slots or default_slots(model, length)
        self.format = ChatFormat.of_folder(info.folder, self.tokenizer)
        self.batch = Batch(
            model,
            self.slots,
            max_context,
            eod_id=self.tokenizer.eod_id,
            vocab_size=self.tokenizer.vocab_size,
            keep_prefixes=keep_prefixes,
            compiled=compiled,
        )
        self.metrics = ServerMetrics(running=lambda: len(self.running), waiting=lambda: len(self.waiting))
        self.waiting: deque[ScheduledRequest] = deque()
        self.running: list[ScheduledRequest] = []
        self._max_waiting = max_waiting
        self._cancelled: list[ScheduledRequest] = []
        self._closing = False
        self._changed = threading.Condition()  # guards `waiting`, `_cancelled` and `_closing`
        self._thread = threading.Thread(target=self._run, name="scheduler", daemon=True)

    @property
    def alive(self) -> bool:
        """Whether the thread runs."""
        return self._thread.is_alive()

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def close(self) -> None:
        """End the thread; requests that run or wait fail."""
        with self._changed:
            self._closing = True
            self._changed.notify()
        if self._thread.is_alive():
            self._thread.join()

    def submit(self, requests: list[ScheduledRequest]) -> None:
        """Queue all requests or none. Raises UserError for one that is invalid, and QueueFull if there is no room."""
        for each in requests:
            self.batch.check(each.request)
            check_stop(each.stop)
        with self._changed:
            if self._closing:
                raise QueueFull("the server is shutting down")
            if len(self.waiting) + len(requests) > self._max_waiting + max(0, self.slots - len(self.running)):
                self.metrics.refused.inc()
                raise QueueFull(f"{len(self.waiting)} requests wait already; try again later")
            self.waiting.extend(requests)
            self._changed.notify()

    def cancel(self, request: ScheduledRequest) -> None:
        """End a request whose output is no longer needed; no effect on one that has ended."""
        with self._changed:
            self._cancelled.append(request)
            self._changed.notify()

    def _run(self) -> None:
        while True:
            with self._changed:
                while not (self.waiting or self.running or self._cancelled or self._closing):
                    self._changed.wait()
                if self._closing:
                    unfinished = [*self.running, *self.waiting]
                    self.running, self.waiting = [], deque()
                    break
                self._drop_cancelled()
                while self.waiting and len(self.running) < self.slots:
                    self._admit(self.waiting.popleft())
            if self.running:
                self._step()
        for each in unfinished:
            each.send(RequestFailed("the server is shutting down"))

    def _drop_cancelled(self) -> None:
        for each in self._cancelled:
            if each in self.waiting:
                self.waiting.remove(each)
            elif each in self.running and each.text is not None:
                self.batch.finish(each.text.generation, "cancelled")
                self.running.remove(each)
        self._cancelled.clear()

    def _admit(self, each: ScheduledRequest) -> None:
        each.text = TextGeneration(self.batch.add(each.request), self.tokenizer, each.prompt, each.stop)
        self.metrics.prompt_tokens.inc(len(each.request.prompt_ids))
        self.running.append(each)

    def _step(self) -> None:
        """One step of the batch; sends its output."""
        try:
            self.batch.step()
        except Exception as error:
            # Out of memory or a damaged model: the running requests fail, later ones may succeed.
            logger.exception("a step failed")
            for each in self.running:
                assert each.text is not None, "running requests have a text"
                self.batch.finish(each.text.generation, "cancelled")
                each.send(RequestFailed(str(error) or type(error).__name__))
            self.running = []
            return
        for each in list(self.running):
            assert each.text is not None, "running requests have a text"
            delta = each.text.take()
            if delta.ids and not each.first_token:
                each.first_token = True
                self.metrics.first_token.observe(time.monotonic() - each.arrived)
            self.metrics.new_tokens.inc(len(delta.ids))
            if each.text.finished:
                self.running.remove(each)
                self.metrics.seconds.observe(time.monotonic() - each.arrived)
            if delta.ids or delta.text or each.text.finished:
                each.send(delta)
