"""What a caller gets for a request at once: where its events, or its result, will arrive."""

import asyncio
import contextlib
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Generic, TypeVar

from locret.serve.requests import Cancelled, ContextInfo, End, Piece

T = TypeVar("T")


class Pending(Generic[T]):
    """Messages from the generation thread to threads or event loops that wait for them.

    Attributes:
        closed: there will be no more messages.
        on_end: called once when there will be no more, before those who wait are told.
    """

    def __init__(self) -> None:
        self.closed = False
        self.on_end: Callable[[], None] = _nothing
        self._condition = threading.Condition()
        self._messages: list[T] = []
        self._error: Exception | None = None
        self._wakers: list[Callable[[], None]] = []
        self._end_wakers: list[Callable[[], None]] = []

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
        return self._add([message], None, last)

    def close(self, error: Exception) -> bool:
        """End with an error; False, and nothing happens, if there was an end before."""
        return self._add([], error, True)

    def events(self, timeout: float | None = None) -> Iterator[T]:
        """All messages, the first ones too, as they arrive.

        Args:
            timeout: seconds to wait for each; None = as long as it takes.

        Raises:
            Exception: what ended them (`close`).
            TimeoutError: nothing came in time.
        """
        place = 0
        while (found := self._wait(place, timeout)) is not None:
            yield from found
            place += len(found)

    async def aevents(self) -> AsyncIterator[T]:
        """As `events`, for an event loop."""
        place = 0
        with self._waking(self._wakers) as arrived:
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

    async def aall(self) -> list[T]:
        """All of `events` together, for an event loop, which is not woken before the end: a batch
        has a message for every row at every step."""
        with self._waking(self._end_wakers) as ended:
            if not self.closed:
                await ended.wait()
        return [*self.events()]

    @contextlib.contextmanager
    def _waking(self, wakers: list[Callable[[], None]]) -> Iterator[asyncio.Event]:
        """An event of the running loop that one of `wakers` sets."""
        loop, event = asyncio.get_running_loop(), asyncio.Event()

        def waker() -> None:
            with contextlib.suppress(RuntimeError):  # a loop that was closed meanwhile
                loop.call_soon_threadsafe(event.set)

        with self._condition:
            wakers.append(waker)
        try:
            yield event
        finally:
            with self._condition:
                wakers.remove(waker)

    def _add(self, messages: list[T], error: Exception | None, last: bool) -> bool:
        with self._condition:
            if self.closed:
                return False
            self._messages += messages
            if last:
                self.closed, self._error = True, error
                on_end, self.on_end = self.on_end, _nothing  # who keeps the answer keeps no request
                on_end()
            self._condition.notify_all()
            for waker in [*self._wakers, *(self._end_wakers if last else ())]:
                waker()
            return True

    def _from(self, place: int) -> list[T] | None:
        """Messages from number `place` on; None = there will be no more."""
        found = self._messages[place:]
        if found or not self.closed:
            return found
        if self._error is not None:
            raise self._error
        return None

    def _wait(self, place: int, timeout: float | None) -> list[T] | None:
        """As `_from`, at least one."""
        with self._condition:
            if not self._condition.wait_for(lambda: self._from(place) != [], timeout):
                raise TimeoutError(f"nothing arrived within {timeout:g} seconds")
            return self._from(place)


def _nothing() -> None:
    pass


class Answer(Pending[Piece | End]):
    """An answer that is on its way: pieces as they come, and the end.

    It may end with `Cancelled`; `UnknownContext`, the context was deleted while the request waited;
    `RepeatsContext`, the prompt begins with all of it; `Failed`, which says why in one sentence.
    """


class Reading(Pending[ContextInfo]):
    """A context that is being read, `done` tokens so far. It may end with `Cancelled`, `TooLong` or
    `Failed`."""

    done: int = 0

    def result(self, timeout: float | None = None) -> ContextInfo:
        """What was stored, once it was read; errors as for `events`."""
        return next(self.events(timeout))

    async def aresult(self) -> ContextInfo:
        """As `result`, for an event loop."""
        return await anext(self.aevents())
