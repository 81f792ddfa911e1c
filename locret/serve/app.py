"""The HTTP application: OpenAI's endpoints, contexts, and what operators look at; and the server
that runs it until a signal.

POST /v1/chat/completions, /v1/completions    answers; "context": id asks a stored context
POST /v1/contexts                             read a text, messages or a file once
GET, DELETE /v1/contexts/ID, GET /v1/contexts
GET /v1/models, /metrics
GET /health, /ready, POST /load_model         without a key
/ui                                           the page, if it is asked for (`locret.serve.page`)
"""

import asyncio
import contextlib
import dataclasses
import errno
import hmac
import logging
import socket
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass
from typing import Annotated, Any

import uvicorn
from anyio import to_thread
from fastapi import APIRouter, Depends, FastAPI, Request
from fastapi.responses import JSONResponse, Response
from prometheus_client import CollectorRegistry, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from locret.serve.fields import (
    ChatFields,
    CompletionFields,
    ContextFields,
    Prompts,
    fields_of,
    mappings,
    read_json,
    read_upload,
)
from locret.serve.replies import (
    EventStream,
    Kind,
    Refused,
    Reply,
    RequestLog,
    answer_errors,
    event,
    while_there,
)
from locret.serve.requests import TooLong, UnknownContext
from locret.system import interrupts

_log = logging.getLogger("locret.serve")

UPLOAD_LIMIT = 64 * 2**20
"""Bytes of a body."""


@dataclass
class Server:
    """What the endpoints share, by the arguments of `make_app`."""

    service: Any
    prompts: Prompts
    metrics: "Metrics"
    name: str
    api_key: str | None
    upload_limit: int
    page: Any = None
    """Gradio's application at /ui; None = there is none."""

    def check_model(self, asked: str | None) -> None:
        """Raises Refused: another model than the one that is served; None = whichever that is."""
        if asked is not None and asked != self.name:
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

    @contextlib.asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        service.start()
        try:
            yield
        finally:
            await to_thread.run_sync(lambda: service.close(drain=True, seconds=drain_seconds))

    app = FastAPI(
        lifespan=lifespan,
        docs_url=None,
        redoc_url=None,
        openapi_url=None,
        redirect_slashes=False,  # clients do not follow, and would take it for an answer
    )
    prompts, metrics = Prompts(tokenizer), Metrics(service)
    app.state.server = Server(service, prompts, metrics, name, api_key, upload_limit)
    answer_errors(app)
    app.include_router(open_to_all)
    app.include_router(with_key)
    app.add_middleware(RequestLog)
    if ui:
        from locret.serve.page import mount  # Gradio, which takes seconds to import

        mount(app, None if api_key is None else lambda name, key: is_key(key, api_key))
    return app


def _server(request: Request) -> Server:
    server: Server = request.app.state.server
    return server


Served = Annotated[Server, Depends(_server)]


def check_key(request: Request, api_key: str | None) -> None:
    """Raises Refused: the request does not come with the key; None = it needs none."""
    if api_key is None:
        return
    scheme, _, given = request.headers.get("authorization", "").partition(" ")
    if scheme.lower() != "bearer" or not is_key(given, api_key):
        message = "the API key is missing or wrong; send it as Authorization: Bearer KEY"
        challenge = {"WWW-Authenticate": "Bearer"}
        raise Refused(401, message, "invalid_api_key", challenge)


def is_key(given: str, api_key: str) -> bool:
    """Whether somebody gave the key; takes as long whatever is given."""
    return hmac.compare_digest(given.strip().encode(), api_key.encode())


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
    return await _answered(request, server, ChatFields, "chat")


@with_key.post("/v1/completions")
async def completion(request: Request, server: Served) -> Response:
    """Go on with a text."""
    return await _answered(request, server, CompletionFields, "text")


async def _answered(
    request: Request, server: Server, fields: type[ChatFields | CompletionFields], kind: Kind
) -> Response:
    found = fields_of(fields, await read_json(request, server.upload_limit))
    server.check_model(found.model or None)
    ask = await to_thread.run_sync(found.ask, server.prompts)
    answer = await _accepted(server.service.ask, ask)
    reply = Reply(kind, request, answer, server.name)
    return EventStream(reply, found.tells_usage) if found.stream else await reply.whole()


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


@with_key.get("/v1/contexts/{id:path}")
async def show_context(id: str, server: Served) -> dict[str, Any]:
    """What one stored context takes."""
    return _context(await to_thread.run_sync(server.service.contexts.info, id))


@with_key.delete("/v1/contexts/{id:path}")
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
    return mappings(fields.messages or [])


def _context(info: Any) -> dict[str, Any]:
    found = {name: getattr(info, name) for name in ("id", "tokens", "units", "bytes")}
    return {**found, "object": "context"}


# ---- numbers --------------------------------------------------------------------------------

SECONDS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)
_NAMES = {"queued": "queue_requests", "running": "running_requests"}
"""Names of metrics that are not those of their counters."""


class Metrics(Collector):
    """Numbers of a service, whose `counts` are told when somebody asks, and of its answers, whose
    first tokens it tells (`on_first_token`)."""

    def __init__(self, service: Any) -> None:
        self._service, self._registry = service, CollectorRegistry()
        self._registry.register(self)
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

    def collect(self) -> Iterator[Metric]:
        counts = self._service.counts
        for each in dataclasses.fields(counts):
            kind = CounterMetricFamily if each.metadata["sum"] else GaugeMetricFamily
            name, text = _NAMES.get(each.name, each.name), each.metadata["text"]
            yield kind(f"locret_{name}", text, value=getattr(counts, each.name))


# ---- the server --------------------------------------------------------------------------------

SENDING = 5.0
"""Seconds for what clients are told of answers that were given up."""


class _Server(uvicorn.Server):
    def __init__(self, config: uvicorn.Config, app: FastAPI, drain_seconds: float) -> None:
        super().__init__(config)
        self._app, self._drain_seconds = app, drain_seconds

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """As uvicorn; requests that go on for too long are given up by the service, so that their
        clients are told so, before uvicorn would cut them off."""
        if self._app.state.server.page is not None:  # whose browsers would stay connected
            self._app.state.server.page.stop_event.set()
        giving_up = asyncio.create_task(self._give_up())
        try:
            await super().shutdown(sockets)
        finally:
            giving_up.cancel()

    async def _give_up(self) -> None:
        await asyncio.sleep(self._drain_seconds)
        service = self._app.state.server.service
        await asyncio.to_thread(service.close, drain=False)

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """As uvicorn; says where it serves once it does, and signals are handled."""
        for taken in sockets or []:  # its connections shall not keep the port when it has ended
            taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        await super().startup(sockets)
        for taken in sockets or []:
            _log.info("serving at %s", address_of(taken))
            if self._app.state.server.page is not None:
                _log.info("the page is at %s/ui", address_of(taken))

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """As uvicorn, but without raising the signal again in the end: a server that finished what
        ran has ended well."""
        with interrupts.handled_by(self.handle_exit):
            yield


def make_server(app: FastAPI, drain_seconds: float = 60.0) -> uvicorn.Server:
    """uvicorn's server for the application. `run(sockets=[bound(...)])` answers until SIGTERM or
    Ctrl-C, or in a thread until `should_exit`; it takes no more then, and finishes what runs within
    `drain_seconds`."""
    config = uvicorn.Config(
        app,
        http="h11",  # refuses headers that do not end; httptools, where it is there, keeps them all
        log_config=None,  # `locret.serve.replies` says where to
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=int(drain_seconds + SENDING) + 1,
    )
    return _Server(config, app, drain_seconds)


def bound(host: str, port: int) -> socket.socket:
    """A socket for connections there. It takes none yet: while a model is loaded, clients are
    refused and do not wait. OSError where the address is not one of this machine, or the port is
    taken or not allowed."""
    try:
        (family, kind, _, _, address), *_ = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )
        try:
            return _bound(family, kind, address, reuse=False)
        except OSError as error:
            if error.errno != errno.EADDRINUSE:
                raise
        # It may be kept by nothing but connections of a server that has just ended.
        return _bound(family, kind, address, reuse=True)
    except OSError as error:
        raise OSError(f"cannot listen at {host} port {port}: {error.strerror}") from error


def _bound(family: int, kind: int, address: Any, reuse: bool) -> socket.socket:
    taken = socket.socket(family, kind)
    try:
        # Two that may be reused could be bound to one port, until one of them listens.
        taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, reuse)
        taken.bind(address)
    except OSError:
        taken.close()
        raise
    return taken


def address_of(taken: socket.socket) -> str:
    """The URL of a socket."""
    host, port, *_ = taken.getsockname()
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
