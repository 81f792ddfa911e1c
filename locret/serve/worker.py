"""What is done with the engine: which requests go together, how contexts are read and batches
answered, and how the tokens of an answer become its events. One thread alone calls the worker.
"""

import contextlib
import functools
import logging
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from locret.cache.cache import RetainedCache
from locret.engine.arguments import end_tokens, padded
from locret.engine.engine import Engine
from locret.serve.contexts import Contexts, Prefixes, info_of
from locret.serve.requests import (
    Answer,
    Ask,
    End,
    Failed,
    Piece,
    Reading,
    RepeatsContext,
    TextOf,
    TooLong,
    UnknownContext,
    Usage,
)

LOG = logging.getLogger(__name__)


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


def _kind(job: AskJob) -> tuple[object, ...]:
    """What requests of a batch agree in. Stock `generate` has one way to sample for all rows, and
    one generator: a seed is for one request. The engine cannot ask questions of one token together
    with longer ones. Short prompts do not wait until long ones are read."""
    ask, length = job.ask, len(job.question)
    shape = job.has_context, job.has_context and length == 1, length > LONG
    if ask.greedy:
        return (*shape, "greedy")
    alone = None if ask.seed is None else id(job)
    return (*shape, ask.temperature, ask.top_p, alone)


class Abandoned(Exception):
    """Nobody waits any more for what is being read."""


class Worker:
    """Answers jobs with an engine, which nothing else may use meanwhile, nor its model."""

    def __init__(
        self, engine: Engine, tokenizer: Any, contexts: Contexts, prefixes: Prefixes
    ) -> None:
        self._engine, self._contexts, self._prefixes = engine, contexts, prefixes
        self._device: Any = engine.model.device
        self._ends = frozenset(end_tokens(engine.model, tokenizer))
        self._current: Sequence[Job] = ()
        self._progress, engine.progress = engine.progress, self._after_chunk

    def close(self) -> None:
        """Give the engine back as it was."""
        self._engine.progress = self._progress

    def work(self, jobs: Sequence[Job]) -> None:
        """Do jobs that go together (`next_batch`). Each is closed afterwards."""
        self._current = jobs
        try:
            if isinstance(jobs[0], ReadJob):
                self._read(jobs[0])
            else:
                self._answer_all([job for job in jobs if isinstance(job, AskJob)])
        except Abandoned:
            pass
        except Exception as error:  # the service lives on, whatever one request does to it
            LOG.exception("%d requests failed", len(jobs))
            _fail(jobs, error)
        finally:
            self._current = ()

    def _after_chunk(self, done: int, total: int) -> None:
        if self._progress is not None:
            self._progress(done, total)
        for job in self._current:
            if isinstance(job, ReadJob):
                job.pending.done = done
        if self._current and all(job.pending.closed for job in self._current):
            raise Abandoned

    def _read(self, job: ReadJob) -> None:
        """Read and store a context; once more with all memory there is, if it is short."""
        if not self._has_room(lambda: self._store(job)):
            self._free()
            self._store(job)

    def _store(self, job: ReadJob) -> None:
        try:
            info = self._contexts.put(self._read_context(job.ids))
        except TooLong as error:
            job.pending.close(error.with_traceback(None))  # which would keep the context alive
            return
        if not job.pending.put(info, last=True):
            with contextlib.suppress(UnknownContext):
                self._contexts.delete(info.id)

    def _read_context(self, ids: Sequence[int]) -> RetainedCache:
        tokens = torch.tensor([ids], device=self._device)
        # Ones, because a padding token within a text is a token.
        return self._engine.prefill(tokens, torch.ones_like(tokens))

    def _answer_all(self, jobs: Sequence[AskJob]) -> None:
        """Answer jobs; by halves, where memory is short."""
        if self._has_room(lambda: self._answer_groups(jobs)):
            return
        could_free = self._prefixes.nbytes > 0
        self._free()
        left = _awaited(jobs)
        if len(jobs) > 1 or could_free:
            _fail([job for job in left if not job.repeatable], torch.OutOfMemoryError())
            left = _awaited(left)
            middle = (len(left) + 1) // 2
            for half in filter(None, (left[:middle], left[middle:])):
                self._answer_all(half)
        else:
            _fail(left, torch.OutOfMemoryError())

    def _answer_groups(self, jobs: Sequence[AskJob]) -> None:
        """Answer jobs in as few calls as their contexts allow; in one where they have none."""
        jobs = _awaited(jobs)
        if jobs and not jobs[0].has_context:
            self._answer(jobs, [])
            return
        groups: dict[str, list[tuple[AskJob, RetainedCache]]] = {}
        for job in jobs:
            try:
                cache = self._context_of(job)
                _check_not_repeated(job, cache)
            except (UnknownContext, RepeatsContext) as error:  # what the client can mend
                job.pending.close(error.with_traceback(None))
            except ValueError as error:
                _fail([job], error)
            else:
                groups.setdefault(_settings_of(cache), []).append((job, cache))
        for group in groups.values():
            self._answer([job for job, _ in group], [cache for _, cache in group])

    @staticmethod
    def _has_room(do: Callable[[], None]) -> bool:
        """Do something; False where memory was too short for it. All that it held is let go."""
        try:
            do()
        except torch.OutOfMemoryError:
            return False
        return True

    def _free(self) -> None:
        self._prefixes.clear()
        self._contexts.forget_loaded()
        if self._device.type == "cuda":
            torch.cuda.empty_cache()

    def _context_of(self, job: AskJob) -> RetainedCache:
        """The context that a job asks, stored before or read now."""
        if job.ask.context is not None:
            cache = self._contexts.get(job.ask.context, self._engine.model)
            evicts = self._engine.config.reading.decode_interval is not None
            if evicts and cache.budget is not None and not cache.scored:
                raise UnknownContext(
                    f"context {job.ask.context} was read without decode_interval, which this "
                    "server answers with; upload it again"
                )
            job.cached_tokens = cache.seen
        else:
            cache = self._prefix_of(job)
        info = info_of(cache)
        job.context_tokens, job.base = cache.seen, (info.units, info.bytes)
        return cache

    def _prefix_of(self, job: AskJob) -> RetainedCache:
        tokens = job.ask.prompt[: job.shared]
        cache = self._prefixes.get(tokens)
        if cache is not None:
            job.cached_tokens = job.shared
            return cache
        job.cached_tokens = 0
        cache = self._read_context(tokens)
        self._prefixes.put(tokens, cache)
        return cache

    def _answer(self, jobs: Sequence[AskJob], caches: Sequence[RetainedCache]) -> None:
        """Answer jobs in one call, on contexts or without any."""
        questions = [job.question for job in jobs]
        given: dict[str, Any] = {}
        if len(caches) == 1:
            given["cache"] = caches[0].fork()
        elif len(set(map(len, questions))) == 1 and caches:
            given["cache"] = self._engine.together(caches)
        elif caches:
            before = [torch.tensor([ids[:-1]]) for ids in questions]
            given["cache"] = self._engine.together(caches, before)
            questions = [ids[-1:] for ids in questions]
        ids, mask = padded(questions, self._device)
        for job in jobs:
            job.start()
        seed = None if jobs[0].ask.greedy else jobs[0].ask.seed
        devices = [self._device] if self._device.type == "cuda" else []
        with torch.random.fork_rng(devices, enabled=seed is not None):
            if seed is not None:
                torch.manual_seed(seed)
            self._engine.generate(
                ids,
                mask,
                max_new_tokens=max(job.most_tokens for job in jobs),
                stopping_criteria=[functools.partial(_take, jobs, self._ends)],
                eos_token_id=None,  # `_take` ends rows; those that are done go on unseen
                **_sampling(jobs[0].ask),
                **given,
            )


def _awaited(jobs: Sequence[AskJob]) -> list[AskJob]:
    """Those that somebody waits for."""
    return [job for job in jobs if not job.pending.closed]


def _take(
    jobs: Sequence[AskJob], ends: frozenset[int], input_ids: Tensor, scores: Any, **kwargs: Any
) -> Tensor:
    """Pass on the new token of every row; which rows are done. `generate` calls it at each step."""
    tokens = input_ids[:, -1].tolist()
    done = [job.take(token, ends) for job, token in zip(jobs, tokens, strict=True)]
    return torch.tensor(done, device=input_ids.device)


def _sampling(ask: Ask) -> dict[str, Any]:
    if ask.greedy:
        return {"do_sample": False}
    return {"do_sample": True, "temperature": ask.temperature, "top_p": ask.top_p, "top_k": 0}


def _settings_of(cache: RetainedCache) -> str:
    """What contexts agree in that are asked in one call."""
    limited = cache.budget is not None
    return repr((cache.settings, cache.longrope, cache.query_length, limited))


def _check_not_repeated(job: AskJob, cache: RetainedCache) -> None:
    """Refuse one job for what the engine would refuse all of a batch for. Raises RepeatsContext:
    the question begins with all of its context."""
    tokens = cache.token_ids
    assert tokens is not None
    if len(job.question) >= cache.seen and job.question[: cache.seen] == tokens[0].tolist():
        raise RepeatsContext("the prompt begins with the whole context; send only what follows it")


def _fail(jobs: Sequence[Job], error: Exception) -> None:
    """Close jobs with what went wrong, in one sentence."""
    sentence = " ".join(str(error).split("\n")[0].split())
    if isinstance(error, torch.OutOfMemoryError):
        sentence = "the device's memory is too small for it beside what is stored"
    failed = Failed(f"the request failed: {sentence or type(error).__name__}")
    for job in jobs:
        job.pending.close(failed)
