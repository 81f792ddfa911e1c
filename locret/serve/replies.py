"""Answers in OpenAI's forms: whole, and as chunks of a stream."""

import json
import time
from typing import Any, Literal

from locret.serve.requests import End, Usage

Kind = Literal["chat", "text"]
DONE = "data: [DONE]\n\n"
_NAMES = {
    "chat": ("chatcmpl-", "chat.completion", "chat.completion.chunk"),
    "text": ("cmpl-", "text_completion", "text_completion"),
}


class Reply:
    """One answer.

    Args:
        kind: of a chat, or of a plain completion.
        id: of the request.
        model: its name.
    """

    def __init__(self, kind: Kind, id: str, model: str) -> None:
        prefix, self._whole, self._chunk = _NAMES[kind]
        self._chats = kind == "chat"
        self._head = {"id": prefix + id, "created": int(time.time()), "model": model}

    def whole(self, text: str, end: End) -> dict[str, Any]:
        """The body of an answer that is not streamed."""
        said = {"message": _assistant(text)} if self._chats else {"text": text}
        choices = [self._choice(said, end.reason)]
        usage = usage_of(end.usage)
        return {"object": self._whole, **self._head, "choices": choices, "usage": usage}

    def opening(self) -> str | None:
        """The first event of a stream, if there is one before any text."""
        return self._event([self._choice({"delta": _assistant("")}, None)]) if self._chats else None

    def piece(self, text: str) -> str:
        """An event with new text."""
        said = {"delta": {"content": text}} if self._chats else {"text": text}
        return self._event([self._choice(said, None)])

    def ending(self, reason: str) -> str:
        """The event that says why the answer ends."""
        said: dict[str, Any] = {"delta": {}} if self._chats else {"text": ""}
        return self._event([self._choice(said, reason)])

    def usage(self, usage: Usage) -> str:
        """The event with the usage, which has no choices."""
        return self._event([], usage=usage_of(usage))

    def _choice(self, said: dict[str, Any], reason: str | None) -> dict[str, Any]:
        return {"index": 0, **said, "logprobs": None, "finish_reason": reason}

    def _event(self, choices: list[dict[str, Any]], **more: Any) -> str:
        return event({"object": self._chunk, **self._head, "choices": choices, **more})


def event(content: dict[str, Any]) -> str:
    """One server-sent event."""
    return f"data: {json.dumps(content, ensure_ascii=False)}\n\n"


def usage_of(usage: Usage) -> dict[str, Any]:
    """OpenAI's counts, and what this answer's cache held in the end: units and bytes."""
    return {
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.completion_tokens,
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
        "prompt_tokens_details": {"cached_tokens": usage.cached_tokens},
        "units": usage.units,
        "bytes": usage.bytes,
    }


def _assistant(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}
