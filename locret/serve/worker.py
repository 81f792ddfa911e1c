"""Uses the engine: reads contexts and answers batches. One thread alone calls it."""

import contextlib
import logging
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import StoppingCriteria

from locret.cache.cache import RetainedCache
from locret.engine.arguments import end_tokens, padded
from locret.engine.engine import Engine
from locret.serve.contexts import Contexts, Prefixes, info_of
from locret.serve.jobs import AskJob, Job, ReadJob
from locret.serve.limits import Limits
from locret.serve.requests import Failed, RepeatsContext, TooLong, UnknownContext

LOG = logging.getLogger(__name__)


class Abandoned(Exception):
    """Nobody waits any more for what is being read."""


class Worker:
    """Answers jobs with an engine, which nothing else may use meanwhile, nor its model.

    `on_token` is called with a job after each token of its answer.
    """

    def __init__(
        self,
        engine: Engine,
        tokenizer: Any,
        contexts: Contexts,
        prefixes: Prefixes,
        limits: Limits,
        on_token: Callable[[AskJob], None] = lambda job: None,
    ) -> None:
        self._engine, self._contexts, self._prefixes = engine, contexts, prefixes
        self._limits, self._on_token = limits, on_token
        self._device: Any = engine.model.device
        self._ends = frozenset(end_tokens(engine.model, tokenizer))
        self._current: Sequence[Job] = ()
        self._progress, engine.progress = engine.progress, self._after_chunk

    def close(self) -> None:
        """Give the engine back as it was."""
        self._engine.progress = self._progress

    def work(self, jobs: Sequence[Job]) -> None:
        """Do jobs that go together (`locret.serve.jobs`). Each is closed afterwards."""
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
        if self._current and all(job.closed for job in self._current):
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
        left = [job for job in jobs if not job.closed]
        if len(jobs) > 1 or could_free:
            _fail([job for job in left if not job.repeatable], torch.OutOfMemoryError())
            left = [job for job in left if not job.closed]
            middle = (len(left) + 1) // 2
            for half in filter(None, (left[:middle], left[middle:])):
                self._answer_all(half)
        else:
            _fail(left, torch.OutOfMemoryError())

    def _answer_groups(self, jobs: Sequence[AskJob]) -> None:
        for together, caches in self._with_contexts([job for job in jobs if not job.closed]):
            self._answer(together, caches)

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

    def _with_contexts(
        self, jobs: Sequence[AskJob]
    ) -> Iterator[tuple[list[AskJob], list[RetainedCache]]]:
        """Jobs that can be asked in one call, and their contexts; none where jobs have none."""
        if not jobs:
            return
        if jobs[0].ask.context is None and not jobs[0].shared:
            for job in jobs:
                self._expect_prompt(job)
            yield [*jobs], []
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
            yield [job for job, _ in group], [cache for _, cache in group]

    def _expect_prompt(self, job: AskJob) -> None:
        """Foresee what the cache of a prompt will hold: stock `generate` does not show it."""
        tokens, sizing = len(job.question), self._engine.sizing
        read = max(0, tokens - self._limits.unread)
        units = self._limits.units(read) + tokens - read
        layers = [round(units)] * sizing.num_layers
        job.base = units, sizing.cache_bytes(layers) + sizing.window_bytes(tokens)
        job.growth = self._growth

    @property
    def _growth(self) -> int:
        """Bytes of one more token, stored as it is."""
        sizing = self._engine.sizing
        unit = 2 * sizing.head_size * sizing.element_size + 4
        return unit * sizing.num_layers * sizing.num_kv_heads

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
        job.context_tokens, job.growth = cache.seen, self._growth
        job.base = info.units, info.bytes
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
        with self._seeded(jobs[0].ask.seed if jobs[0].ask.temperature else None):
            self._engine.generate(
                ids,
                mask,
                max_new_tokens=max(job.most_tokens for job in jobs),
                stopping_criteria=[_Watch(jobs, self._ends, self._on_token)],
                eos_token_id=None,  # `_Watch` ends rows; those that are done go on unseen
                **_sampling(jobs[0]),
                **given,
            )

    @contextlib.contextmanager
    def _seeded(self, seed: int | None) -> Iterator[None]:
        """Sample from a seed of its own, if there is one, and leave the generators as they were."""
        if seed is None:
            yield
            return
        devices = [self._device] if self._device.type == "cuda" else []
        with torch.random.fork_rng(devices):
            torch.manual_seed(seed)
            yield


class _Watch(StoppingCriteria):
    """Sees the new token of every row at each step, passes it on, and ends rows."""

    def __init__(
        self,
        jobs: Sequence[AskJob],
        ends: frozenset[int],
        on_token: Callable[[AskJob], None],
    ) -> None:
        self._jobs, self._ends, self._on_token = jobs, ends, on_token

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        tokens = input_ids[:, -1].tolist()
        done = [self._take(job, token) for job, token in zip(self._jobs, tokens, strict=True)]
        return torch.tensor(done, device=input_ids.device)

    def _take(self, job: AskJob, token: int) -> bool:
        before = job.taken
        done = job.take(token, self._ends)
        if job.taken > before:
            self._on_token(job)
        return done


def _sampling(job: AskJob) -> dict[str, Any]:
    if job.ask.temperature == 0:
        return {"do_sample": False}
    return {
        "do_sample": True,
        "temperature": job.ask.temperature,
        "top_p": job.ask.top_p,
        "top_k": 0,
    }


def _settings_of(cache: RetainedCache) -> str:
    """What contexts agree in that are asked in one call."""
    scheme, longrope = cache.scheme, cache.longrope
    settings = cache.positions, scheme, cache.merging, cache.recall, longrope, cache.query_length
    return repr(settings)


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
