"""How a command ends: its exit status, and what SIGINT (Ctrl-C) and SIGTERM (schedulers) do to it.

A command that a signal stops leaves with the status that shells give to a process that died of it,
128 and the signal's number, so that `train && evaluate` does not go on to evaluate. The signal
raises an exception, so that files are closed and child processes ended on the way out.
"""

import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

SIGNALS = (signal.SIGINT, signal.SIGTERM)
USER_ERROR = 2  # the exit status for errors of the user
REPEAT_SECONDS = 1.0


class Stopped(SystemExit):
    """A signal asks this process to end.

    Args:
        number: of the signal.
        note: what to tell the user, if more is known than the command's own note says; an empty
            one tells nothing.
    """

    def __init__(self, number: int, note: str | None = None) -> None:
        super().__init__(128 + number)
        self.number = number
        self.note = note


def run_command(
    name: str,
    command: Callable[[], object],
    *,
    errors: tuple[type[Exception], ...] = (ValueError, OSError),
    note: str = "stopped",
) -> int:
    """Run a command; returns its exit status.

    Args:
        name: of the command, in front of what it says on stderr.
        errors: those of the user, told in one line.
        note: what to tell if a signal stops it.
    """
    try:
        with raised():
            command()
    except BaseException as error:
        stop = stop_behind(error)
        if stop is not None:
            _tell(name, note if stop.note is None else stop.note)
            return 128 + stop.number
        if not isinstance(error, errors):
            raise
        print(f"{name}: {error}", file=sys.stderr)
        return USER_ERROR
    return 0


@contextlib.contextmanager
def ends_at_once() -> Iterator[None]:
    """Until the block ends, Ctrl-C ends the process on the spot. For imports: an exception in the
    middle of one is told as a traceback, or as a package that is missing."""
    with contextlib.ExitStack() as undo:
        if handlers().get(signal.SIGINT) is signal.default_int_handler:
            undo.callback(signal.signal, signal.SIGINT, signal.default_int_handler)
            signal.signal(signal.SIGINT, signal.SIG_DFL)
        yield


def stop_behind(error: BaseException | None) -> Stopped | None:
    """The stop that an exception is, or that was being handled when it was raised: cleaning
    up may raise too, and some libraries turn Ctrl-C into an exit of their own."""
    while error is not None:
        if isinstance(error, Stopped):
            return error
        if isinstance(error, KeyboardInterrupt):
            return Stopped(signal.SIGINT)
        error = error.__context__
    return None


@contextlib.contextmanager
def raised() -> Iterator[None]:
    """Within, a signal raises `Stopped`."""
    if isinstance(signal.getsignal(signal.SIGTERM), _Raise):
        yield
        return
    with handled_by(_Raise()):
        yield


@contextlib.contextmanager
def delayed() -> Iterator[None]:
    """Within, signals wait: for what must not be broken off halfway."""
    came: list[int] = []
    with handled_by(lambda number, _: came.append(number)):
        yield
    if came:
        os.kill(os.getpid(), came[0])


@contextlib.contextmanager
def handled_by(handler: Callable[[int, FrameType | None], Any]) -> Iterator[None]:
    """Within, a handler for both signals, where they can be handled."""
    before = handlers()
    try:
        for number in before:
            signal.signal(number, handler)
        yield
    finally:
        for number, earlier in before.items():
            signal.signal(number, earlier)


def handlers() -> dict[int, Any]:
    """The handlers of the signals that can be handled here: in the main thread only, and none that
    this process was started to ignore, as in the background of a script."""
    if threading.current_thread() is not threading.main_thread():
        return {}
    found = {number: signal.getsignal(number) for number in SIGNALS}
    return {n: handler for n, handler in found.items() if handler not in (None, signal.SIG_IGN)}


class Repeats:
    """Tells a signal from its repetition: `timeout` and others send it to a process and once more
    to its group, and the second must not break off what the first one has set going. One that comes
    later is not a repetition: the first exception may have been lost, as in a `__del__`."""

    def __init__(self) -> None:
        self.last = -REPEAT_SECONDS

    def __call__(self) -> bool:
        before, self.last = self.last, time.monotonic()
        return self.last - before < REPEAT_SECONDS


class _Raise:
    """A signal handler that raises `Stopped`, in this process and not in its forks."""

    def __init__(self) -> None:
        self.process = os.getpid()
        self.repeats = Repeats()

    def __call__(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self.process:
            _as_by_default(number, frame)
        elif not self.repeats():
            raise Stopped(number)


def _as_by_default(number: int, frame: FrameType | None) -> None:
    """What forked processes, such as those that load data, are made for."""
    if number == signal.SIGINT:
        signal.default_int_handler(number, frame)
    signal.signal(number, signal.SIG_DFL)
    os.kill(os.getpid(), number)


def _tell(name: str, note: str) -> None:
    if note:
        behind = "\n" if sys.stderr.isatty() else ""  # a progress bar, and what Ctrl-C shows
        print(f"{behind}{name}: {note}", file=sys.stderr, flush=True)
