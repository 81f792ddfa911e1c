"""Replicas of the server on many machines behind one address: a Ray Serve application.

    serve run locret.serve.ray_app:app model=MODEL budget=8x contexts=/shared/contexts replicas=2

The ingress passes each request on to a replica, which answers it as a server alone would. A context
is asked where it is in memory already (Ray's model multiplexing); any other replica can load it
from the folder that all of them share. So a replica that is lost takes nothing with it.
"""

import asyncio
import contextlib
import importlib
import json
from collections.abc import AsyncIterator, Callable
from typing import Any

from anyio import to_thread
from fastapi import Request
from fastapi.responses import Response
from ray import serve
from ray.exceptions import RayActorError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError
from starlette.types import Message, Receive, Scope, Send

from locret.serve.app import check_key
from locret.serve.fields import chunks
from locret.serve.replies import DONE, Refused, error_reply, event
from locret.serve.requests import ID, ContextInfo, UnknownContext

ATTEMPTS = 2
"""At what a request may lose a replica. No more: it may be what ends them."""
MOST_KEPT = 1024
"""Contexts that the ingress knows a replica to have; which are in memory is up to their bytes."""
MOST_RELAYED = 1000
"""Requests that one ingress passes on at once; it waits for replicas only."""
OPEN_BODY = 2**16
"""Bytes of a body that comes without a key."""
RETRY = {"Retry-After": "1"}
_PICKLED = "type asgi http_version method scheme path raw_path query_string root_path headers"


class Replica:
    """The server in a process of its own, in which `make` makes the application
    (`locret.serve.app.make_app`)."""

    def __init__(self, make: Callable[[], Any]) -> None:
        self.app = make()
        self.service = self.app.state.server.service
        self.service.start()

    def check_health(self) -> None:
        """Raises RuntimeError: this process answers nothing any more; Ray starts another."""
        if not self.service.ready:
            raise RuntimeError("the service has ended")

    async def answer(self, scope: dict[str, Any], body: bytes) -> AsyncIterator[Message]:
        """The messages of ASGI that answer a request, as they come."""
        await self._keep(serve.get_multiplexed_model_id())
        reads = scope["method"] == "POST" and scope["path"].endswith("/v1/contexts")
        async for message in messages_of(self.app, scope, body):
            if reads and message["type"] == "http.response.body":
                await self._keep(json.loads(message["body"]).get("id"))  # none in an error
            yield message

    @serve.multiplexed(max_num_models_per_replica=MOST_KEPT)
    async def keep(self, id: str) -> ContextInfo:
        """Let Ray know that questions about a context are best asked here. Raises UnknownContext:
        there is none of this id."""
        info: ContextInfo = await to_thread.run_sync(self.service.contexts.info, id)
        return info

    async def _keep(self, id: str | None) -> None:
        if id:
            with contextlib.suppress(UnknownContext):  # the application says so itself
                await self.keep(id)


async def messages_of(app: Any, scope: dict[str, Any], body: bytes) -> AsyncIterator[Message]:
    """What an application sends for a request. It is cancelled when nobody wants more."""
    left, sent = [body], asyncio.Queue[Message | None]()

    async def receive() -> Message:
        if not left:
            await asyncio.Event().wait()  # a client that leaves cancels all of this
        return {"type": "http.request", "body": left.pop(), "more_body": False}

    running = asyncio.create_task(app(scope, receive, sent.put))
    running.add_done_callback(lambda _: sent.put_nowait(None))
    try:
        while (message := await sent.get()) is not None:
            yield message
    finally:
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)


class Ingress:
    """Passes requests on to replicas.

    Args:
        replicas: Ray's handle of them.
        api_key: what clients must send; None = nothing.
        upload_limit: bytes of a body; more is refused.
    """

    def __init__(self, replicas: Any, api_key: str | None, upload_limit: int) -> None:
        self.replicas = replicas
        self.api_key, self.upload_limit = api_key, upload_limit

    async def __call__(self, request: Request) -> Response:
        try:
            return await self._passed_on(request)
        except Exception as error:
            return error_reply(error)

    async def _passed_on(self, request: Request) -> Response:
        """Raises Refused: no replica answered, or what each of them would refuse."""
        most = OPEN_BODY
        if "/v1/" in request.url.path:  # before a large body is read
            check_key(request, self.api_key)
            most = self.upload_limit
        body = b"".join([chunk async for chunk in chunks(request, most)])
        scope = {name: request.scope[name] for name in _PICKLED.split() if name in request.scope}
        scope["state"] = {"id": request.headers.get("x-request-id", "")[:64]}  # Ray's, for the log
        context = await to_thread.run_sync(context_of, request.url.path, body)
        asked = self.replicas.options(stream=True, multiplexed_model_id=context)
        for _ in range(ATTEMPTS):
            try:
                messages = asked.answer.remote(scope, body)
                # With the first piece of its body, which is all of an answer that is no stream.
                return Relayed(await anext(messages), await anext(messages), messages)
            except RayActorError:  # nothing was sent yet
                continue
            except (BackPressureError, DeploymentUnavailableError, StopAsyncIteration):
                raise Refused(503, "no replica is free; ask again", "no_replica", RETRY) from None
        raise _lost()


class Relayed(Response):
    """The answer of a replica: its first message, the first one with a piece of its body, and the
    others as they come."""

    def __init__(self, start: Message, piece: Message, messages: Any) -> None:
        super().__init__()
        headers = [(name, value) for name, value in start["headers"] if name != b"x-request-id"]
        self.first = [{**start, "headers": headers}, piece]  # Ray adds the id
        self.messages = messages

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        for message in self.first:
            await send(message)
        try:
            async for message in self.messages:
                await send(message)
        except RayActorError:
            if message.get("more_body"):  # the status is sent already: the stream has to tell
                told = event(_lost().body) + DONE
                await send({"type": "http.response.body", "body": told.encode()})
        finally:
            self.messages.cancel()


def context_of(path: str, body: bytes) -> str:
    """The id of the context that a request is about; empty if it is about none."""
    id = path.rpartition("/")[2]
    if b'"context"' in body:
        with contextlib.suppress(ValueError, AttributeError, RecursionError):
            id = json.loads(body).get("context")
    return id if isinstance(id, str) and ID.fullmatch(id) else ""


def _lost() -> Refused:
    return Refused(503, "the replica that answered was lost; ask again", "replica_lost", RETRY)


def application(
    make: Callable[[], Any],
    *,
    api_key: str | None,
    upload_limit: int,
    replicas: int,
    cpus: float,
    gpus: float,
    queue: int,
    drain_seconds: float,
) -> Any:
    """The application for `ray.serve.run`.

    Args:
        make: makes the application of a replica, there; picklable.
        api_key, upload_limit: see `Ingress`.
        replicas: how many.
        cpus, gpus: of each.
        queue: requests that may wait for each.
        drain_seconds: how long answers may go on when a replica is stopped.
    """
    deployment: Any = serve.deployment  # whose types know decorators alone
    servers = deployment(
        Replica,
        num_replicas=replicas,
        ray_actor_options={"num_cpus": cpus, "num_gpus": gpus},
        max_ongoing_requests=2 * queue,  # more than wait: it says itself when to come again
        max_queued_requests=queue,
        graceful_shutdown_timeout_s=drain_seconds,
    ).bind(make)
    return deployment(
        Ingress,
        num_replicas=replicas,  # so that it is lost no sooner than the replicas
        ray_actor_options={"num_cpus": 0},
        max_ongoing_requests=MOST_RELAYED,
        graceful_shutdown_timeout_s=drain_seconds,
    ).bind(servers, api_key, upload_limit)


def app(settings: dict[str, Any]) -> Any:
    """The application by the settings of `locret serve`, as `serve run` and its files give them.
    Raises ValueError: settings that cannot work together."""
    # An entry like the command line: what it builds is above this package.
    return importlib.import_module("locret.commands.serve").ray_application(settings)
