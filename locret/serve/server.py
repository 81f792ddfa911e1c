"""Runs the application with uvicorn until a signal asks it to stop."""

import asyncio
import contextlib
import errno
import logging
import socket
from collections.abc import Iterator
from typing import Any

import uvicorn
from fastapi import FastAPI

from locret.system import interrupts

_log = logging.getLogger("locret.serve")


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
        log_config=None,  # `locret.serve.telemetry` says where to
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
