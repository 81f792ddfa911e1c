"""What a caller gets for a request at once: where its events, or its result, will arrive."""

import asyncio
import contextlib
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Generic, TypeVar

from locret.serve.requests import Cancelled, ContextInfo, End, Piece

T = TypeVar("T")


class Pending(Generic[T]):
    """Messages from the generation thread to threads or event loops that wait for them.

    Attributes:
        on_end: called once when there will be no more messages, before those who wait are told.
    """

    def __init__(self) -> None:
        self.on_end: Callable[[], None] = _nothing
        self._condition = threading.Condition()
        self._messages: list[T] = []
        self._error: Exception | None = None
        self._closed = False
        self._wakers: list[Callable[[], None]] = []

    @property
    def closed(self) -> bool:
        """Whether there will be no more messages."""
        return self._closed

    @property
    def outcome(self) -> tuple[T | None, Exception | None]:
        """The last message so far, and what ended them all if that was an error."""
        with self._condition:
            return (self._messages[-1] if self._messages else None), self._error

    def cancel(self) -> None:
        """Give it up: whoever waits is told at once, the work ends after the chunk or step that
        runs. Nothing happens after the end."""
        self.close(Cancelled("the request was cancelled"))

    def put(self, message: T, last: bool = False) -> bool:
        """Pass a message on; False, and nothing happens, once all is closed."""
        with self._condition:
            if self._closed:
                return False
            self._messages.append(message)
            if last:
                self._end()
            self._wake()
            return True

    def close(self, error: Exception) -> bool:
        """End with an error; False, and nothing happens, if there was an end before."""
        with self._condition:
            if self._closed:
                return False
            self._error = error
            self._end()
            self._wake()
            return True

    def _end(self) -> None:
        self._closed = True
        on_end, self.on_end = self.on_end, _nothing  # whoever keeps the answer keeps no request
        on_end()

    def _wake(self) -> None:
        self._condition.notify_all()
        for waker in self._wakers:
            waker()

    def _from(self, place: int) -> list[T] | None:
        """Messages from number `place` on; None = there will be no more.

        Raises:
            Exception: what ended them.
        """
        found = self._messages[place:]
        if found or not self._closed:
            return found
        if self._error is not None:
            raise self._error
        return None

    def _wait(self, place: int, timeout: float | None) -> list[T] | None:
        """As `_from`, at least one, waiting so many seconds for it.

        Raises:
            TimeoutError: none arrived in time.
        """
        deadline = None if timeout is None else time.monotonic() + timeout
        with self._condition:
            while (found := self._from(place)) == []:
                left = None if deadline is None else deadline - time.monotonic()
                if left is not None and left <= 0:
                    raise TimeoutError(f"nothing arrived within {timeout:g} seconds")
                self._condition.wait(left)
            return found

    def _all(self, timeout: float | None) -> Iterator[T]:
        """All messages, the first ones too, as they arrive."""
        place = 0
        while (found := self._wait(place, timeout)) is not None:
            yield from found
            place += len(found)

    async def _aall(self) -> AsyncIterator[T]:
        """As `_all`, for an event loop."""
        loop, arrived, place = asyncio.get_running_loop(), asyncio.Event(), 0

        def waker() -> None:
            with contextlib.suppress(RuntimeError):  # a loop that was closed meanwhile
                loop.call_soon_threadsafe(arrived.set)

        with self._condition:
            self._wakers.append(waker)
        try:
            while True:
                arrived.clear()
                with self._condition:
                    found = self._from(place)
                if found is None:
                    return
                for message in found:
                    yield message
                place += len(found)
                if not found:
                    await arrived.wait()
        finally:
            with self._condition:
                self._wakers.remove(waker)


def _nothing() -> None:
    pass


class Answer(Pending[Piece | End]):
    """An answer that is on its way."""

    def events(self, timeout: float | None = None) -> Iterator[Piece | End]:
        """Pieces as they come, and the end.

        Args:
            timeout: seconds to wait for each; None = as long as it takes.

        Raises:
            Cancelled: the request was cancelled.
            UnknownContext: the context was deleted while the request waited.
            RepeatsContext: the prompt begins with all of the context.
            RuntimeError: it failed; says why in one sentence.
            TimeoutError: nothing came in time.
        """
        return self._all(timeout)

    def aevents(self) -> AsyncIterator[Piece | End]:
        """As `events`, for an event loop."""
        return self._aall()


class Reading(Pending[ContextInfo]):
    """A context that is being read.

    Attributes:
        done: tokens read so far.
    """

    done: int = 0

    def result(self, timeout: float | None = None) -> ContextInfo:
        """What was stored, once it was read.

        Raises:
            Cancelled: the reading was cancelled.
            RuntimeError: it failed; says why in one sentence.
            TimeoutError: it was not read within so many seconds.
        """
        return next(self._all(timeout))

    async def aresult(self) -> ContextInfo:
        """As `result`, for an event loop."""
        return await anext(self._aall())
