"""An answer: stock `generate` over a cache that has read the prompt."""

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from locret.cache.cache import DECODE_ROOM, RetainedCache
from locret.cache.sizing import Sizing
from locret.engine.ahead import may_run_ahead
from locret.engine.arguments import (
    BRANCHING,
    left_mask,
    longest,
    prompt_lengths,
    setting,
    stock_settings,
)
from locret.engine.attention import RetainedAttention
from locret.engine.config import EngineConfig
from locret.engine.forward import ChunkForward, seen_through, without_mask
from locret.engine.passes import AnswerPass, Pass
from locret.engine.reading import counts_of, one_if_equal
from locret.engine.steps import GraphedSteps, StepCounts, takes_steps
from locret.kernels.dispatch import AVAILABLE
from locret.model.backbone import Backbone
from locret.model.hooks import as_argument, without_autocast
from locret.policies.base import Eviction

MOST_ROOM = 8192  # tokens of an answer for which storage is made at once


@dataclass
class Answering:
    """Lets stock `generate` answer through an attached backbone.

    Attributes:
        model: as the user gave it, whose settings of `generate` count.
        last_steps: how the one-token steps of the last answer ran; None before the first.
    """

    model: Any
    backbone: Backbone
    attention: RetainedAttention
    forward: ChunkForward
    config: EngineConfig
    sizing: Sizing
    last_steps: StepCounts | None = None

    def generate(
        self,
        sequence: Tensor,
        cache: RetainedCache,
        context: int,
        padding: Sequence[int],
        kwargs: dict[str, Any],
    ) -> Any:
        """Stock generate over a sequence [B, n] whose first tokens `cache` has seen.

        Args:
            context: first tokens that are not returned.
            padding: how many leading tokens of each row stand for nothing.
        """
        beams, returned = (setting(self.model, kwargs, name) or 1 for name in BRANCHING)
        last = longest(self.model, kwargs, sequence)
        eviction = self._eviction(cache, last)
        if max(beams, returned) > 1:
            cache.batch_repeat_interleave(max(beams, returned))
            cache.token_ids = None  # whose rows are the beams' no more
        kwargs = kwargs | stock_settings(self.model, kwargs)
        room = min(max(last - cache.seen, DECODE_ROOM), MOST_ROOM)
        model, steps = self.model, None
        if eviction is None and beams == 1 and self._takes_steps(cache):
            ahead = last if may_run_ahead(model, kwargs) else 0
            graphs = bool(self.config.compute.graphs)
            steps = GraphedSteps(self.forward, cache, room, graphs, ahead)
        if steps is not None or any(padding):
            model = seen_through(self.backbone.model, steps or without_mask)
        current: Pass = AnswerPass(self.attention.backend, room)
        seen = cache.seen
        with contextlib.ExitStack() as answer:
            reads = self.attention.reading(eviction) if eviction else current
            answer.enter_context(cache.during(reads))
            if steps is not None:
                answer.callback(steps.end)
            output = model.generate(
                sequence,
                attention_mask=left_mask(sequence, padding),
                **as_argument(self.backbone.model, cache, "generate"),
                **kwargs,
            )
        with without_autocast(sequence.device):
            for layer in cache.layers:
                layer.store.pack()
        # Beside those of new tokens, the call that reads what is left of a prompt, if that is one.
        taken = cache.seen - sequence.shape[1] + (sequence.shape[1] - seen == 1)
        counts = (steps.fast, steps.replayed, steps.fused, steps.ahead) if steps else ()
        self.last_steps = StepCounts(taken, *counts)
        plain = isinstance(output, Tensor)
        sequences = output if plain else output.sequences
        if beams == 1:  # else the cache's rows are the last beams, not the sequences returned
            cache.token_ids = sequences[:, : cache.seen].cpu()
            cache.unread_ids = sequences[:, cache.seen :].cpu()
        if plain:
            return sequences[:, context:]
        output.sequences = sequences[:, context:]
        return output

    def _takes_steps(self, cache: RetainedCache) -> bool:
        folds = cache.merging is not None and cache.merging.fold
        return self.fast_steps and all(takes_steps(layer, folds) for layer in cache.layers)

    @property
    def fast_steps(self) -> bool:
        """Whether one-token steps run with counters on the device (`locret.engine.steps`)."""
        backbone, fused = self.backbone, self.config.compute.backend != "eager" and AVAILABLE
        return fused and backbone.plain and [d.type for d in backbone.devices] == ["cuda"]

    def _eviction(self, cache: RetainedCache, last: int) -> Eviction | None:
        """How layers evict while the answer comes, of at most `last` tokens with all before it, if
        that was asked for."""
        interval = self.config.reading.decode_interval
        if interval is None or cache.budget is None:
            return None
        if cache.answered:
            raise ValueError(
                "decode_interval: this cache answered without eviction before, so that it holds "
                "units without a score; go on with the engine it came from, or read its context "
                "again"
            )
        if not cache.scored:
            raise ValueError(
                "decode_interval: this cache was read by an engine without it and holds no scores; "
                "read its context again with this engine"
            )
        whole = max(cache.prompt_lengths)
        counts = self.config.answer_counts(self.attention.policy, self.sizing, whole, last)
        if counts is None:
            shape = self.backbone.geometry
            counts = counts_of(cache.budget, shape.num_layers, shape.num_kv_heads)
        cache.budget = one_if_equal(counts)
        return self.config.eviction(counts, cache.query_length, interval - 1, merging=cache.merging)

    def lengthen(self, kwargs: dict[str, Any], front: int) -> None:
        """Make lengths that count the prompt count `front` tokens read in front of it too."""
        if front:
            for name, length in prompt_lengths(self.model, kwargs).items():
                kwargs[name] = length + front
