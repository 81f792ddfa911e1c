"""The service: requests of any number of threads, answered by one engine; and what it takes.

Requests that fit the window and the memory (`Limits`) wait in a bounded queue. One thread owns the
engine; it takes the first request and those behind it that can be answered together, does them
(`worker.py`), and goes on. Rows do not join a batch that runs.
"""

import copy
import threading
import time
from bisect import bisect_right
from collections import Counter, deque
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

import torch

from locret.engine.engine import Engine
from locret.engine.plan import make_plan
from locret.policies import LocretPolicy
from locret.serve.contexts import Contexts, Prefixes
from locret.serve.requests import (
    Answer,
    Ask,
    Cancelled,
    Counters,
    End,
    Failed,
    QueueFull,
    Reading,
    TextOf,
    TooLong,
)
from locret.serve.worker import AskJob, Job, ReadJob, Worker, next_batch

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
                raise QueueFull("the service is closing; ask another one", self._seconds)
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
        worker = Worker(self.engine, self._decoder, self.contexts, self._prefixes)
        try:
            while jobs := self._next():
                began = time.monotonic()
                worker.work(jobs)
                with self._changed:
                    self._running = []
                    self._seconds += SMOOTHING * (time.monotonic() - began - self._seconds)
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


# ---- limits --------------------------------------------------------------------------------

LONGEST = 2**40  # tokens; more is never asked about


class Limits:
    """Says how long requests to an engine may be.

    Args:
        engine: that answers.
        memory: bytes that the process may use on the device; None = not known.
        beside: bytes of it for stored contexts.

    Attributes:
        window: positions of the model; None = not known.
        most_units: that a KV head can hold within the memory; None = not known.
    """

    def __init__(self, engine: Engine, memory: int | None = None, beside: int = 0) -> None:
        self._engine = engine
        self._reading = engine.config.reading
        self.window: int | None = getattr(engine.model.config, "max_position_embeddings", None)
        self.most_units = None if memory is None else _units_within(engine, memory - beside)
        self._counts = lru_cache(maxsize=256)(
            lambda context: engine.config.counts(engine.policy, engine.sizing, context)
        )
        texts = "the model's window of {:,} positions", "the memory for {:,} units a KV head"
        limits = zip(texts, (self.window, self.most_units), strict=True)
        self._in_words = " and ".join(text.format(n) for text, n in limits if n is not None)

    def answer_tokens(
        self, prompt: int, context: int | None, wanted: int | None, most: int, fullest: int = 0
    ) -> int:
        """How long an answer may become: `wanted` or, if that is None, what fits, `most` at most;
        `fullest` are the slots of the context. Raises TooLong: it does not fit; says what would."""
        tokens = wanted or 1
        if not self._fits(prompt, context, tokens, fullest):
            fitting = {
                "a prompt": _largest(lambda n: self._fits(n, context, tokens, fullest)),
                "an answer": _largest(
                    lambda n: self._fits(prompt, context, n, fullest), tokens - 1
                ),
            }
            ways = [f"{what} of {n:,} tokens would fit" for what, n in fitting.items() if n]
            advice = ", or ".join(ways) or "send a shorter one, and ask for a shorter answer"
            after = "" if context is None else f" after a context of {context:,} tokens"
            raise TooLong(
                f"the prompt has {prompt:,} tokens{after} and the answer may have {tokens:,}, "
                f"which is more than {self._in_words} takes; {advice}"
            )
        if wanted is not None:
            return wanted
        return min(most, _largest(lambda n: self._fits(prompt, context, n, fullest), most))

    def check_context(self, tokens: int) -> None:
        """Raises TooLong: a context of so many tokens cannot be read and asked; says what would
        fit."""
        if not self.readable(tokens):
            raise TooLong(
                f"the context has {tokens:,} tokens, which is more than {self._in_words} takes; a "
                f"context of {_largest(self.readable):,} tokens would fit"
            )

    def slots(self, context: int) -> int:
        """Units that the fullest KV head holds of a context of so many tokens."""
        counts = self._counts(context)
        return context if counts is None else min(context, max(map(max, counts), default=0))

    def units(self, context: int) -> float:
        """Units that a KV head holds on average of a context of so many tokens."""
        counts = self._counts(context)
        if counts is None:
            return context
        kept = [min(units, context) for heads in counts for units in heads]
        return sum(kept) / max(len(kept), 1)

    def needed(
        self, prompt: int, context: int | None, new: int, taken: int = 0, mean: bool = False
    ) -> int:
        """Most units of a KV head for a request with an answer of `new` tokens.

        Args:
            prompt: tokens of the prompt, or of what follows the context.
            context: tokens of the context; None = there is none.
            new: tokens of the answer.
            taken: that the context takes, where an engine of other settings may have read it: slots
                or, of the mean, units.
            mean: of a head on average, which is what the request takes of the memory; False = of
                the fullest one.
        """
        units = self.units if mean else self.slots
        if self._reading.decode_interval is not None:
            new = min(new, self._reading.decode_interval)
        if context is not None:
            return round(max(taken, units(context)) + prompt + new)
        read = self._read(prompt)
        kept = units(read)
        return round(max(self._while_reading(read, kept), kept + prompt - read + new))

    def kept(self, prompt: int) -> tuple[float, int]:
        """Units of a KV head on average, and bytes, that the cache of a prompt of so many tokens
        will have: stock `generate` does not show it."""
        sizing, read = self._engine.sizing, self._read(prompt)
        units = self.units(read) + prompt - read
        layers = [round(units)] * sizing.num_layers
        return units, sizing.cache_bytes(layers) + sizing.window_bytes(prompt)

    @property
    def token_bytes(self) -> int:
        """Bytes of one more token, stored as it is."""
        sizing = self._engine.sizing
        unit = 2 * sizing.head_size * sizing.element_size + 4
        return unit * sizing.num_layers * sizing.num_kv_heads

    def _read(self, prompt: int) -> int:
        """Tokens of a prompt before its last ones, which are never evicted."""
        return max(0, prompt - (1 if self._reading.query_aware else self._reading.local_tokens))

    def _while_reading(self, tokens: int, units: float) -> float:
        chunk = self._reading.chunk
        if chunk is None or self._engine.policy.rereads:
            return tokens
        return min(tokens, units + chunk)

    def _within(self, units: float, tokens: int) -> bool:
        """Whether so many units of a head, of so many tokens, fit."""
        positions = tokens if self._reading.positions == "original" else units
        if self.window is not None and positions > self.window:
            return False
        return self.most_units is None or units <= self.most_units

    def _fits(self, prompt: int, context: int | None, new: int, fullest: int) -> bool:
        needed = self.needed(prompt, context, new, fullest)
        return self._within(needed, prompt + (context or 0) + new)

    def readable(self, context: int) -> bool:
        """Whether there is room for a question and an answer of one token, too."""
        slots = self.slots(context)
        return self._within(max(self._while_reading(context, slots), slots + 2), context + 2)


def _largest(fits: Callable[[int], bool], most: int = LONGEST) -> int:
    """The largest number up to `most` that fits; 0 if not even 1 does."""
    return bisect_right(range(1, most + 1), False, key=lambda n: not fits(n))


def _units_within(engine: Engine, memory: int) -> int | None:
    """Units of a KV head that fit into `memory` beside weights and a chunk; None where a plan
    cannot say."""
    reading, scheme = engine.config.reading, engine.config.storage.quantization
    model: Any = engine.model
    core = engine.policy.core
    plan = make_plan(
        model.config,
        memory=max(memory, 1),
        context=LONGEST,
        dtype=model.dtype,
        chunk_size=reading.chunk or model.config.max_position_embeddings,
        new_tokens=0,
        head_width=(core.heads.config.width or 0) if isinstance(core, LocretPolicy) else 0,
        quotas=reading.quotas,
    )
    bits = scheme.bits if scheme.packs else 8 * model.dtype.itemsize
    found = [one for one in plan.schemes if (one.name, one.bits) == (scheme.name, bits)]
    return found[0].budget if found and plan.geometry.num_layers else None
