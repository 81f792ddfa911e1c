"""Numbers about the service, for its operators."""

from dataclasses import dataclass, field
from typing import Any


def _now(text: str) -> Any:
    return field(default=0, metadata={"text": text, "sum": False})


def _sum(text: str) -> Any:
    return field(default=0, metadata={"text": text, "sum": True})


@dataclass(frozen=True)
class Counters:
    """What a service does now, and what it did since it began, as `/metrics` tells it."""

    queued: int = _now("requests that wait")
    running: int = _now("requests that are read or answered now")
    contexts: int = _now("stored contexts")
    units: int = _now("units that a KV head held at the end of the last answer")
    bytes: int = _now("bytes in memory of stored contexts and shared beginnings of prompts")
    answered: int = _sum("requests answered to the end")
    read: int = _sum("contexts read to the end")
    cancelled: int = _sum("requests given up because the client left")
    failed: int = _sum("requests that failed")
    refused: int = _sum("requests that found the queue full")
    prompt_tokens: int = _sum("tokens of prompts and their contexts")
    cached_tokens: int = _sum("those of them that had been read before")
    completion_tokens: int = _sum("tokens of answers")
