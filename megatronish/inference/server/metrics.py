"""The metrics of the server in Prometheus' text format."""

from __future__ import annotations

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

_FIRST_TOKEN = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
_SECONDS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)


class ServerMetrics:
    """The metrics of one server, in a separate registry."""

    def __init__(self, *, running: Callable[[], int], waiting: Callable[[], int]) -> None:
        registry = self._registry = CollectorRegistry()
        name = "megatronish_"
        self.requests = Counter(name + "requests", "HTTP requests", ["path", "status"], registry=registry)
        self.refused = Counter(name + "refused", "Requests refused because the queue was full", registry=registry)
        self.prompt_tokens = Counter(name + "prompt_tokens", "Tokens of prompts", registry=registry)
        self.new_tokens = Counter(name + "generated_tokens", "Tokens written", registry=registry)
        self.first_token = Histogram(
            name + "first_token_seconds", "From arrival to the first token", buckets=_FIRST_TOKEN, registry=registry
        )
        self.seconds = Histogram(
            name + "request_seconds", "From arrival to the end", buckets=_SECONDS, registry=registry
        )
        Gauge(name + "running", "Sequences being written", registry=registry).set_function(running)
        Gauge(name + "waiting", "Sequences in the queue", registry=registry).set_function(waiting)

    def text(self) -> bytes:
        """All metrics."""
        return generate_latest(self._registry)
