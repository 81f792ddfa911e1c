"""Requests as the service works on them, which of them are answered together, and how the tokens of
an answer become its events.
"""

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

from locret.serve.requests import Answer, Ask, End, Piece, Reading, TextOf, Usage


@dataclass(eq=False)
class AskJob:
    """A request for an answer.

    Attributes:
        most_tokens: of the answer.
        shared: leading tokens of the prompt that are read as a context; 0 = none.
        most_units: that a KV head may hold for it, on average.
        context_tokens: of the context or the shared tokens, once it is known.
        cached_tokens: those of them that had been read before.
        base: units and bytes of the context, once they are known, or of a prompt without one.
        growth: bytes that every further token takes.
        on_first_token: called with the seconds from `arrived` to the first token.
        arrived: when it came, in seconds of `time.monotonic`.
        taken: tokens of the answer so far.
    """

    ask: Ask
    most_tokens: int
    pending: Answer
    text: TextOf
    shared: int = 0
    most_units: int = 0
    context_tokens: int = 0
    cached_tokens: int = 0
    base: tuple[float, int] = (0.0, 0)
    growth: int = 0
    on_first_token: Callable[[float], None] = lambda seconds: None
    arrived: float = field(default_factory=time.monotonic)
    taken: int = 0
    _again: int = 0

    @property
    def has_context(self) -> bool:
        """Whether it is asked of a context, stored or of its shared tokens."""
        return self.ask.context is not None or self.shared > 0

    @property
    def question(self) -> list[int]:
        """What follows the context, if there is one, else the prompt."""
        return self.ask.prompt[self.shared :]

    @property
    def repeatable(self) -> bool:
        """Whether it can be asked again from the beginning: the same answer comes, or no text of
        another one is out yet."""
        return self.taken == 0 or self.ask.greedy or self.ask.seed is not None

    @property
    def left(self) -> int:
        """Tokens of the answer that are to come at most, once it has started."""
        return self.most_tokens - self.taken + self._again

    def start(self) -> None:
        """Expect the answer from its first token on, those that were taken before once more."""
        self._again = self.taken

    def take(self, token: int, ends: frozenset[int]) -> bool:
        """Pass on what the next token adds; whether the answer is at its end, as at one of
        `ends`."""
        if self.pending.closed:
            return True
        if self._again:
            self._again -= 1
            return False
        self.taken += 1
        if self.taken == 1:
            self.on_first_token(time.monotonic() - self.arrived)
        complete = token in ends and not self.ask.ignore_eos
        if not complete:
            self._pass_on(self.text.add(token))
        if complete or self.text.stopped or self.taken >= self.most_tokens:
            self._pass_on(self.text.end())
            stops = complete or self.text.stopped
            self.pending.put(End("stop" if stops else "length", self._usage()), last=True)
        return self.pending.closed

    def _usage(self) -> Usage:
        units, nbytes = self.base
        # The last token of an answer is not read.
        after = self.taken - 1 + (len(self.question) if self.context_tokens else 0)
        return Usage(
            prompt_tokens=self.context_tokens + len(self.question),
            cached_tokens=self.cached_tokens,
            completion_tokens=self.taken,
            units=round(units + after),
            bytes=round(nbytes + self.growth * after),
        )

    def _pass_on(self, text: str) -> None:
        if text:
            self.pending.put(Piece(text))


@dataclass(eq=False)
class ReadJob:
    """A context to read, and where the result goes."""

    ids: list[int]
    pending: Reading


Job = AskJob | ReadJob
"""What waits in the queue."""


LONG = 8192
"""Tokens from which on reading a prompt takes a device so long that it shows."""


def next_batch(waiting: Iterable[Job], most: int, most_units: int | None = None) -> list[Job]:
    """The first job, and in their order those behind it that can be answered with it.

    Args:
        waiting: the one that came first, first.
        most: jobs of a batch.
        most_units: that a KV head of all of them together can hold; None = not known.
    """
    jobs = iter(waiting)
    first = next(jobs)
    if not isinstance(first, AskJob):
        return [first]
    kind, chosen, units = _kind(first), [first], first.most_units
    for job in jobs:
        if len(chosen) >= most:
            break
        if not isinstance(job, AskJob) or _kind(job) != kind:
            continue
        if most_units is None or units + job.most_units <= most_units:
            chosen.append(job)
            units += job.most_units
    return [*chosen]


def joining(
    waiting: Iterable[Job], running: Sequence[AskJob], most: int, most_units: int | None = None
) -> list[AskJob]:
    """The jobs in front that can be answered with those that are being answered, which wait while
    a new prompt is read: no long one joins. None joins from behind another, which would wait for
    as long as some come. Arguments as of `next_batch`."""
    chosen: list[AskJob] = []
    units = sum(job.most_units for job in running)
    for job in waiting:
        if not isinstance(job, AskJob) or _joint(job) != _joint(running[0]):
            break
        units += job.most_units
        fits = most_units is None or 2 * units <= most_units  # rows are copied into a new batch
        if len(job.ask.prompt) > LONG or len(running) + len(chosen) >= most or not fits:
            break
        chosen.append(job)
    return chosen


def _kind(job: AskJob) -> tuple[object, ...]:
    """What requests of a batch agree in. Short prompts do not wait until long ones are read."""
    return *_joint(job), len(job.question) > LONG


def _joint(job: AskJob) -> tuple[object, ...]:
    """What requests agree in that go on together. Stock `generate` has one way to sample for all
    rows, and one generator: a seed is for one request."""
    ask = job.ask
    if ask.greedy:
        return job.has_context, "greedy"
    return job.has_context, ask.temperature, ask.top_p, None if ask.seed is None else id(job)
