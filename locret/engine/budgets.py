"""How much: the units that every layer and KV head keeps of a context, and which.

A budget names units on average, a share of the context or bytes; the policy shares it out over
layers, quotas (`locret.heads.quotas`) over heads, which `Calibration` measures. Bytes hold as many
units as fit once both did. Of every sequence the highest scores stay, as many as an eviction and
the policy let it keep (`Choice`).
"""

import functools
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from locret.cache.context import Counts, Sequences, alike, sent, sequences_of
from locret.cache.layer import RetainedLayer
from locret.cache.sizing import Sizing
from locret.engine.attention import chunk_of
from locret.heads.quotas import COMPRESSIONS, Quotas, averaged, measured, on_grid, unit_counts
from locret.kernels import select_sequences
from locret.model.backbone import Backbone
from locret.model.backends import Backend, attend
from locret.model.hooks import LayerCall
from locret.policies.base import Eviction, LocretPolicy, Policy, only_best, with_protected
from locret.quantities import Budget, ByteShare, Memory, format_bytes


def layer_budgets(
    budget: Budget, quotas: Quotas | None, policy: Policy, sizing: Sizing, context: int
) -> tuple[int, ...] | None:
    """Units that every layer keeps of a context of that many tokens, as the policy shares them out
    and before quotas do; None = all. No layer gets more than a head has slots for, or than layers
    have on average where this is more. ValueError: not one unit fits into the memory."""
    if budget is None or not sizing.num_layers:
        return None
    if isinstance(budget, tuple):
        return budget

    slots = sizing.head_slots(context)

    def of_layers(average: int) -> Sequence[int]:
        most = None if slots is None else max(slots, average)
        return sizing.shared(policy.budgets(average, sizing.num_layers, context), most)

    if isinstance(budget, Memory | ByteShare):
        sharing = 0 if not policy.shares else 2 if policy.waits or policy.rereads else 1

        def needed(average: int) -> int:
            counts = head_counts(of_layers(average), quotas, sizing, context)
            return sizing.read_bytes(counts, context, sharing)

        units = _units_within(budget, sizing, context, needed)
    else:
        units = budget if isinstance(budget, int) else max(1, round(budget * context))
    return tuple(of_layers(units))


def head_counts(
    budgets: Sequence[int], quotas: Quotas | None, sizing: Sizing, context: int
) -> Counts:
    """Units that each KV head of every layer keeps, [layers][KV heads].

    Layers' budgets are dealt out by the quotas for what all of them together leave of the context.
    No head keeps more than it has slots for, or its layer's budget where this is more, nor more
    than the context. If it may keep all of it, it has its layer's budget where this is more.
    """
    if quotas is None:
        return tuple((budget,) * sizing.num_kv_heads for budget in budgets)
    context = max(context, 1)
    kept = sum(min(budget, context) for budget in budgets)
    slots = sizing.head_slots(context) or context
    most = [min(context, max(slots, budget)) for budget in budgets]
    counts = unit_counts(quotas.at(context * len(budgets) / kept), budgets, most)
    if any(len(set(layer)) > 1 for layer in counts):
        counts = on_grid(counts, most)
    return tuple(
        tuple(max(units, budget) if units == context else units for units in layer)
        for layer, budget in zip(counts, budgets, strict=True)
    )


def _units_within(
    budget: Memory | ByteShare, sizing: Sizing, context: int, needed: Callable[[int], int]
) -> int:
    """Units on average that fit, at least 1.

    A share of the full cache's bytes, in 16 bits, is that of the layers without a window, and one
    unit in every head is kept where not even that is a share of them.

    Args:
        needed: bytes where heads keep so many units on average.
    """
    most, windows = range(1, max(context, 1) + 1), sizing.window_bytes(context)
    if isinstance(budget, ByteShare):
        elements = 2 * sizing.head_size * sizing.num_kv_heads * sizing.num_layers
        nbytes = int(budget.share * (context * elements * 2))  # bytes of 16 bits
        return max(1, bisect_right(most, nbytes, key=needed))
    units = bisect_right(most, budget.nbytes - windows, key=needed)
    if not units:
        also = f", sliding windows {format_bytes(windows)}" if windows else ""
        raise ValueError(
            f"budget is {format_bytes(budget.nbytes)}; one unit in every KV head takes "
            f"{format_bytes(needed(1))}{also}"
        )
    return units


def keep_highest(scores: dict[int, Tensor], layer: int, more: Tensor, length: int) -> None:
    """Raise a layer's scores [..., n] to those of the first `length` units of `more`, where these
    are higher."""
    more = more[..., :length]
    scores[layer] = more if layer not in scores else torch.maximum(scores[layer], more)


class Scores(NamedTuple):
    """Scores float32 of a layer's units: [N] of the context, None = there is none; [B, H, n] of the
    tail and of new units."""

    context: Tensor | None
    rest: Tensor

    @classmethod
    def of(cls, scores: Tensor, layer: RetainedLayer) -> "Scores":
        """Those [B, H, S + n] of a rectangle (`Store.rectangle`), with n new units."""
        context = layer.store.context
        if context is None:
            return cls(None, scores)
        first = context.sequences.longest
        return cls(context.sequences.flattened(scores[:, :, :first]), scores[:, :, first:])

    def rectangle(self, whole: Sequences) -> Tensor:
        """[B, H, S + n], filled up in front."""
        if self.context is None:
            return self.rest
        before = whole.plus(-self.rest.shape[2])
        return torch.cat([before.rectangle(self.context), self.rest], dim=2)


@dataclass(frozen=True)
class Choice:
    """How one eviction chooses.

    Args:
        policy: may have a say in how many units a head keeps.
        eviction: how many, and which in any case.
    """

    policy: Policy
    eviction: Eviction

    def left(self, layer: RetainedLayer, retained_idx: int, new: int) -> int:
        """How many more units a layer can hold after `new` ones came; below zero: it evicts."""
        counts, context = self.eviction.counts[retained_idx], layer.store.context
        above, slots = self.eviction.above, self.eviction.slots
        # What one head has less, another has more.
        spare = self.eviction.budget(retained_idx) if self.policy.shares else min(counts)
        if context is not None:
            rows = zip(context.sequences.counts, context.appended, strict=True)
            spare = min(self._spare(counts, row, appended) for row, appended in rows)
        left = spare + above - layer.store.tail.count - new
        if slots is None:
            return left
        return min(left, max(slots, *counts) + above - layer.longest - new)

    def _spare(self, counts: Sequence[int], lengths: Sequence[int], appended: int) -> int:
        """How many more units a row can hold, of which `appended` came after its last eviction."""
        if self.policy.shares:
            return -appended
        # What is left may be more than is to be kept: a row was read with a budget of its own.
        left = min(c - n for c, n in zip(counts, lengths, strict=True)) + appended
        return max(left, 0) - appended

    def choose(
        self, scores: Sequence[Scores], layers: Sequence[RetainedLayer], indices: Sequence[int]
    ) -> list[tuple[Tensor, Sequences]]:
        """What layers with these scores, the retained ones at `indices`, keep: which units of each
        sequence, ascending, and how many."""
        wholes = [with_new(layer, each.rest) for layer, each in zip(layers, scores, strict=True)]
        counts = self._allotted(scores, wholes, indices)
        chosen = []
        for each, whole, of_layer, i in zip(scores, wholes, counts, indices, strict=True):
            kept = sequences_of(
                tuple(
                    tuple(map(min, of_row, has))
                    for of_row, has in zip(of_layer, whole.counts, strict=True)
                ),
                whole.device,
            )
            protected = self.eviction.protected(i, self.policy) * whole.shape[0]
            # A head that shares what it has may keep fewer than the eviction protects.
            firsts = [min(head, n) for (_, head), n in zip(protected, kept.flat, strict=True)]
            lasts = [
                min(tail, n - head)
                for (tail, _), head, n in zip(protected, firsts, kept.flat, strict=True)
            ]
            chosen.append((_highest(each, whole, kept, lasts, firsts), kept))
        return chosen

    def _allotted(
        self,
        scores: Sequence[Scores],
        wholes: Sequence[Sequences],
        indices: Sequence[int],
    ) -> list[Counts]:
        """How many units each row and head may keep."""
        static = [
            (self.eviction.counts[i],) * whole.shape[0]
            for i, whole in zip(indices, wholes, strict=True)
        ]
        if not self.policy.shares:
            return static
        known, most = [], [*map(self.eviction.most, indices, [whole.longest for whole in wholes])]
        for each, whole, i, count in zip(scores, wholes, indices, most, strict=True):
            tail, head = self.eviction.protected(i, self.policy)[0]
            of_layer = with_protected(each.rectangle(whole), tail, head, whole.empty)
            known.append(only_best(of_layer, count))
        allotted = self.policy.allot(known, [self.eviction.budget(i) for i in indices])
        if allotted is None:
            return static
        bounded = [of.clamp(max=count) for of, count in zip(allotted, most, strict=True)]
        return [tuple(map(tuple, counts.tolist())) for counts in bounded]


def with_new(layer: RetainedLayer, rest: Tensor) -> Sequences:
    """The sequences of a layer's context and of the units [B, H, n] that follow."""
    context = layer.store.context
    if context is None:
        return alike(rest.shape[0], (rest.shape[2],) * rest.shape[1], rest.device)
    return context.sequences.plus(rest.shape[2])


def _highest(
    scores: Scores, whole: Sequences, kept: Sequences, lasts: Sequence[int], firsts: Sequence[int]
) -> Tensor:
    """Which units of each sequence have the highest scores, long [K], ascending.

    Args:
        whole: all units; kept: how many stay.
        lasts, firsts: of each sequence, units that stay whatever they scored.
    """
    rest, device = scores.rest, whole.device
    before = whole.plus(-rest.shape[2])
    context = rest.new_empty(0) if scores.context is None else scores.context
    stay, last, first = (_numbers(tuple(x), device) for x in (kept.flat, lasts, firsts))
    return select_sequences(
        context,
        rest,
        before.offsets,
        stay,
        kept.offsets,
        last,
        first,
        total=kept.total,
        longest=whole.longest,
    )


@functools.lru_cache(maxsize=1024)
def _numbers(numbers: tuple[int, ...], device: torch.device) -> Tensor:
    """int32 on the device; what is asked for again is not copied again."""
    return sent(numbers, device, torch.int32)


class Calibration:
    """Measures head quotas (`locret.heads.quotas`): which heads have the best units of contexts.

        calibration = Calibration(engine.backbone, engine.policy)
        for ids in contexts:
            calibration.add(ids)
        calibration.quotas()    # {"2": [layers][KV heads], "4": ...}

    A context is read at once with plain causal attention. The policy ranks every unit of a layer as
    it is read, or looks at it from what it has read behind it, and of the layer nothing but these
    scores is kept. The best 1/r of all units of all layers and heads would stay at compression r; a
    head's quota is its share of them, the mean over contexts. So the policy's scores must be on one
    scale for all heads: logarithms of attention are, and a cosine is.

    Args:
        backbone: of the model, attached to nothing.
        policy: ranks units.
        compressions: for which quotas are measured, at least 1 each.
        backend: of attention (`locret.model.backends`); None = as the model was loaded.

    Raises:
        ValueError: the policy's scores do not tell heads apart, or need what a context has not.
    """

    def __init__(
        self,
        backbone: Backbone,
        policy: Policy,
        compressions: Sequence[float] = COMPRESSIONS,
        backend: Backend | None = None,
    ) -> None:
        reason = why_not_calibrated(policy)
        if reason is not None:
            raise ValueError(f"policy {policy.name!r} cannot be calibrated: {reason}")
        self.backbone = backbone
        self.policy = policy
        self.compressions = tuple(compressions)
        self.backend = backend or backbone.backend
        self._scores: dict[int, Tensor] = {}
        self._fractions: list[list[Tensor]] = []

    @torch.no_grad()
    def add(self, input_ids: Tensor) -> None:
        """Count the best units of a context, [1, T] long. ValueError: scores that are not
        finite."""
        self._scores = {}
        try:
            for ids, looking in self._readings(input_ids):
                layer = functools.partial(self._layer, input_ids.shape[1], looking)
                with self.backbone.attached(layer):
                    self.backbone.decoder(
                        input_ids=ids,
                        position_ids=torch.arange(ids.shape[1], device=ids.device)[None],
                        use_cache=False,
                    )
            scores = [self._scores[layer] for layer in sorted(self._scores)]
            self._fractions.append(measured(scores, self.compressions))
        finally:
            self._scores = {}

    def _readings(self, context: Tensor) -> Iterator[tuple[Tensor, int]]:
        """What is read for the scores of a context, [1, T] long, and how many of the last tokens
        look at it; 0 = the policy ranks what is read."""
        if not self.policy.rereads:
            yield context, 0
            return
        for tokens, looking in self.policy.second_readings(context):
            yield torch.cat([context, tokens], dim=1), looking

    def quotas(self, sharpness: float = 1.0) -> dict[str, list[list[float]]]:
        """Quotas of mean 1 by compression, [layers][KV heads], of the contexts so far; `sharpness`
        as in `locret.heads.quotas.averaged`."""
        assert self._fractions, "no context was added yet"
        by_compression = zip(self.compressions, zip(*self._fractions, strict=True), strict=True)
        return {f"{compression:g}": averaged(of, sharpness) for compression, of in by_compression}

    def _layer(self, length: int, looking: int, call: LayerCall) -> Tensor:
        """The layer function: plain causal attention, and the policy's scores on the way.

        Args:
            length: tokens of the context.
            looking: see `_readings`.
        """
        tokens = (call.key.shape[2],)
        query, key = (call.rotate(x, (0,), tokens) for x in (call.query, call.key))
        i = call.retained_idx
        if i is not None:
            if looking:
                scores = self.policy.look(call.seen_by(query[:, :, -looking:], key, call.value))
            else:

                def rotate(x: Tensor, offset: int) -> Tensor:
                    return call.rotate(x, (offset,), tokens)

                chunk = chunk_of(call, query, key, start=0, rotate=rotate)
                scores = self.policy.rank(chunk).float()
            if not scores.isfinite().all():
                raise ValueError(
                    f"policy {self.policy.name!r} gave scores that are not finite numbers in layer "
                    f"{i}; expected finite ones, by which units can be compared"
                )
            keep_highest(self._scores, i, scores[0].cpu(), length)
        return attend(query, key, call.value, call.scaling, self.backend, weighting=call.weighting)


def why_not_calibrated(policy: Policy | type[Policy]) -> str | None:
    """Why quotas cannot be measured by a policy's scores; None if they can."""
    if not policy.evicts:
        return "it keeps every unit"
    if policy.waits:
        return "it scores a token alike in all heads"
    core = policy.core if isinstance(policy, Policy) else None
    if isinstance(core, LocretPolicy) and core.heads.config.query_tokens:
        return "its heads read a question in front, which texts for calibration do not have"
    return None
