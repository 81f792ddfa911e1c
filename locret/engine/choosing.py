"""Which units of a layer stay: the highest scores of every sequence, as many as an eviction and the
policy let it keep.
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from locret.cache.layer import RetainedLayer
from locret.cache.sequences import Counts, Sequences, alike, sent, sequences_of
from locret.kernels import select_sequences
from locret.policies.base import Eviction, Policy, with_protected


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
        # What one head has less, another has more.
        spare = self.eviction.budget(retained_idx) if self.policy.shares else min(counts)
        if context is not None:
            rows = zip(context.sequences.counts, context.appended, strict=True)
            spare = min(self._spare(counts, row, appended) for row, appended in rows)
        return spare + self.eviction.above - layer.store.tail.count - new

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
        counts = self._allotted(scores, layers, wholes, indices)
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
        layers: Sequence[RetainedLayer],
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
        known = []
        for each, whole, i in zip(scores, wholes, indices, strict=True):
            tail, head = self.eviction.protected(i, self.policy)[0]
            known.append(with_protected(each.rectangle(whole), tail, head, whole.empty))
        allotted = self.policy.allot(known, [self.eviction.budget(i) for i in indices])
        if allotted is None:
            return static
        return [tuple(map(tuple, counts.tolist())) for counts in allotted]


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
