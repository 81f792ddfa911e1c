"""The service: requests of any number of threads, answered by one engine.

Requests wait in a bounded queue. One thread owns the engine; it takes the first request and those
behind it that can be answered together, does them, and goes on. Rows do not join a batch that runs.
"""

import copy
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch

from locret.engine.engine import Engine
from locret.serve.answers import Answer, Reading
from locret.serve.contexts import Contexts, Prefixes
from locret.serve.jobs import AskJob, Job, ReadJob, next_batch
from locret.serve.limits import Limits
from locret.serve.requests import Ask, Cancelled, Counters, End, Failed, QueueFull
from locret.serve.texts import TextOf
from locret.serve.worker import Worker

SHARED_LEAST = 256
"""Tokens from which on a shared beginning of prompts is kept: fewer are read as fast."""
COLDEST = 1e-6
"""Lower temperatures are 0: logits divided by them may be infinite, which nothing is drawn from."""
LAST_STEP = 60.0
"""Seconds, at least, for the chunk or step that runs: a process does not end well within one."""
SMOOTHING = 0.2  # weight of the newest batch in the seconds that one takes


class Service:
    """Answers requests with one engine, in a thread of its own.

    Args:
        engine: nothing else may use it, or its model, while the service runs.
        tokenizer: of the model.
        contexts: where contexts are stored; None = in memory, without a limit.
        queue: requests that may wait.
        batch: requests that are answered together. In 16 bits a row of a batch is rounded otherwise
            than alone, so that its words may differ; 1 = every answer is as the engine's alone.
        max_tokens: most tokens of an answer whose request does not say.
        memory: bytes that the process may use on the device; None = not known.
        prefix_bytes: that beginnings which requests share may take in memory; 0 = none is kept.
        linger: seconds to wait for another request when one comes that could be answered with it.

    Attributes:
        on_first_token: called with the seconds from a request to the first token of its answer, in
            the generation thread.
    """

    def __init__(
        self,
        engine: Engine,
        tokenizer: Any,
        *,
        contexts: Contexts | None = None,
        queue: int = 64,
        batch: int = 8,
        max_tokens: int = 1024,
        memory: int | None = None,
        prefix_bytes: int = 2**30,
        linger: float = 0.005,
    ) -> None:
        for name, value in (("queue", queue), ("batch", batch), ("max_tokens", max_tokens)):
            if value < 1:
                raise ValueError(f"{name} is {value}; expected at least 1")
        self.engine, self.tokenizer = engine, tokenizer
        self.contexts = Contexts() if contexts is None else contexts
        # Of the generation thread's own: tokenizers are not made for several threads.
        self._decoder = copy.deepcopy(tokenizer)
        self.on_first_token: Callable[[float], None] = lambda seconds: None
        self._queue, self._linger, self._max_tokens = queue, linger, max_tokens
        # Questions that others must not be asked with are asked alone.
        self._batch = batch if engine.asks_together else 1
        self.limits = Limits(engine, memory, prefix_bytes + self.contexts.device_bytes)
        self._prefixes = Prefixes(prefix_bytes)
        embeddings: Any = engine.backbone.model.get_input_embeddings()
        self._vocabulary: int = embeddings.num_embeddings
        self._device: Any = engine.model.device
        self._waiting: deque[Job] = deque()
        self._running: list[Job] = []
        self._changed = threading.Condition()
        self._closing = self._stopped = False
        self._thread: threading.Thread | None = None
        self._counts = Counters()
        self._seconds = 1.0  # that a batch takes

    @property
    def ready(self) -> bool:
        """Whether requests are answered now."""
        return self._thread is not None and self._thread.is_alive() and not self._closing

    @property
    def counts(self) -> Counters:
        """Numbers for operators, as they are now."""
        # Before the lock is taken: contexts may have to be looked up on disk.
        in_memory, stored = self.contexts.bytes_in_memory, self.contexts.count
        with self._changed:
            return replace(
                self._counts,
                queued=len(self._waiting),
                running=len([job for job in self._running if not job.closed]),
                contexts=stored,
                bytes=in_memory + self._prefixes.nbytes,
            )

    def start(self) -> None:
        """Begin to answer."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="locret-generation", daemon=True)
            self._thread.start()

    def close(self, drain: bool = True, seconds: float = 60.0) -> None:
        """Refuse new requests and end.

        Args:
            drain: finish those that wait or run first; False = cancel them.
            seconds: to wait for them; what is not done then is cancelled.
        """
        with self._changed:
            self._closing = True
            if drain and self._thread is not None:
                self._changed.wait_for(lambda: not (self._waiting or self._running), seconds)
            left = [*self._waiting, *self._running]
        for job in left:
            job.pending.cancel()
        with self._changed:
            self._stopped = True
            self._changed.notify_all()
        if self._thread is not None:
            self._thread.join(max(seconds, LAST_STEP))

    def ask(self, ask: Ask) -> Answer:
        """Queue a request; thread-safe, does not wait for anything.

        Raises:
            QueueFull: try again later.
            TooLong: it cannot fit; says what would.
            UnknownContext: there is no such context.
            ValueError: there is nothing to answer, or a number out of range.
        """
        _check(ask)
        self._check_tokens(ask.prompt)
        if ask.temperature < COLDEST:
            ask = replace(ask, temperature=0.0)
        prompt, context, shared, slots, units = len(ask.prompt), None, 0, 0, 0
        if ask.context is not None:
            info = self.contexts.use(ask.context)
            context, units = info.tokens, info.units
            slots = max(info.slots, units)
        elif shared := self._shared(ask):
            prompt, context = prompt - shared, shared
        most = self.limits.answer_tokens(prompt, context, ask.max_tokens, self._max_tokens, slots)
        answer = Answer()
        units = self.limits.mean_needed(prompt, context, most, units)
        job = AskJob(ask, most, answer, TextOf(self._decoder, ask.stop), shared, units)
        answer.on_end = lambda: self._ended(job)
        self._enqueue(job)
        return answer

    def read(self, ids: list[int]) -> Reading:
        """Queue a context to be read and stored; thread-safe, does not wait for anything.

        Raises:
            QueueFull, TooLong: as for `ask`.
            ValueError: no tokens, or an engine that reads for one question; says why.
        """
        self._check_tokens(ids)
        if self._needs_query:
            raise ValueError(
                "this engine reads a context for one question only (query_aware, or heads that are "
                "query-aware); send the whole prompt instead"
            )
        self.limits.check_context(len(ids))
        reading = Reading()
        job = ReadJob([*ids], reading)
        reading.on_end = lambda: self._ended(job)
        self._enqueue(job)
        return reading

    def _check_tokens(self, ids: Sequence[int]) -> None:
        """Raises ValueError: there are none, or the model has no such token."""
        if not ids:
            raise ValueError("there are no tokens to read; send some text")
        if min(ids) < 0 or max(ids) >= self._vocabulary:
            raise ValueError(
                f"token ids are {min(ids)} to {max(ids)}; expected 0 to {self._vocabulary - 1}"
            )

    @property
    def _needs_query(self) -> bool:
        config = self.engine.config
        evicts = config.reading.budget is not None
        return evicts and bool(config.reading.query_aware or config.recorded.query_tokens)

    def _shared(self, ask: Ask) -> int:
        """Leading tokens of a prompt to read as a context that is kept."""
        shared = min(ask.shared, len(ask.prompt) - 1)
        if shared < SHARED_LEAST or not self._prefixes.most_bytes or self._needs_query:
            return 0
        if not self.limits.readable(shared):  # whether it fits as a whole is looked at then
            return 0
        # The engine takes a question that begins with its whole context for a mistake.
        repeats = ask.prompt[shared : 2 * shared] == ask.prompt[:shared]
        return 0 if repeats else shared

    def _enqueue(self, job: Job) -> None:
        with self._changed:
            if self._closing:
                raise QueueFull("the service is closing; ask another one", self._seconds)
            if len(self._waiting) >= self._queue:
                self._count(refused=1)
                rounds = 1 + len(self._waiting) // self._batch
                raise QueueFull(
                    f"{len(self._waiting)} requests wait, which is as many as may; try again later",
                    round(max(1.0, rounds * self._seconds), 1),
                )
            self._waiting.append(job)
            self._changed.notify_all()

    def _ended(self, job: Job) -> None:
        """Take a job that ended into account, whatever ended it."""
        with self._changed:
            if job in self._waiting:
                self._waiting.remove(job)
            self._count_end(job)
            self._changed.notify_all()

    def _count(self, **more: int) -> None:
        """Add to the numbers; the lock is taken."""
        sums = {name: getattr(self._counts, name) + number for name, number in more.items()}
        self._counts = replace(self._counts, **sums)

    def _run(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.set_device(self._device)  # kernels are launched on a thread's own device
        worker = Worker(
            self.engine,
            self._decoder,
            self.contexts,
            self._prefixes,
            self.limits,
            self._after_token,
        )
        try:
            while jobs := self._next():
                began = time.monotonic()
                worker.work(jobs)
                self._finish(time.monotonic() - began)
        finally:
            worker.close()
            self._give_up()

    def _give_up(self) -> None:
        """Let nobody wait for a thread that has ended."""
        with self._changed:
            self._closing = True
            left = [*self._waiting, *self._running]
        for job in left:
            job.pending.close(Failed("the request failed: the service has ended"))

    def _next(self) -> list[Job]:
        """The jobs to do next, once there are any; none when the service has ended."""
        with self._changed:
            self._changed.wait_for(lambda: self._waiting or self._stopped)
            if not self._waiting:
                return []
            self._gather()
            if self._waiting:
                most_units = self.limits.most_units
                self._running = next_batch(self._waiting, self._batch, most_units)
            for job in self._running:
                self._waiting.remove(job)
        return self._running or self._next()

    def _gather(self) -> None:
        """Wait for those who come right behind each other; the lock is taken."""
        known = 0
        while known < len(self._waiting) < self._batch:
            known = len(self._waiting)
            self._changed.wait(self._linger)

    def _after_token(self, job: AskJob) -> None:
        if job.taken == 1:
            self.on_first_token(time.monotonic() - job.arrived)

    def _finish(self, seconds: float) -> None:
        with self._changed:
            self._running = []
            self._seconds += SMOOTHING * (seconds - self._seconds)
            self._changed.notify_all()

    def _count_end(self, job: Job) -> None:
        last, error = job.pending.outcome
        if isinstance(last, End):
            self._count(answered=1, **last.usage.tokens)
            self._counts = replace(self._counts, units=last.usage.units)
        elif error is None:
            self._count(read=1)
        elif isinstance(error, Cancelled):
            self._count(cancelled=1)
        else:
            self._count(failed=1)


def _check(ask: Ask) -> None:
    """Raises ValueError: says what is out of range."""
    if ask.max_tokens is not None and ask.max_tokens < 1:
        raise ValueError(f"max_tokens is {ask.max_tokens}; expected at least 1")
    if not 0 <= ask.temperature < float("inf"):
        raise ValueError(f"temperature is {ask.temperature}; expected 0 or more")
    if not 0 < ask.top_p <= 1:
        raise ValueError(f"top_p is {ask.top_p}; expected more than 0 and at most 1")
    if any(not stop for stop in ask.stop):
        raise ValueError("a stop string is empty; leave it out")
