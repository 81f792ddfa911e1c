"""A server in a process of its own: started, waited for, asked over HTTP, and always stopped."""

import contextlib
import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
STOPPING = 10.0  # seconds for a server that was asked to end
LAST_LINES = 5


class Failed(Exception):
    """A server ended, refused a request, or took longer than it was given."""


class Server:
    """A server at a free port of this machine.

    Args:
        process: of the server.
        url: where it answers.
        folder: of its log and its peak memory.
        deadline: of `time.monotonic()`, after which it is not waited for.
    """

    def __init__(
        self, process: subprocess.Popen[bytes], url: str, folder: Path, deadline: float
    ) -> None:
        self.process, self.url, self.folder, self.deadline = process, url, folder, deadline

    @property
    def log(self) -> str:
        """What the server has printed so far."""
        return (self.folder / "log").read_text(encoding="utf-8", errors="replace")

    @property
    def peaks(self) -> dict[str, float]:
        """GiB that tensors took at most, and that were reserved for them; {} without a GPU."""
        file = self.folder / "peaks"
        found: dict[str, float] = json.loads(file.read_text()) if file.exists() else {}
        return found

    def call(self, path: str, body: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """The JSON object that the server answers to a body, or to no body.

        Raises:
            Failed: it refuses, is gone, or takes too long; says why.
        """
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(
            self.url + path, data=data, headers={"Content-Type": "application/json"}
        )
        left = self.deadline - time.monotonic()
        try:
            with urllib.request.urlopen(request, timeout=max(left, 0.01)) as answer:
                found: dict[str, Any] = json.load(answer)
                return found
        except urllib.error.HTTPError as error:
            reason = " ".join(error.read().decode(errors="replace").split())
            raise Failed(f"status {error.code}: {reason[:500]}") from error
        except (OSError, http.client.HTTPException) as error:
            raise Failed(f"{type(error).__name__}: {error}") from error

    def wait(self, path: str) -> None:
        """Wait until the server answers at a path.

        Raises:
            Failed: it ended, or the time is over; with its last words.
        """
        while time.monotonic() < self.deadline and self.process.poll() is None:
            with contextlib.suppress(Failed):
                self.call(path)
                return
            time.sleep(0.2)
        last = " | ".join(self.log.strip().splitlines()[-LAST_LINES:])
        raise Failed(f"it did not start; exit status {self.process.poll()}: {last}")


@contextlib.contextmanager
def running(
    module: str, arguments: Sequence[str], folder: Path, gib: float, deadline: float
) -> Iterator[Server]:
    """A server that was started; it need not answer yet.

    Args:
        module: run with `python -m`, and told `--port N` behind its arguments.
        arguments: of it.
        folder: an empty one, for its log.
        gib: of the GPU that it may use.
        deadline: of `time.monotonic()`.
    """
    port = _free_port()
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    capped = [sys.executable, "-m", "benchmarks.capped", str(gib), str(folder / "peaks"), module]
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(
            [*capped, *arguments, "--port", str(port)],
            env=os.environ | {"PYTHONPATH": path, "PYTHONUNBUFFERED": "1"},
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # so that all that it starts can be ended with it
        )
    try:
        yield Server(process, f"http://127.0.0.1:{port}", folder, deadline)
    finally:
        _stop(process)


def _stop(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(STOPPING)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _free_port() -> int:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port: int = taken.getsockname()[1]
        return port
