"""What `/metrics` tells, in the form that Prometheus reads."""

from collections.abc import Iterator
from typing import Any

from prometheus_client import CollectorRegistry, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

SECONDS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)
_GAUGES = (
    ("queued", "locret_queue_requests", "requests that wait"),
    ("running", "locret_running_requests", "requests that are read or answered now"),
    ("contexts", "locret_contexts", "stored contexts"),
    ("units", "locret_units", "units that a KV head held at the end of the last answer"),
    (
        "bytes",
        "locret_bytes",
        "bytes in memory of stored contexts and shared beginnings of prompts",
    ),
)
_COUNTERS = (
    ("answered", "locret_answered", "requests answered to the end"),
    ("read", "locret_read", "contexts read to the end"),
    ("cancelled", "locret_cancelled", "requests given up because the client left"),
    ("failed", "locret_failed", "requests that failed"),
    ("refused", "locret_refused", "requests that found the queue full"),
    ("prompt_tokens", "locret_prompt_tokens", "tokens of prompts and their contexts"),
    ("cached_tokens", "locret_cached_tokens", "those of them that had been read before"),
    ("completion_tokens", "locret_completion_tokens", "tokens of answers"),
)


class Metrics:
    """Numbers of a service and of its answers.

    Args:
        service: whose `counts` are told when somebody asks, and which calls `on_first_token`.
    """

    def __init__(self, service: Any) -> None:
        self._registry = CollectorRegistry()
        self._registry.register(_Counts(service))
        first_token = Histogram(
            "locret_first_token_seconds",
            "seconds from a request to the first token of its answer",
            buckets=SECONDS,
            registry=self._registry,
        )
        service.on_first_token = first_token.observe

    def text(self) -> bytes:
        """All numbers now."""
        return generate_latest(self._registry)


class _Counts(Collector):
    def __init__(self, service: Any) -> None:
        self.service = service

    def collect(self) -> Iterator[Metric]:
        counts = self.service.counts
        for name, metric, text in _GAUGES:
            yield GaugeMetricFamily(metric, text, value=getattr(counts, name))
        for name, metric, text in _COUNTERS:
            yield CounterMetricFamily(metric, text, value=getattr(counts, name))
