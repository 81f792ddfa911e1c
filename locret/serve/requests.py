"""What is asked of the service, and what comes back: plain data, the text of an answer as its
tokens come, and where all of it arrives. Nothing here knows HTTP.
"""

import asyncio
import contextlib
import re
import threading
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, Literal, TypeVar

ID = re.compile(r"ctx_[A-Za-z0-9_-]{22}")
"""How ids of contexts look. Nothing else ever becomes a path."""

COLDEST = 1e-6


@dataclass(frozen=True)
class Ask:
    """A request for one answer.

    Attributes:
        prompt: token ids of the whole prompt, or with `context` of what follows the context.
        context: id of a stored context.
        shared: leading tokens of `prompt` that are worth keeping for later requests, such as all
            messages but the last; 0 = none.
        max_tokens: most tokens of the answer; None = as the service says.
        temperature: 0 = greedy.
        top_p: of nucleus sampling; 1 = all tokens.
        seed: the same one gives the same answer to the same request; None = any.
        stop: strings that end the answer and are not part of it.
        ignore_eos: go on to `max_tokens` whatever the model says, as for measurements.

    Raises:
        ValueError: a number is out of range, or a stop string is empty.
    """

    prompt: list[int]
    context: str | None = None
    shared: int = 0
    max_tokens: int | None = None
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    ignore_eos: bool = False

    @property
    def greedy(self) -> bool:
        """Whether the most likely token is taken. Logits divided by a lower temperature may be
        infinite, which nothing is drawn from."""
        return self.temperature < COLDEST

    def __post_init__(self) -> None:
        if self.max_tokens is not None and self.max_tokens < 1:
            raise ValueError(f"max_tokens is {self.max_tokens}; expected at least 1")
        if not 0 <= self.temperature < float("inf"):
            raise ValueError(f"temperature is {self.temperature}; expected 0 or more")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p is {self.top_p}; expected more than 0 and at most 1")
        if any(not stop for stop in self.stop):
            raise ValueError("a stop string is empty; leave it out")


@dataclass(frozen=True)
class Usage:
    """What a request took.

    Attributes:
        prompt_tokens: of the context and the prompt.
        cached_tokens: those of them that had been read before.
        completion_tokens: of the answer, the token that ended it included.
        units: that a KV head holds at the end, on average.
        bytes: of keys, values and source positions at the end.
    """

    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int
    units: int
    bytes: int

    @property
    def tokens(self) -> dict[str, int]:
        """The counts of tokens by name."""
        names = ("prompt_tokens", "cached_tokens", "completion_tokens")
        return {name: getattr(self, name) for name in names}


@dataclass(frozen=True)
class Piece:
    """New text of an answer: whole characters, and nothing of a stop string."""

    text: str


@dataclass(frozen=True)
class End:
    """The end of an answer: "stop" = it was complete or met a stop string, "length" = cut."""

    reason: Literal["stop", "length"]
    usage: Usage


@dataclass(frozen=True)
class ContextInfo:
    """What is known of a stored context.

    Attributes:
        id: names it in requests.
        tokens: that were read.
        units: that a KV head holds of them, on average.
        bytes: of its storage.
        slots: that it takes of the model's window; 0 = not known.
    """

    id: str
    tokens: int
    units: int
    bytes: int
    slots: int = 0


class Stopping(Exception):
    """The service is closing and takes nothing more."""


class QueueFull(Exception):
    """Too many requests wait.

    Attributes:
        retry_after: seconds after which it is worth trying again.
    """

    def __init__(self, message: str, retry_after: float) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class TooLong(ValueError):
    """A request that cannot fit; the message says what would."""


class UnknownContext(ValueError):
    """No context of this id is stored."""


class RepeatsContext(ValueError):
    """The prompt begins with all of the context that it is about."""


class Failed(RuntimeError):
    """The request failed, which is logged; says why in one sentence."""


class Cancelled(Exception):
    """The request was cancelled before its end."""


def _number(text: str, sum: bool = False) -> Any:
    return field(default=0, metadata={"text": text, "sum": sum})


@dataclass(frozen=True)
class Counters:
    """What a service does now, and what it did since it began, as `/metrics` tells it."""

    queued: int = _number("requests that wait")
    running: int = _number("requests that are read or answered now")
    contexts: int = _number("stored contexts")
    units: int = _number("units that a KV head held at the end of the last answer")
    bytes: int = _number("bytes in memory of stored contexts and shared beginnings of prompts")
    answered: int = _number("requests answered to the end", sum=True)
    read: int = _number("contexts read to the end", sum=True)
    cancelled: int = _number("requests given up because the client left", sum=True)
    failed: int = _number("requests that failed", sum=True)
    refused: int = _number("requests that found the queue full", sum=True)
    prompt_tokens: int = _number("tokens of prompts and their contexts", sum=True)
    cached_tokens: int = _number("those of them that had been read before", sum=True)
    completion_tokens: int = _number("tokens of answers", sum=True)


# ---- the text of an answer -----------------------------------------------------------------------

UNKNOWN = "�"
"""What a decoder writes for bytes that are no character, or not yet a whole one."""
LONGEST = 4  # bytes of a character, each of which may be a token
MOST_WAITING = 64  # tokens that may wait for a whole character: more are no text


class TextOf:
    """Decodes tokens as they come.

    Args:
        tokenizer: decodes; special tokens are left out.
        stop: strings that end the text, and are no part of it.

    Attributes:
        stopped: a stop string was met: there is no more text.
    """

    def __init__(self, tokenizer: Any, stop: Sequence[str] = ()) -> None:
        self._tokenizer = tokenizer
        self._stop = tuple(stop)
        self._tokens: list[int] = []
        self._decoded = 0  # characters of these tokens that were decoded before
        self._known = 0  # tokens that end with a whole character, before those that wait
        self._waiting = ""  # text that may be the beginning of a stop string
        self.stopped = False

    def add(self, token: int) -> str:
        """The text that is certain now, beyond what was returned before."""
        self._tokens.append(token)
        text = self._decode()
        unsure = min(len(text) - len(text.rstrip(UNKNOWN)), LONGEST)
        if len(self._tokens) - self._known > MOST_WAITING:
            unsure = 0
        certain = len(text) - unsure
        new, self._decoded = text[self._decoded : certain], max(self._decoded, certain)
        if not unsure:
            # The tokens before stay, because some decoders write a first token in another way.
            del self._tokens[: self._known]
            self._known = len(self._tokens)
            self._decoded = len(self._decode())
        return self._before_stop(new)

    def end(self) -> str:
        """What is left, once there are no more tokens."""
        text = self._before_stop(self._decode()[self._decoded :]) + self._waiting
        self._waiting = ""
        return text

    def _decode(self) -> str:
        options = {"skip_special_tokens": True, "clean_up_tokenization_spaces": False}
        return str(self._tokenizer.decode(self._tokens, **options))

    def _before_stop(self, new: str) -> str:
        """The text that no stop string can have begun in, with what waited for `new`."""
        if self.stopped:
            return ""
        text = self._waiting + new
        places = [place for place in map(text.find, self._stop) if place >= 0]
        if places:
            self.stopped, self._waiting = True, ""
            return text[: min(places)]
        begun = max((_begun(text, stop) for stop in self._stop), default=0)
        self._waiting = text[len(text) - begun :]
        return text[: len(text) - begun]


def _begun(text: str, stop: str) -> int:
    """Characters of `stop` that the text ends with, fewer than all."""
    most = min(len(stop) - 1, len(text))
    return next((n for n in range(most, 0, -1) if text.endswith(stop[:n])), 0)


# ---- where answers arrive ------------------------------------------------------------------------

T = TypeVar("T")


class Pending(Generic[T]):
    """Messages from the generation thread to threads or event loops that wait for them.

    Attributes:
        closed: there will be no more messages.
        on_end: called once when there will be no more, before those who wait are told.
    """

    def __init__(self) -> None:
        self.closed = False
        self.on_end: Callable[[], None] | None = None
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
        while True:
            with self._condition:
                while (found := self._from(place)) == []:
                    if not self._condition.wait(timeout):
                        raise TimeoutError(f"nothing arrived within {timeout:g} seconds")
            if found is None:
                return
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
                on_end, self.on_end = self.on_end, None  # who keeps the answer keeps no request
                if on_end is not None:
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
