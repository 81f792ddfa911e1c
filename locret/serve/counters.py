"""Numbers about the service, for its operators."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Counters:
    """What a service did since it began, and what it does now.

    Attributes:
        queued: requests that wait.
        running: requests that are worked on.
        answered, read: answers and contexts that came to their end.
        cancelled, failed, refused: requests that did not; refused ones found the queue full.
        prompt_tokens, cached_tokens, completion_tokens: of answers that came to their end.
        contexts: stored ones.
        units: that a KV head held at the end of the last answer, on average.
        bytes: of stored contexts in memory, and of kept beginnings of prompts.
    """

    queued: int = 0
    running: int = 0
    answered: int = 0
    read: int = 0
    cancelled: int = 0
    failed: int = 0
    refused: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: int = 0
    contexts: int = 0
    units: int = 0
    bytes: int = 0
