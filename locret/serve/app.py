"""The HTTP application: OpenAI's endpoints, contexts, and what operators look at.

POST /v1/chat/completions, /v1/completions    answers; "context": id asks a stored context
POST /v1/contexts                             read a text, messages or a file once
GET, DELETE /v1/contexts/ID, GET /v1/contexts
GET /v1/models, /metrics
GET /health, /ready, POST /load_model         without a key
/ui                                           the page, if it is asked for (`locret.serve.page`)
"""

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Annotated, Any

from anyio import to_thread
from fastapi import APIRouter, Depends, FastAPI, Request
from fastapi.responses import JSONResponse, Response

from locret.serve import errors
from locret.serve.body import check_key, read_json, read_upload
from locret.serve.errors import Refused
from locret.serve.fields import (
    DEFAULT_COMPLETION_TOKENS,
    ChatFields,
    CompletionFields,
    ContextFields,
    Message,
    Sampling,
    fields_of,
)
from locret.serve.messages import Prompts
from locret.serve.replies import EventStream, Kind, Reply, event, while_there, whole
from locret.serve.requests import Ask, TooLong, UnknownContext
from locret.serve.telemetry import Metrics, RequestLog

UPLOAD_LIMIT = 64 * 2**20
"""Bytes of a body."""


@dataclass
class Server:
    """What the endpoints share, by the arguments of `make_app`."""

    service: Any
    prompts: Prompts
    metrics: Metrics
    name: str
    api_key: str | None
    upload_limit: int
    page: Any = None
    """Gradio's application at /ui; None = there is none."""

    def check_model(self, asked: str | None) -> None:
        """Raises Refused: another model than the one that is served."""
        if asked and asked != self.name:
            message = f"model {asked[:80]!r} is not served here; ask for {self.name!r}"
            raise Refused(404, message, "model_not_found")


def make_app(
    service: Any,
    tokenizer: Any,
    *,
    name: str,
    api_key: str | None = None,
    upload_limit: int = UPLOAD_LIMIT,
    drain_seconds: float = 60.0,
    ui: bool = False,
) -> FastAPI:
    """The application. It starts the service with itself, and closes it in the end.

    Args:
        service: `locret.serve.service.Service`, not started yet.
        tokenizer: of the model.
        name: of the model, as clients ask for it.
        api_key: what clients must send; None = nothing.
        upload_limit: bytes of a body; more is refused.
        drain_seconds: how long answers may go on when the server stops.
        ui: with the page at /ui, which needs Gradio.
    """

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        service.start()
        try:
            yield
        finally:
            await to_thread.run_sync(lambda: service.close(drain=True, seconds=drain_seconds))

    app = FastAPI(lifespan=lifespan, docs_url=None, redoc_url=None, openapi_url=None)
    prompts, metrics = Prompts(tokenizer), Metrics(service)
    app.state.server = Server(service, prompts, metrics, name, api_key, upload_limit)
    errors.install(app)
    app.include_router(open_to_all)
    app.include_router(with_key)
    app.add_middleware(RequestLog)
    if ui:
        from locret.serve.page import mount  # Gradio, which takes seconds to import

        mount(app)
    return app


def _server(request: Request) -> Server:
    server: Server = request.app.state.server
    return server


Served = Annotated[Server, Depends(_server)]


def _check_key(request: Request, server: Served) -> None:
    check_key(request, server.api_key)


open_to_all = APIRouter()
with_key = APIRouter(dependencies=[Depends(_check_key)])


# ---- what operators look at ----------------------------------------------------------------------


@open_to_all.get("/health")
async def health() -> dict[str, str]:
    """The process answers."""
    return {"status": "ok"}


@open_to_all.get("/ready")
async def ready(server: Served) -> JSONResponse:
    """It takes requests."""
    if server.service.ready:
        return JSONResponse({"status": "ready"})
    raise Refused(503, "the server is not ready; ask again", "not_ready", {"Retry-After": "1"})


@open_to_all.post("/load_model")
async def load_model() -> Response:
    """`transformers chat` asks for the model to be loaded, which it is."""
    return Response(event({"status": "ready", "cached": True}), media_type="text/event-stream")


@with_key.get("/metrics")
async def metrics(server: Served) -> Response:
    """Numbers for Prometheus."""
    content = await to_thread.run_sync(server.metrics.text)
    return Response(content, media_type="text/plain; version=0.0.4; charset=utf-8")


@with_key.get("/v1/models")
async def models(server: Served) -> dict[str, Any]:
    """The one model that is served."""
    return {"object": "list", "data": [_model(server)]}


@with_key.get("/v1/models/{name:path}")
async def model(name: str, server: Served) -> dict[str, Any]:
    """The model of that name."""
    server.check_model(name)
    return _model(server)


def _model(server: Server) -> dict[str, Any]:
    return {"id": server.name, "object": "model", "created": 0, "owned_by": "locret"}


# ---- completions ---------------------------------------------------------------------------------


@with_key.post("/v1/chat/completions")
async def chat(request: Request, server: Served) -> Response:
    """Answer a conversation, or a question about a context."""
    fields = fields_of(ChatFields, await read_json(request, server.upload_limit))
    server.check_model(fields.model)
    ask = await to_thread.run_sync(_chat_ask, server.prompts, fields)
    return await _answered(request, server, fields, ask, "chat")


@with_key.post("/v1/completions")
async def completion(request: Request, server: Served) -> Response:
    """Go on with a text."""
    fields = fields_of(CompletionFields, await read_json(request, server.upload_limit))
    server.check_model(fields.model)
    ask = await to_thread.run_sync(_completion_ask, server.prompts, fields)
    return await _answered(request, server, fields, ask, "text")


def _chat_ask(prompts: Prompts, fields: ChatFields) -> Ask:
    ids, shared = prompts.asked(_mappings(fields.messages), fields.context is not None)
    return Ask(prompt=ids, shared=shared, **fields.settings())


def _completion_ask(prompts: Prompts, fields: CompletionFields) -> Ask:
    ids = prompts.completion(fields.one, follows=fields.context is not None)
    return Ask(prompt=ids, **fields.settings(DEFAULT_COMPLETION_TOKENS))


async def _answered(
    request: Request, server: Server, fields: Sampling, ask: Ask, kind: Kind
) -> Response:
    answer = await _accepted(server.service.ask, ask)
    reply = Reply(kind, request.state.id, server.name)
    if fields.stream:
        return EventStream(request, answer, reply, fields.tells_usage)
    return await whole(request, answer, reply)


async def _accepted(into: Callable[[Any], Any], asked: Any) -> Any:
    """What the service says of a request: where its answer, or its context, will arrive. Raises
    Refused: the service does not take it."""
    try:
        return await to_thread.run_sync(into, asked)
    except (TooLong, UnknownContext):
        raise
    except ValueError as error:
        raise Refused(400, str(error)) from error


# ---- contexts ------------------------------------------------------------------------------------


@with_key.post("/v1/contexts")
async def read_context(request: Request, server: Served) -> dict[str, Any]:
    """Read a document once, to be asked by its id."""
    messages = await _context_messages(request, server.upload_limit)
    ids = await to_thread.run_sync(server.prompts.context, messages)
    reading = await _accepted(server.service.read, ids)
    try:
        return _context(await while_there(request, reading.aresult()))
    finally:
        reading.cancel()


@with_key.get("/v1/contexts")
async def list_contexts(server: Served) -> dict[str, Any]:
    """What is stored."""
    found = await to_thread.run_sync(server.service.contexts.list)
    return {"object": "list", "data": [_context(info) for info in found]}


@with_key.get("/v1/contexts/{id}")
async def show_context(id: str, server: Served) -> dict[str, Any]:
    """What one stored context takes."""
    return _context(await to_thread.run_sync(server.service.contexts.info, id))


@with_key.delete("/v1/contexts/{id}")
async def delete_context(id: str, server: Served) -> dict[str, Any]:
    """Forget a context."""
    await to_thread.run_sync(server.service.contexts.delete, id)
    return {"id": id, "object": "context", "deleted": True}


async def _context_messages(request: Request, most: int) -> list[dict[str, str]]:
    if request.headers.get("content-type", "").lower().startswith("multipart/"):
        return [{"role": "user", "content": await read_upload(request, most)}]
    fields = fields_of(ContextFields, await read_json(request, most))
    if (fields.text is None) == (fields.messages is None):
        raise Refused(400, "a context needs either text or messages, or a multipart file")
    if fields.text is not None:
        return [{"role": "user", "content": fields.text}]
    return _mappings(fields.messages or [])


def _mappings(messages: list[Message]) -> list[dict[str, str]]:
    return [message.as_mapping() for message in messages]


def _context(info: Any) -> dict[str, Any]:
    found = {name: getattr(info, name) for name in ("id", "tokens", "units", "bytes")}
    return {**found, "object": "context"}
