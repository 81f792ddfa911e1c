"""What is asked of the service and what comes back, and its numbers for operators: plain data."""

import re
from dataclasses import dataclass, field
from typing import Any, Literal

ID = re.compile(r"ctx_[A-Za-z0-9_-]{22}")
"""How ids of contexts look. Nothing else ever becomes a path."""


@dataclass(frozen=True)
class Ask:
    """A request for one answer.

    Attributes:
        prompt: token ids of the whole prompt, or with `context` of what follows the context.
        context: id of a stored context.
        shared: leading tokens of `prompt` that are worth keeping for later requests, such as all
            messages but the last; 0 = none.
        max_tokens: most tokens of the answer; None = as the service says.
        temperature: 0 = greedy.
        top_p: of nucleus sampling; 1 = all tokens.
        seed: the same one gives the same answer to the same request; None = any.
        stop: strings that end the answer and are not part of it.
        ignore_eos: go on to `max_tokens` whatever the model says, as for measurements.
    """

    prompt: list[int]
    context: str | None = None
    shared: int = 0
    max_tokens: int | None = None
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    ignore_eos: bool = False


@dataclass(frozen=True)
class Usage:
    """What a request took.

    Attributes:
        prompt_tokens: of the context and the prompt.
        cached_tokens: those of them that had been read before.
        completion_tokens: of the answer, the token that ended it included.
        units: that a KV head holds at the end, on average.
        bytes: of keys, values and source positions at the end.
    """

    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int
    units: int
    bytes: int

    @property
    def tokens(self) -> dict[str, int]:
        """The counts of tokens by name."""
        names = ("prompt_tokens", "cached_tokens", "completion_tokens")
        return {name: getattr(self, name) for name in names}


@dataclass(frozen=True)
class Piece:
    """New text of an answer: whole characters, and nothing of a stop string."""

    text: str


@dataclass(frozen=True)
class End:
    """The end of an answer: "stop" = it was complete or met a stop string, "length" = cut."""

    reason: Literal["stop", "length"]
    usage: Usage


@dataclass(frozen=True)
class ContextInfo:
    """What is known of a stored context.

    Attributes:
        id: names it in requests.
        tokens: that were read.
        units: that a KV head holds of them, on average.
        bytes: of its storage.
        slots: that it takes of the model's window; 0 = not known.
    """

    id: str
    tokens: int
    units: int
    bytes: int
    slots: int = 0


class QueueFull(Exception):
    """Too many requests wait, or the service is closing.

    Attributes:
        retry_after: seconds after which it is worth trying again.
    """

    def __init__(self, message: str, retry_after: float) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class TooLong(ValueError):
    """A request that cannot fit; the message says what would."""


class UnknownContext(ValueError):
    """No context of this id is stored."""


class RepeatsContext(ValueError):
    """The prompt begins with all of the context that it is about."""


class Failed(RuntimeError):
    """The request failed, which is logged; says why in one sentence."""


class Cancelled(Exception):
    """The request was cancelled before its end."""


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
