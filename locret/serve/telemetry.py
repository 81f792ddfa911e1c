"""What operators see: one JSON line a request, what was asked for and how it went, never what it
said; and the numbers of `/metrics`, in the form that Prometheus reads.
"""

import json
import logging
import sys
import time
import uuid
from collections.abc import Iterator
from dataclasses import fields
from datetime import UTC, datetime
from typing import Any

from prometheus_client import CollectorRegistry, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from locret.serve.errors import CLIENT_LEFT

LONGEST_PATH = 200
PROBES = ("/health", "/ready", "/ui/")
"""How paths begin that are asked for again and again: by whoever watches the server, and by the
page in a browser. Only their failures are logged."""
_log = logging.getLogger("locret.serve")


class RequestLog:
    """Gives every request an id, and logs it when it has ended."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        state = scope.setdefault("state", {})
        state.setdefault("id", uuid.uuid4().hex)
        began, status = time.monotonic(), CLIENT_LEFT  # where nothing is sent, the client had left

        async def sending(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message["headers"], (b"x-request-id", state["id"].encode())]
            await send(message)

        try:
            await self.app(scope, receive, sending)
        except Exception:
            status = 500
            raise
        finally:
            probe = scope["path"].startswith(PROBES) and status == 200
            line = _line(scope, status, time.monotonic() - began)
            _log.log(logging.DEBUG if probe else logging.INFO, "request", extra={"fields": line})


def _line(scope: Scope, status: int, seconds: float) -> dict[str, Any]:
    state = scope["state"]
    line = {
        "id": state["id"],
        "method": scope["method"],
        "path": scope["path"][:LONGEST_PATH],
        "status": status,
        "seconds": round(seconds, 3),
    }
    usage = state.get("usage")
    if usage is not None:
        line |= usage.tokens
    return line


class JsonLines(logging.Formatter):
    """Every record as one line of JSON; what an exception says is one of its strings."""

    def format(self, record: logging.LogRecord) -> str:
        line = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "message": record.getMessage(),
            **getattr(record, "fields", {}),
        }
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line)


def log_to_stderr() -> None:
    """Let this package and uvicorn log JSON lines to standard error."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonLines())
    for name, level in (("locret.serve", logging.INFO), ("uvicorn", logging.WARNING)):
        logger = logging.getLogger(name)
        logger.handlers, logger.propagate = [handler], False
        logger.setLevel(level)


# ---- numbers -------------------------------------------------------------------------------------

SECONDS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)
_NAMES = {"queued": "queue_requests", "running": "running_requests"}
"""Names of metrics that are not those of their counters."""


class Metrics:
    """Numbers of a service, whose `counts` are told when somebody asks, and of its answers, whose
    first tokens it tells (`on_first_token`)."""

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
