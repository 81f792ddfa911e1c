"""Errors as OpenAI's clients expect them: a status, and one sentence in {"error": {...}}."""

import logging
import math
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from locret.serve.requests import (
    Cancelled,
    Failed,
    QueueFull,
    RepeatsContext,
    TooLong,
    UnknownContext,
)

CLIENT_LEFT = 499
"""What the log calls the status of a request whose client left."""
INTERNAL = "the server failed to answer; its log says why"
STOPPING = "the server is stopping; ask again"
_log = logging.getLogger("locret.serve")


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


def refusal_of(error: Exception) -> Refused:
    """What a client is told of an error of the service."""
    if isinstance(error, Refused):
        return error
    if isinstance(error, QueueFull):
        seconds = str(max(1, math.ceil(error.retry_after)))
        return Refused(429, str(error), "queue_full", {"Retry-After": seconds})
    if isinstance(error, TooLong):
        return Refused(400, str(error), "context_length_exceeded")
    if isinstance(error, RepeatsContext):
        return Refused(400, str(error))
    if isinstance(error, Failed):
        return Refused(500, str(error), "failed")
    if isinstance(error, UnknownContext):
        return Refused(404, str(error), "context_not_found")
    if isinstance(error, Cancelled):
        return Refused(503, STOPPING, "stopping", {"Retry-After": "1"})
    if isinstance(error, ClientDisconnect):
        return Refused(CLIENT_LEFT, "the client left", "client_left")
    if isinstance(error, HTTPException):
        return Refused(error.status_code, lower(error.detail), headers=dict(error.headers or {}))
    _log.error("a request failed", exc_info=error)
    return Refused(500, INTERNAL, "internal_error")


def body_of(refused: Refused) -> dict[str, Any]:
    """The JSON body of a refusal."""
    return {
        "error": {
            "message": refused.message,
            "type": _type_of(refused.status),
            "param": None,
            "code": refused.code,
        }
    }


def install(app: FastAPI) -> None:
    """Let all errors of an app be answered so."""

    async def answer(request: Request, error: Exception) -> JSONResponse:
        refused = refusal_of(error)
        return JSONResponse(body_of(refused), refused.status, headers=refused.headers)

    # Each by name: behind the handler of Exception an error goes on, to uvicorn.
    ours = (Refused, QueueFull, ValueError, RuntimeError, Cancelled, OSError, HTTPException)
    for kind in (*ours, ClientDisconnect, Exception):
        app.add_exception_handler(kind, answer)


def _type_of(status: int) -> str:
    if status == 401:
        return "authentication_error"
    if status == 429:
        return "rate_limit_error"
    return "invalid_request_error" if status < 500 else "server_error"


def lower(text: str) -> str:
    """A sentence as it goes on behind a colon."""
    return text[:1].lower() + text[1:]
