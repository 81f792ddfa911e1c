"""What `/metrics` tells, in the form that Prometheus reads."""

from collections.abc import Iterator
from dataclasses import fields
from typing import Any

from prometheus_client import CollectorRegistry, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

SECONDS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)
_NAMES = {"queued": "queue_requests", "running": "running_requests"}
"""Names of metrics that are not those of their counters."""


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
        for each in fields(counts):
            kind = CounterMetricFamily if each.metadata["sum"] else GaugeMetricFamily
            name, text = _NAMES.get(each.name, each.name), each.metadata["text"]
            yield kind(f"locret_{name}", text, value=getattr(counts, each.name))
