"""Metrics for Prometheus: load, tokens, and how long clients wait for them."""

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

SECONDS = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30, 60)


class Metrics:
    """One registry for each server, so two servers in one process don't share numbers."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self._running = self._gauge("requests_running", "Requests that the engine works on")
        self._queued = self._gauge("requests_queued", "Requests that wait for the engine")
        self._kv = self._gauge("kv_cache_used_ratio", "Share of the key-value cache in use, 0 to 1")
        self._prompt = self._counter("prompt_tokens", "Prompt tokens of admitted requests")
        self._generated = self._counter("generated_tokens", "Tokens sent to clients")
        self._requests = self._counter("http_requests", "Answered requests", ["route", "status"])
        self._refused = self._counter("requests_refused", "Requests turned away because the queue was full")
        self._first = self._histogram("time_to_first_token_seconds", "From admission to the first token")
        self._between = self._histogram("time_between_tokens_seconds", "Between two tokens of one request")

    def load(self, *, running: int, queued: int) -> None:
        self._running.set(running)
        self._queued.set(queued)

    def kv_cache(self, used: float) -> None:
        self._kv.set(used)

    def prompt(self, tokens: int) -> None:
        self._prompt.inc(tokens)

    def token(self, seconds: float, *, first: bool) -> None:
        self._generated.inc()
        (self._first if first else self._between).observe(seconds)

    def refused(self) -> None:
        self._refused.inc()

    def answered(self, route: str, status: int) -> None:
        self._requests.labels(route=route, status=str(status)).inc()

    def text(self) -> bytes:
        return generate_latest(self.registry)

    def _gauge(self, name: str, about: str) -> Gauge:
        return Gauge(f"mixlaunch_{name}", about, registry=self.registry)

    def _counter(self, name: str, about: str, labels: list[str] | None = None) -> Counter:
        return Counter(f"mixlaunch_{name}", about, labels or [], registry=self.registry)

    def _histogram(self, name: str, about: str) -> Histogram:
        return Histogram(f"mixlaunch_{name}", about, registry=self.registry, buckets=SECONDS)
