"""What is done with the engine: contexts are read and requests answered, those that go together in
one call. Now and then an answer pauses, if others wait that can be given with it: each of them is
begun by itself, up to its first token, and goes on as one more row. Rows that are done leave then.
One thread alone calls the worker.
"""

import contextlib
import functools
import logging
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from locret.cache.cache import RetainedCache
from locret.engine.arguments import end_tokens, padded
from locret.engine.engine import Engine
from locret.model.hooks import cache_of
from locret.serve.contexts import Contexts, Prefixes, info_of
from locret.serve.jobs import AskJob, Job, ReadJob
from locret.serve.requests import Ask, Failed, RepeatsContext, TooLong, UnknownContext

LOG = logging.getLogger(__name__)

STEPS = 16
"""Tokens of an answer between two looks at what waits. A pause copies what rows hold, and a GPU
records its steps anew."""


Row = tuple[AskJob, RetainedCache]
"""A request that is being answered, and a cache of one row, the last token of which is not read."""


class Batch(NamedTuple):
    """Requests that are being answered, and the cache of their rows."""

    jobs: Sequence[AskJob]
    cache: RetainedCache

    def rows(self) -> Iterator[Row]:
        """One after the other; those that nobody waits for are left out."""
        for i, job in enumerate(self.jobs):
            if not job.pending.closed:
                yield job, self.cache.rows([i])


class Abandoned(Exception):
    """Nobody waits any more for what is being read."""


class Worker:
    """Answers jobs with an engine, which nothing else may use meanwhile, nor its model.

    Args:
        join: takes those that wait and can be answered with these (`locret.serve.jobs.joining`).
    """

    def __init__(
        self,
        engine: Engine,
        tokenizer: Any,
        contexts: Contexts,
        prefixes: Prefixes,
        join: Callable[[Sequence[AskJob]], Sequence[AskJob]] = lambda running: (),
    ) -> None:
        self._engine, self._contexts, self._prefixes = engine, contexts, prefixes
        self._device: Any = engine.model.device
        self._ends = frozenset(end_tokens(engine.model, tokenizer))
        self._join = join
        self._current: list[Job] = []
        self._asked: list[AskJob] = []  # to be answered now, and those that joined them
        self._new: Sequence[AskJob] = ()  # that paused the answer
        self._joins = True  # until memory is short
        self._beginning: AskJob | None = None  # while the others wait
        self._steps = 0
        self._progress, engine.progress = engine.progress, self._after_chunk

    def close(self) -> None:
        """Give the engine back as it was."""
        self._engine.progress = self._progress

    def work(self, jobs: Sequence[Job]) -> None:
        """Do jobs that go together (`locret.serve.jobs.next_batch`). Each is closed afterwards."""
        self._current, self._joins = [*jobs], True
        try:
            if isinstance(jobs[0], ReadJob):
                self._read(jobs[0])
            else:
                self._answer_all([job for job in jobs if isinstance(job, AskJob)])
        except Abandoned:
            pass
        except Exception as error:  # the service lives on, whatever one request does to it
            LOG.exception("%d requests failed", len(self._current))
            _fail(self._current, error)
        finally:
            self._current, self._asked, self._new = [], [], ()

    def _after_chunk(self, done: int, total: int) -> None:
        if self._progress is not None:
            self._progress(done, total)
        for job in self._current:
            if isinstance(job, ReadJob):
                job.pending.done = done
        waited_for = self._current if self._beginning is None else [self._beginning]
        if waited_for and all(job.pending.closed for job in waited_for):
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
        self._asked, self._new = [*jobs], ()
        if self._has_room(self._answer_groups):
            return
        could_free = self._prefixes.nbytes > 0
        self._free()
        left = _awaited(self._asked)
        if len(self._asked) > 1 or could_free:
            _fail([job for job in left if not job.repeatable], torch.OutOfMemoryError())
            left = _awaited(left)
            middle = (len(left) + 1) // 2
            for half in filter(None, (left[:middle], left[middle:])):
                self._answer_all(half)
        else:
            _fail(left, torch.OutOfMemoryError())

    def _answer_groups(self) -> None:
        """Answer `_asked` in as few calls as their contexts allow; in one where they have none."""
        groups: dict[tuple[str, ...], list[tuple[AskJob, list[RetainedCache]]]] = {}
        for job in _awaited(self._asked):
            caches = self._contexts_of(job)
            if caches is not None:
                groups.setdefault((*map(_settings_of, caches),), []).append((job, caches))
        for group in groups.values():
            self._answer([job for job, _ in group], [cache for _, own in group for cache in own])
        if _awaited(self._asked):  # that wanted to join, and could not
            self._answer_groups()

    def _contexts_of(self, job: AskJob) -> list[RetainedCache] | None:
        """The context that a job asks, if it asks any; None = it cannot be asked, and is closed."""
        if not job.has_context:
            return []
        try:
            cache = self._context_of(job)
            _check_not_repeated(job, cache)
        except (UnknownContext, RepeatsContext) as error:  # what the client can mend
            job.pending.close(error.with_traceback(None))
        except ValueError as error:
            _fail([job], error)
        else:
            return [cache]
        return None

    def _has_room(self, do: Callable[[], None]) -> bool:
        """Do something; False where memory was too short for it. All that it held is let go."""
        try:
            do()
        except torch.OutOfMemoryError:
            self._joins = False
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
            cached = cache.seen
        else:
            cache, cached = self._prefix_of(job)
        if not job.context_tokens:  # else it is begun once more
            job.cached_tokens = cached
        info = info_of(cache)
        job.context_tokens, job.base = cache.seen, (info.units, info.bytes)
        return cache

    def _prefix_of(self, job: AskJob) -> tuple[RetainedCache, int]:
        """The shared tokens of a job, read, and how many of them had been read before."""
        tokens = job.ask.prompt[: job.shared]
        cache = self._prefixes.get(tokens)
        if cache is not None:
            return cache, job.shared
        cache = self._read_context(tokens)
        self._prefixes.put(tokens, cache)
        return cache, 0

    def _answer(self, jobs: Sequence[AskJob], caches: Sequence[RetainedCache]) -> None:
        """Answer jobs on contexts, or without any, and with them those that join."""
        if caches and len({len(job.question) for job in jobs}) > 1:
            each = zip(jobs, caches, strict=True)
            batches = self._batches([row for job, own in each for row in self._row(job, [own])])
        else:
            batches = self._joined(self._begin(jobs, caches))
        while batches:  # which shall not hold what goes on
            batches = self._joined(self._go_on(batches.pop(0))) + batches

    def _joined(self, batch: Batch) -> list[Batch]:
        """What goes on after a call: nothing, or, where it paused, its rows with those that join;
        as it was, where memory is too short for that."""
        new, self._new = self._new, ()
        if not new:
            return []
        try:
            rows = [*batch.rows()]
        except torch.OutOfMemoryError:
            self._joins = False
            return [batch]
        del batch  # whose memory the rows take
        for job in _awaited(new) if rows else ():
            rows += self._begun(job, _settings_of(rows[0][1]))
        return self._batches(rows)

    def _begun(self, job: AskJob, settings: str) -> list[Row]:
        """A job with its first token, as a row of a batch of such settings, if it is to go on; none
        where it is to wait until the batch is done."""
        self._beginning = job
        try:
            caches = self._contexts_of(job)
            if caches is None or any(_settings_of(cache) != settings for cache in caches):
                return []
            return self._row(job, caches)
        except torch.OutOfMemoryError:
            self._joins = False
        except Abandoned:
            pass
        except Exception as error:  # the others go on
            LOG.exception("a request failed")
            _fail([job], error)
        finally:
            self._beginning = None
        return []

    def _row(self, job: AskJob, caches: Sequence[RetainedCache]) -> list[Row]:
        """A job with its first token, if it is to go on."""
        _, cache = self._begin([job], caches, once=True)
        return [(job, cache) for job in _awaited([job])]

    def _batches(self, rows: Sequence[Row]) -> list[Batch]:
        """All rows as a batch; one after the other where memory is too short for it."""
        jobs, caches = [job for job, _ in rows], [cache for _, cache in rows]
        try:
            return [Batch(jobs, self._engine.together(caches))] if rows else []
        except torch.OutOfMemoryError:
            self._joins = False
            return [Batch([job], cache) for job, cache in rows]

    def _begin(
        self, jobs: Sequence[AskJob], caches: Sequence[RetainedCache], once: bool = False
    ) -> Batch:
        """Answer jobs from the beginning in one call, without contexts, or all on one with
        questions of one length; `once`: no more than a token."""
        cache = None
        if caches:
            cache = caches[0].fork() if len(caches) == 1 else self._engine.together(caches)
        for job in jobs:
            job.start()
        ids, mask = padded([job.question for job in jobs], self._device)
        return Batch(jobs, self._generate(jobs, ids, mask, cache, once))

    def _go_on(self, batch: Batch) -> Batch:
        """Answer jobs further in one call, whose last tokens are not read yet."""
        jobs, cache = batch
        nothing = torch.empty(len(jobs), 0, dtype=torch.long, device=self._device)
        return Batch(jobs, self._generate(jobs, nothing, None, cache))

    def _generate(
        self,
        jobs: Sequence[AskJob],
        ids: Tensor,
        mask: Tensor | None,
        cache: RetainedCache | None,
        once: bool = False,
    ) -> RetainedCache:
        """The cache after the answers: that given, or a new one."""
        seed = None if jobs[0].ask.greedy else jobs[0].ask.seed
        devices = [self._device] if self._device.type == "cuda" else []
        with torch.random.fork_rng(devices, enabled=seed is not None):
            if seed is not None:
                torch.manual_seed(seed)
            output = self._engine.generate(
                ids,
                mask,
                cache=cache,
                max_new_tokens=max(1, *(job.left for job in jobs)),
                stopping_criteria=[functools.partial(self._take, jobs, once)],
                eos_token_id=None,  # `_take` ends rows; those that are done go on unseen
                return_dict_in_generate=True,
                **_sampling(jobs[0].ask),
            )
        after: RetainedCache = cache_of(output)
        return after

    def _take(
        self, jobs: Sequence[AskJob], once: bool, input_ids: Tensor, scores: Any, **kwargs: Any
    ) -> Tensor:
        """Pass on the new token of every row; which rows `generate`, which calls this at each step,
        is done with: all where it is to pause."""
        tokens = input_ids[:, -1].tolist()
        done = [job.take(token, self._ends) for job, token in zip(jobs, tokens, strict=True)]
        self._steps += 1
        if not once and self._steps % STEPS == 0:
            self._look(jobs)
        pauses = once or bool(self._new)
        return torch.tensor([pauses or each for each in done], device=input_ids.device)

    def _look(self, jobs: Sequence[AskJob]) -> None:
        """Let others join, unless some of those to be answered wait for a call of their own."""
        running = _awaited(self._asked)
        if self._joins and running and len(running) == len(_awaited(jobs)):
            self._new = [*self._join(running)]
            self._asked += self._new
            self._current += self._new


def _awaited(jobs: Sequence[AskJob]) -> list[AskJob]:
    """Those that somebody waits for."""
    return [job for job in jobs if not job.pending.closed]


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
