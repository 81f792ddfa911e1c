"""Runs the application with uvicorn until a signal asks it to stop."""

import contextlib
import logging
import socket
from collections.abc import Iterator

import uvicorn
from fastapi import FastAPI

from locret.system import interrupts

_log = logging.getLogger("locret.serve")


class _Server(uvicorn.Server):
    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """As uvicorn; says where it serves once it does, and signals are handled."""
        await super().startup(sockets)
        for taken in sockets or []:
            _log.info("serving at %s", address_of(taken))

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """As uvicorn, but without raising the signal again in the end: a server that finished what
        ran has ended well."""
        with interrupts.handled_by(self.handle_exit):
            yield


def serve(app: FastAPI, taken: socket.socket, drain_seconds: float = 60.0) -> None:
    """Answer requests until SIGTERM or Ctrl-C; then take no more, and finish what runs.

    Args:
        app: the application.
        taken: a socket for connections (`bound`).
        drain_seconds: how long answers may go on after the signal.
    """
    make_server(app, drain_seconds).run(sockets=[taken])


def make_server(app: FastAPI, drain_seconds: float = 60.0) -> uvicorn.Server:
    """uvicorn's server for the application; in a thread, `should_exit` stops it."""
    return _Server(
        uvicorn.Config(
            app,
            log_config=None,  # `locret.serve.logs` says where to
            access_log=False,
            server_header=False,
            timeout_graceful_shutdown=int(drain_seconds) + 1,
        )
    )


def bound(host: str, port: int) -> socket.socket:
    """A socket for connections there. It takes none yet: while a model is loaded, clients are
    refused and do not wait.

    Raises:
        OSError: the address is not one of this machine, or the port is taken or not allowed.
    """
    taken = None
    try:
        (family, kind, _, _, address), *_ = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )
        taken = socket.socket(family, kind)
        # Connections of a server that has just ended do not keep the port.
        taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        taken.bind(address)
    except OSError as error:
        if taken is not None:
            taken.close()
        raise OSError(f"cannot listen at {host} port {port}: {error.strerror}") from error
    return taken


def address_of(taken: socket.socket) -> str:
    """The URL of a socket."""
    host, port, *_ = taken.getsockname()
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
