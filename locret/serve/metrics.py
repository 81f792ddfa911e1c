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
    ("units", "locret_units", "cache units in stored contexts"),
    ("bytes", "locret_bytes", "bytes of stored contexts"),
)
_COUNTERS = (
    ("answered", "locret_answered", "requests answered to the end"),
    ("cancelled", "locret_cancelled", "requests given up because the client left"),
    ("failed", "locret_failed", "requests that failed"),
    ("prompt_tokens", "locret_prompt_tokens", "tokens of prompts"),
    ("completion_tokens", "locret_completion_tokens", "tokens of answers"),
)


class Metrics:
    """Numbers of a service and of its answers.

    Args:
        service: whose `counts` are told when somebody asks.

    Attributes:
        first_token: seconds from a request to its first new text.
    """

    def __init__(self, service: Any) -> None:
        self._registry = CollectorRegistry()
        self._registry.register(_Counts(service))
        self.first_token = Histogram(
            "locret_first_token_seconds",
            "seconds from a request to its first new text",
            buckets=SECONDS,
            registry=self._registry,
        )

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
