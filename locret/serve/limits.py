"""How long requests may be: what the model's window and the memory can hold of them."""

from bisect import bisect_right
from collections.abc import Callable
from functools import lru_cache
from typing import Any

from locret.engine.engine import Engine
from locret.engine.plan import make_plan
from locret.policies import LocretPolicy
from locret.serve.requests import TooLong

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
