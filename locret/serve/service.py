"""The service: requests of any number of threads, answered by one engine.

Requests that fit the window and the memory (`limits.py`) wait in a bounded queue. One thread owns
the engine; it takes the first request and those behind it that can be answered together, does them
(`worker.py`), with others that may join meanwhile, and goes on.
"""

import copy
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Sequence
from typing import Any

import torch

from locret.engine.engine import Engine
from locret.serve.contexts import Contexts, Prefixes
from locret.serve.jobs import AskJob, Job, ReadJob, joining, next_batch
from locret.serve.limits import Limits
from locret.serve.requests import (
    Answer,
    Ask,
    Cancelled,
    Counters,
    End,
    Failed,
    QueueFull,
    Reading,
    Stopping,
    TextOf,
)
from locret.serve.worker import Worker

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
        self._sums: Counter[str] = Counter()
        self._units = 0  # at the end of the last answer
        self._seconds = 1.0  # that a batch takes, or until others join it
        self._began = 0.0

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
            return Counters(
                queued=len(self._waiting),
                running=sum(not job.pending.closed for job in self._running),
                contexts=stored,
                units=self._units,
                bytes=in_memory + self._prefixes.nbytes,
                **self._sums,
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
        for job in self._left(seconds if drain and self._thread is not None else 0):
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
            Stopping: ask another one.
            TooLong: it cannot fit; says what would.
            UnknownContext: there is no such context.
            ValueError: there is nothing to answer, or a token that the model does not have.
        """
        self._check_tokens(ask.prompt)
        prompt, context, shared, slots, units = len(ask.prompt), None, 0, 0, 0
        if ask.context is not None:
            info = self.contexts.use(ask.context)
            context, units = info.tokens, info.units
            slots = max(info.slots, units)
        elif shared := self._shared(ask):
            prompt, context = prompt - shared, shared
        most = self.limits.answer_tokens(prompt, context, ask.max_tokens, self._max_tokens, slots)
        job = AskJob(
            ask,
            most,
            Answer(),
            TextOf(self._decoder, ask.stop),
            shared=shared,
            most_units=self.limits.needed(prompt, context, most, units, mean=True),
            base=self.limits.kept(prompt) if context is None else (0.0, 0),
            growth=self.limits.token_bytes,
            on_first_token=lambda seconds: self.on_first_token(seconds),
        )
        self._enqueue(job)
        return job.pending

    def read(self, ids: list[int]) -> Reading:
        """Queue a context to be read and stored; thread-safe, does not wait for anything.

        Raises:
            QueueFull, Stopping, TooLong: as for `ask`.
            ValueError: no tokens, or an engine that reads for one question; says why.
        """
        self._check_tokens(ids)
        if self._needs_query:
            raise ValueError(
                "this engine reads a context for one question only (query_aware, or heads that are "
                "query-aware); send the whole prompt instead"
            )
        self.limits.check_context(len(ids))
        job = ReadJob([*ids], Reading())
        self._enqueue(job)
        return job.pending

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
        reading, recorded = self.engine.config.reading, self.engine.config.recorded
        return reading.budget is not None and bool(reading.query_aware or recorded.query_tokens)

    def _shared(self, ask: Ask) -> int:
        """Leading tokens of a prompt to read as a context that is kept."""
        shared = 0 if self._needs_query else self._prefixes.shared(ask.prompt, ask.shared)
        # Whether the prompt fits as a whole is looked at then.
        return shared if shared and self.limits.readable(shared) else 0

    def _enqueue(self, job: Job) -> None:
        job.pending.on_end = lambda: self._ended(job)
        with self._changed:
            if self._closing:
                raise Stopping("the service is closing; ask another one")
            if len(self._waiting) >= self._queue:
                self._sums["refused"] += 1
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
            last, error = job.pending.outcome
            if isinstance(last, End):
                self._sums.update(answered=1, **last.usage.tokens)
                self._units = last.usage.units
            elif error is None:
                self._sums["read"] += 1
            else:
                self._sums["cancelled" if isinstance(error, Cancelled) else "failed"] += 1
            self._changed.notify_all()

    def _run(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.set_device(self._device)  # kernels are launched on a thread's own device
        answers = self.engine, self._decoder, self.contexts, self._prefixes
        worker = Worker(*answers, self._join)
        try:
            while jobs := self._next():
                self._began = time.monotonic()
                worker.work(jobs)
                with self._changed:
                    self._running = []
                    self._measure()
                    self._changed.notify_all()
        finally:
            worker.close()
            for job in self._left():  # nobody shall wait for a thread that has ended
                job.pending.close(Failed("the request failed: the service has ended"))

    def _left(self, seconds: float = 0) -> list[Job]:
        """Take no more jobs, and wait so long for those there are: what is left of them."""
        with self._changed:
            self._closing = True
            self._changed.wait_for(lambda: not (self._waiting or self._running), seconds)
            return [*self._waiting, *self._running]

    def _next(self) -> list[Job]:
        """The jobs to do next, once there are any; none when the service has ended."""
        with self._changed:
            self._changed.wait_for(lambda: self._waiting or self._stopped)
            if not self._waiting:
                return []
            known = 0
            while known < len(self._waiting) < self._batch:  # others may come right behind
                known = len(self._waiting)
                self._changed.wait(self._linger)
            if self._waiting:
                self._running = next_batch(self._waiting, self._batch, self.limits.most_units)
            for job in self._running:
                self._waiting.remove(job)
        return self._running or self._next()

    def _join(self, running: Sequence[AskJob]) -> Sequence[AskJob]:
        """Those that wait and can be answered with the ones that are being answered."""
        with self._changed:
            more = joining(self._waiting, running, self._batch, self.limits.most_units)
            for job in more:
                self._waiting.remove(job)
            self._running += more
            if more:
                self._measure()
        return more

    def _measure(self) -> None:
        now = time.monotonic()
        self._seconds += SMOOTHING * (now - self._began - self._seconds)
        self._began = now
