"""One thread that owns the model: requests come in from any thread, and what is written goes back piece by piece."""

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
from megatronish.inference.batch import Batch, FinishReason, Request, TokenScore
from megatronish.inference.chat_format import ChatFormat
from megatronish.inference.generate import TextGeneration
from megatronish.inference.load import Loaded
from megatronish.inference.prompt import Prompt
from megatronish.inference.server.metrics import Metrics
from megatronish.model.kv_cache import kv_cache_bytes
from megatronish.model.transformer import Transformer
from megatronish.ops.linear import FEW_ROWS

logger = logging.getLogger(__name__)


MOST_SLOTS = FEW_ROWS  # on CPUs a text does not depend on its neighbours up to so many
CACHE_SHARE = 0.25  # of the free memory, where nobody says how many slots there are


def fitting_slots(model: Transformer, length: int) -> int:
    """How many sequences of `length` tokens are written side by side by default: what a quarter of the free memory holds,
    from 1 to MOST_SLOTS."""
    weight = next(model.parameters())
    if weight.device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(weight.device)
    else:
        free = psutil.virtual_memory().available
    each = kv_cache_bytes(model.config, 1, length, weight.element_size())
    return max(1, min(MOST_SLOTS, int(CACHE_SHARE * free / each)))


class Busy(Exception):
    """The queue is full."""


@dataclass(frozen=True)
class Event:
    """What has happened to a job since the last event: text, ids and their scores; at its end the reason, or what went
    wrong."""

    text: str = ""
    ids: tuple[int, ...] = ()
    scores: tuple[TokenScore, ...] = ()
    finish_reason: FinishReason | None = None
    error: str | None = None

    @property
    def is_last(self) -> bool:
        """Whether nothing follows."""
        return self.finish_reason is not None or self.error is not None


@dataclass(eq=False)
class Job:
    """A request on its way. `send` is called in the scheduler's thread."""

    request: Request
    prompt: Prompt
    stop: tuple[str, ...]
    send: Callable[[Event], None]
    arrived: float = field(default_factory=time.monotonic)
    text: TextGeneration | None = None
    sent: int = 0  # ids


class Scheduler:
    """Runs a `Batch` in a thread of its own. Call `start` before the first job and `close` at the end."""

    def __init__(
        self, loaded: Loaded, *, slots: int | None = None, max_context: int | None = None, max_waiting: int = 64,
        keep_prefixes: bool = False, compiled: bool = False,
    ) -> None:  # fmt: skip
        """slots: sequences written side by side, by default `fitting_slots`. max_context: tokens of prompt and answer, the
        model's context by default. max_waiting: jobs beyond those that run. Raises UserError for limits below 1."""
        for name, value in (
            ("slots", 1 if slots is None else slots),
            ("max context", 1 if max_context is None else max_context),
            ("max waiting", max_waiting),
        ):
            if value < 1:
                raise UserError(f"{name} {value} must be at least 1")
        length = min(max_context or loaded.model.config.seq_length, loaded.model.config.seq_length)
        slots = fitting_slots(loaded.model, length) if slots is None else slots
        self.tokenizer = loaded.tokenizer
        self.format = ChatFormat.of_folder(loaded.info.folder, loaded.tokenizer)
        self.metrics = Metrics(running=lambda: len(self._jobs), waiting=lambda: len(self._arrived))
        self._batch = Batch(
            loaded.model,
            slots,
            max_context,
            eod_id=loaded.tokenizer.eod_id,
            vocab_size=loaded.tokenizer.vocab_size,
            keep_prefixes=keep_prefixes,
            compiled=compiled,
        )
        self._slots, self._max_waiting = slots, max_waiting
        self._changed = threading.Condition()
        self._arrived: deque[Job] = deque()
        self._cancelled: list[Job] = []
        self._jobs: list[Job] = []
        self._closing = False
        self._thread = threading.Thread(target=self._serve, name="scheduler", daemon=True)

    @property
    def slots(self) -> int:
        """Sequences written side by side."""
        return self._slots

    @property
    def max_context(self) -> int:
        """Tokens that prompt and answer may have together."""
        return self._batch.max_length

    @property
    def device(self) -> object:
        """Where random numbers are drawn."""
        return self._batch.device

    @property
    def cache_bytes(self) -> int:
        """Memory of the key/value cache."""
        return self._batch.cache_bytes

    @property
    def alive(self) -> bool:
        """Whether the thread runs."""
        return self._thread.is_alive()

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def close(self) -> None:
        """End what runs, with an error to whoever waits for it, and the thread."""
        with self._changed:
            self._closing = True
            self._changed.notify()
        if self._thread.is_alive():
            self._thread.join()

    def check(self, request: Request, stop: tuple[str, ...]) -> None:
        """Raise UserError for a request that cannot be served."""
        self._batch.check(request)
        if any(not text for text in stop):
            raise UserError("a stop string is empty: leave it out, or give the text to stop at")

    def submit(self, jobs: list[Job]) -> None:
        """Queue checked jobs, all or none. Raises Busy where the queue has no room for them."""
        with self._changed:
            if self._closing:
                raise Busy("the server is shutting down")
            if len(self._arrived) + len(jobs) > self._max_waiting + max(0, self._slots - len(self._jobs)):
                self.metrics.refused.inc()
                raise Busy(f"{len(self._arrived)} requests wait already; try again later")
            self._arrived.extend(jobs)
            self._changed.notify()

    def cancel(self, job: Job) -> None:
        """Nobody waits for this job any more. Nothing happens to one that has ended."""
        with self._changed:
            self._cancelled.append(job)
            self._changed.notify()

    def _serve(self) -> None:
        while True:
            with self._changed:
                while not (self._arrived or self._jobs or self._cancelled or self._closing):
                    self._changed.wait()
                if self._closing:
                    lost = [*self._jobs, *self._arrived]
                    self._jobs, self._arrived = [], deque()
                    break
                self._take_in()
            self._advance()
        for job in lost:
            job.send(Event(error="the server is shutting down"))

    def _take_in(self) -> None:
        """Drop what was cancelled, and give free slots to what has waited longest. Called with the lock."""
        for job in self._cancelled:
            if job in self._arrived:
                self._arrived.remove(job)
            elif job in self._jobs and job.text is not None:
                self._batch.finish(job.text.generation, "cancelled")
                self._jobs.remove(job)
        self._cancelled.clear()
        while self._arrived and len(self._jobs) < self._slots:
            job = self._arrived.popleft()
            job.text = TextGeneration(self._batch.add(job.request), self.tokenizer, job.prompt, job.stop)
            self.metrics.prompt_tokens.inc(len(job.request.prompt_ids))
            self._jobs.append(job)

    def _advance(self) -> None:
        """One step of the batch, and what came of it to whom it belongs."""
        if not self._jobs:
            return
        try:
            self._batch.step()
        except Exception as error:
            # A bad model or no memory: those it hit are told, and the next ones may do better.
            logger.exception("a step failed")
            for job in self._jobs:
                assert job.text is not None, "running jobs have a text"
                self._batch.finish(job.text.generation, "cancelled")
                job.send(Event(error=str(error) or type(error).__name__))
            self._jobs = []
            return
        for job in list(self._jobs):
            event = self._event(job)
            if event is None:
                continue
            if event.is_last:
                self._jobs.remove(job)
                self.metrics.seconds.observe(time.monotonic() - job.arrived)
            job.send(event)

    def _event(self, job: Job) -> Event | None:
        """What is new of a job, None if nothing is."""
        assert job.text is not None, "running jobs have a text"
        generation = job.text.generation
        text = job.text.take()
        ids = tuple(generation.new_ids[job.sent :])
        scores = tuple(generation.scores[job.sent :])
        if ids and job.sent == 0:
            self.metrics.first_token.observe(time.monotonic() - job.arrived)
        job.sent += len(ids)
        self.metrics.new_tokens.inc(len(ids))
        if not (ids or text or job.text.finished):
            return None
        return Event(text, ids, scores, generation.finish_reason if job.text.finished else None)
