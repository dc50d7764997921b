"""Prometheus metrics of the server, in the shapes that vLLM made customary, under our own prefix."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0)


class Metrics:
    """One set of metrics per server, in a registry of its own."""

    def __init__(self, model: str) -> None:
        self.registry = CollectorRegistry()
        registry = self.registry

        def gauge(name: str, text: str) -> Gauge:
            return Gauge(f"sparseline_{name}", text, ["model_name"], registry=registry).labels(model)

        def histogram(name: str, text: str) -> Histogram:
            metric = Histogram(f"sparseline_{name}", text, ["model_name"], registry=registry, buckets=_SECONDS)
            return metric.labels(model)

        def counter(name: str, text: str) -> Counter:
            return Counter(f"sparseline_{name}", text, ["model_name"], registry=registry).labels(model)

        self.running = gauge("num_requests_running", "requests in the batch")
        self.waiting = gauge("num_requests_waiting", "requests that wait for a place in the batch")
        self.prompt_tokens = counter("prompt_tokens_total", "prompt tokens processed")
        self.generated_tokens = counter("generation_tokens_total", "tokens sampled")
        self.first_token = histogram("time_to_first_token_seconds", "from the request's arrival to its first token")
        self.duration = histogram("e2e_request_latency_seconds", "from the request's arrival to its last token")
        requests = Counter(
            "sparseline_request_total",
            "requests that ended, by reason (stop, length, abort)",
            ["model_name", "finished_reason"],
            registry=registry,
        )
        for reason in ("stop", "length", "abort"):
            requests.labels(model, reason)  # a series that begins at 0: without it the first request shows no increase
        self.requests = _Requests(requests, model)

    def text(self) -> bytes:
        """The exposition format."""
        return generate_latest(self.registry)


class _Requests:
    def __init__(self, counter: Counter, model: str) -> None:
        self._counter, self._model = counter, model

    def labels(self, reason: str) -> Counter:
        return self._counter.labels(self._model, reason)
