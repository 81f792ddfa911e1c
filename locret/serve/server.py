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
        taken: a socket that takes connections (`listening`).
        drain_seconds: how long answers may go on after the signal.
    """
    _log.info("serving at %s", address_of(taken))
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


def listening(host: str, port: int) -> socket.socket:
    """A socket that takes connections there.

    Raises:
        OSError: the address is not one of this machine, or the port is taken or not allowed.
    """
    (family, *_), *_ = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    try:
        return socket.create_server((host, port), family=family)
    except OSError as error:
        raise OSError(f"cannot listen at {host} port {port}: {error.strerror}") from error


def address_of(taken: socket.socket) -> str:
    """The URL of a listening socket."""
    host, port, *_ = taken.getsockname()
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
