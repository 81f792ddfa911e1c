"""Answers in OpenAI's forms on their way to the client: whole or as chunks of a stream, and given
up when the client leaves.
"""

import asyncio
import contextlib
import json
import time
from collections.abc import AsyncIterator, Awaitable
from typing import Any, Literal, TypeVar

from fastapi import Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from locret.serve.errors import CLIENT_LEFT, Refused, body_of, refusal_of
from locret.serve.requests import End, Piece, Usage

Kind = Literal["chat", "text"]
DONE = "data: [DONE]\n\n"
_NAMES = {
    "chat": ("chatcmpl-", "chat.completion", "chat.completion.chunk"),
    "text": ("cmpl-", "text_completion", "text_completion"),
}


class Reply:
    """One answer, of a chat or of a plain completion; `id` is the request's."""

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


# ---- on their way --------------------------------------------------------------------------------

Result = TypeVar("Result")


class EventStream(StreamingResponse):
    """Server-sent events of an answer of the service, which is cancelled however this ends."""

    def __init__(self, request: Request, answer: Any, reply: Reply, tells_usage: bool) -> None:
        # Proxies that collect what they pass on would turn a stream into one piece.
        headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
        events = _events(request, answer, reply, tells_usage)
        super().__init__(events, media_type="text/event-stream", headers=headers)
        self.answer = answer

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self.answer.cancel()


async def whole(request: Request, answer: Any, reply: Reply) -> Response:
    """The answer as one JSON object, once it is complete."""
    try:
        text, end = await while_there(request, _collected(request, answer))
    finally:
        answer.cancel()
    return JSONResponse(reply.whole(text, end))


async def while_there(request: Request, work: Awaitable[Result]) -> Result:
    """The result of `work`, which is cancelled when the client leaves. Raises Refused: the client
    left."""
    working = asyncio.ensure_future(work)
    leaving = asyncio.ensure_future(_left(request))
    try:
        await asyncio.wait({working, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise Refused(CLIENT_LEFT, "the client left", "client_left")
        return working.result()
    finally:
        for task in (working, leaving):
            task.cancel()
        with contextlib.suppress(asyncio.CancelledError, Exception):
            await asyncio.gather(working, leaving, return_exceptions=True)


async def _left(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def _collected(request: Request, answer: Any) -> tuple[str, End]:
    *pieces, end = await answer.aall()
    assert isinstance(end, End)
    request.state.usage = end.usage  # which the log tells
    return "".join(piece.text for piece in pieces if isinstance(piece, Piece)), end


async def _events(
    request: Request, answer: Any, reply: Reply, tells_usage: bool
) -> AsyncIterator[str]:
    opening = reply.opening()
    if opening:
        yield opening
    try:
        async for each in answer.aevents():
            if isinstance(each, Piece):
                yield reply.piece(each.text)
                continue
            request.state.usage = each.usage  # which the log tells
            yield reply.ending(each.reason)
            if tells_usage:
                yield reply.usage(each.usage)
    except Exception as error:  # the status is sent already, so that the stream has to tell
        yield event(body_of(refusal_of(error)))
    yield DONE
