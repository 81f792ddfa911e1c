"""What becomes of a request: its answer in OpenAI's forms, whole or as a stream, given up when the
client leaves; or its error, one sentence in {"error": {...}}; and its line in the log, which says
what was asked for and how it went, never what was said.
"""

import asyncio
import contextlib
import json
import logging
import math
import sys
import time
import uuid
from collections.abc import AsyncIterator, Awaitable
from datetime import UTC, datetime
from typing import Any, Literal, TypeVar

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from locret.serve.requests import (
    Cancelled,
    Failed,
    Piece,
    QueueFull,
    RepeatsContext,
    Stopping,
    TooLong,
    UnknownContext,
    Usage,
)

_log = logging.getLogger("locret.serve")

# ---- errors --------------------------------------------------------------------------------

CLIENT_LEFT = 499
"""What the log calls the status of a request whose client left."""
_REFUSALS = {
    TooLong: (400, "context_length_exceeded"),
    RepeatsContext: (400, None),
    UnknownContext: (404, "context_not_found"),
    Failed: (500, "failed"),
}
"""Status and code of errors of the service whose text is for clients."""
_OF_ADDRESSES = {
    "Not Found": "there is nothing at this address; check its path, slashes included",
    "Method Not Allowed": "this address does not take this method",
}
"""What clients are told of requests that meet no endpoint, by what Starlette says of them."""


class Refused(Exception):
    """A request that cannot be answered.

    Args:
        status: of HTTP.
        message: one sentence: what was received, what is expected.
        code: a name for programs, such as "context_not_found".
        headers: of the response.
    """

    def __init__(
        self,
        status: int,
        message: str,
        code: str | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.code = status, message, code
        self.headers = headers or {}

    @property
    def body(self) -> dict[str, Any]:
        """What the client is told, as OpenAI says it."""
        kind = "invalid_request_error" if self.status < 500 else "server_error"
        kind = {401: "authentication_error", 429: "rate_limit_error"}.get(self.status, kind)
        told = {"message": self.message, "type": kind, "param": None, "code": self.code}
        return {"error": told}


def refusal_of(error: Exception) -> Refused:
    """What a client is told of an error of the service."""
    if isinstance(error, Refused):
        return error
    if isinstance(error, QueueFull):
        seconds = str(max(1, math.ceil(error.retry_after)))
        return Refused(429, str(error), "queue_full", {"Retry-After": seconds})
    if type(error) in _REFUSALS:
        status, code = _REFUSALS[type(error)]
        return Refused(status, str(error), code)
    if isinstance(error, Stopping | Cancelled):
        return Refused(503, "the server is stopping; ask again", "stopping", {"Retry-After": "1"})
    if isinstance(error, ClientDisconnect):
        return Refused(CLIENT_LEFT, "the client left", "client_left")
    if isinstance(error, HTTPException):
        told = _OF_ADDRESSES.get(error.detail) or lower(error.detail)
        return Refused(error.status_code, told, headers=dict(error.headers or {}))
    _log.error("a request failed", exc_info=error)
    return Refused(500, "the server failed to answer; its log says why", "internal_error")


def error_reply(error: Exception) -> JSONResponse:
    """The answer to a request that ended in an error."""
    refused = refusal_of(error)
    return JSONResponse(refused.body, refused.status, headers=refused.headers)


def answer_errors(app: FastAPI) -> None:
    """Let all errors of an app be answered so."""

    async def answer(request: Request, error: Exception) -> JSONResponse:
        return error_reply(error)

    # Each by name: behind the handler of Exception an error goes on, to uvicorn.
    ours = (Refused, QueueFull, Stopping, Cancelled, ValueError, RuntimeError, OSError)
    for kind in (*ours, HTTPException, ClientDisconnect, Exception):
        app.add_exception_handler(kind, answer)


def lower(text: str) -> str:
    """A sentence as it goes on behind a colon."""
    return text[:1].lower() + text[1:]


# ---- answers --------------------------------------------------------------------------------

Kind = Literal["chat", "text"]
DONE = "data: [DONE]\n\n"
_NAMES = {
    "chat": ("chatcmpl-", "chat.completion", "chat.completion.chunk"),
    "text": ("cmpl-", "text_completion", "text_completion"),
}


class Reply:
    """One answer of the service on its way to the client, of a chat or of a plain completion."""

    def __init__(self, kind: Kind, request: Request, answer: Any, model: str) -> None:
        prefix, self._whole, self._chunk = _NAMES[kind]
        self._chats = kind == "chat"
        id = prefix + request.state.id
        self._head = {"id": id, "created": int(time.time()), "model": model}
        self._request, self._answer = request, answer

    async def whole(self) -> Response:
        """The answer as one JSON object, once it is complete. Raises Refused: the client left."""
        try:
            *pieces, end = await while_there(self._request, self._answer.aall())
        finally:
            self.cancel()
        self._request.state.usage = end.usage  # which the log tells
        text = "".join(piece.text for piece in pieces)
        said = {"message": _assistant(text)} if self._chats else {"text": text}
        choices, usage = [_choice(said, end.reason)], usage_of(end.usage)
        content = {"object": self._whole, **self._head, "choices": choices, "usage": usage}
        return JSONResponse(content)

    async def events(self, tells_usage: bool) -> AsyncIterator[str]:
        """The answer as server-sent events, the last with its usage if the client asks for it."""
        if self._chats:
            yield self._event(_choice({"delta": _assistant("")}))
        try:
            async for each in self._answer.aevents():
                if isinstance(each, Piece):
                    said = {"delta": {"content": each.text}} if self._chats else {"text": each.text}
                    yield self._event(_choice(said))
                    continue
                self._request.state.usage = each.usage  # which the log tells
                yield self._event(
                    _choice({"delta": {}} if self._chats else {"text": ""}, each.reason)
                )
                if tells_usage:
                    yield self._event(usage=usage_of(each.usage))
        except Exception as error:  # the status is sent already, so that the stream has to tell
            yield event(refusal_of(error).body)
        yield DONE

    def cancel(self) -> None:
        """Give the answer up, if it has not ended."""
        self._answer.cancel()

    def _event(self, *choices: dict[str, Any], **more: Any) -> str:
        return event({"object": self._chunk, **self._head, "choices": choices, **more})


class EventStream(StreamingResponse):
    """The events of a reply, whose answer is cancelled however this ends."""

    def __init__(self, reply: Reply, tells_usage: bool) -> None:
        # Proxies that collect what they pass on would turn a stream into one piece.
        headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
        events = reply.events(tells_usage)
        super().__init__(events, media_type="text/event-stream", headers=headers)
        self.reply = reply

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self.reply.cancel()


def _choice(said: dict[str, Any], reason: str | None = None) -> dict[str, Any]:
    return {"index": 0, **said, "logprobs": None, "finish_reason": reason}


def _assistant(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


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


Result = TypeVar("Result")


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


# ---- the log --------------------------------------------------------------------------------

LONGEST_PATH = 200
PROBES = ("/health", "/ready", "/ui/")
"""How paths begin that are asked for again and again: by whoever watches the server, and by the
page in a browser. Only their failures are logged."""


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
    return line | (state["usage"].tokens if "usage" in state else {})


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
