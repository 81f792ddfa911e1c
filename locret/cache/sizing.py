"""Bytes of a cache, told from how it is stored, and the units that fit into bytes.

Counted are keys and values (codes, tables and residual, `locret.quantization.blocks`), source
positions and weights; scores where answers evict too, since else they are dropped when a prompt is
read, and source positions take less from then on: a bit for every token read, set where a unit is
held; a row whose heads hold few of very many tokens keeps its numbers, which are fewer bytes then
(`packed_positions`). Outliers depend on the data and are not.
"""

from bisect import bisect_right
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from locret.heads.heads import Geometry
from locret.heads.quotas import capped
from locret.quantization import Scheme
from locret.quantization.blocks import most_bytes, most_bytes_shared
from locret.quantization.codes import pack, unpack

BYTE = 8  # bits

BESIDE_BYTES = 4
"""Of a unit in a KV head beside key and value: its source position (int32), until its prompt is
read."""
SCORE_BYTES = 4
"""Of a unit in a KV head while something may be evicted: its score (float32)."""
WEIGHT_BYTES = 4
"""Of a unit in a KV head, where evicted values are merged: its weight (float32)."""


@dataclass(frozen=True)
class Sizing:
    """What the units of one row of a batch take.

    Attributes:
        scheme: how keys and values are stored.
        num_layers, num_kv_heads, head_size: of the backbone.
        element_size: bytes of a number in full precision.
        weighs: units hold a weight (`locret.cache.merging`).
        scored: units keep their scores, because answers evict too.
        windows: sliding windows of the layers that hold one, beside those counted above.
        query_tokens: of a question that is read in front of a context.
        window: slots that a sequence has at compact positions; None = any number.
        chunk: tokens that are read at a time, at most; 0 = all at once.
        beside: tokens of a question that are read together with a context.
    """

    scheme: Scheme
    num_layers: int
    num_kv_heads: int
    head_size: int
    element_size: int = 2
    weighs: bool = False
    windows: tuple[int, ...] = ()
    scored: bool = False
    query_tokens: int = 0
    window: int | None = None
    chunk: int = 0
    beside: int = 0

    @classmethod
    def of(
        cls,
        scheme: Scheme,
        shape: Geometry,
        element_size: int,
        windows: Sequence[int | None] = (),
        **others: Any,
    ) -> "Sizing":
        """What a cache of a backbone of this shape takes, which has these windows (None = none)."""
        sizes = shape.num_layers, shape.num_kv_heads, shape.head_size, element_size
        return cls(scheme, *sizes, windows=tuple(window for window in windows if window), **others)

    def head_slots(self, context: int) -> int | None:
        """Units that a head can hold, of a context of that many tokens: as many as leave slots of
        the window for the longest chunk, at least 1; None = all, because these fit into it."""
        tokens = context + self.beside
        if self.window is None or not 0 < self.chunk < tokens or tokens <= self.window:
            return None
        return max(1, self.window - self.chunk)

    def cache_bytes(self, budgets: Sequence[int], tokens: int | None = None) -> int:
        """Most bytes of layers that hold so many units in every KV head: of `tokens` tokens when
        they are read, else after a chunk."""
        counts = [(units,) * self.num_kv_heads for units in budgets]
        return sum(self._layer(i, heads, tokens, False) for i, heads in enumerate(counts))

    def read_bytes(self, counts: Sequence[Sequence[int]], tokens: int, sharing: int = 0) -> int:
        """Most bytes of heads that hold so many units, [layers][KV heads], of `tokens` tokens when
        they are read, where the budget is one in bytes (`RetainedLayer.close`).

        Args:
            sharing: 1 = heads of a layer may share out what they hold in another way, 2 = those of
                all layers, 0 = none.
        """
        if not sharing:
            tight = not self.scored
            return sum(self._layer(i, heads, tokens, tight) for i, heads in enumerate(counts))
        every = [*range(len(counts))]
        pools = [every] if sharing == 2 else [[i] for i in every]
        return sum(self._pool(pool, [n for i in pool for n in counts[i]], tokens) for pool in pools)

    def _layer(self, layer: int, counts: Sequence[int], tokens: int | None, tight: bool) -> int:
        scheme = self.scheme.for_layer(layer)
        how = self.head_size, self.element_size, tight
        stored = sum(most_bytes(scheme, n, *how) * heads for n, heads in Counter(counts).items())
        # Where nothing is packed or evicted, units are as they came.
        closed = scheme.packs or tokens is not None and min(counts) < tokens
        return stored + self._beside_of(counts, tokens if closed else None)

    def _pool(self, layers: Sequence[int], counts: Sequence[int], tokens: int) -> int:
        """Of heads of these layers that hold so many units together."""
        how = sum(counts), len(counts), self.head_size, self.element_size, not self.scored
        schemes = {self.scheme.for_layer(layer) for layer in layers}
        stored = max(most_bytes_shared(scheme, *how) for scheme in schemes)
        closed = self.scheme.packs or sum(counts) < len(counts) * tokens
        return stored + self._beside_of(counts, tokens if closed else None)

    def _beside_of(self, counts: Sequence[int], tokens: int | None) -> int:
        """Of units in heads, all but keys and values; `tokens` read, where nothing is evicted any
        more."""
        units = sum(counts)
        beside = (self._beside + WEIGHT_BYTES * self.weighs) * units
        if tokens is None or self.scored:
            return beside
        positions = positions_bytes(units, len(counts), tokens + self.query_tokens)
        return beside + positions - BESIDE_BYTES * units

    def window_bytes(self, tokens: int) -> int:
        """Bytes of the layers with a window after so many tokens, as they are stored: in full."""
        units = sum(min(max(window - 1, 1), tokens) for window in self.windows)
        return units * self.num_kv_heads * (2 * self.head_size * self.element_size + self._beside)

    @property
    def _beside(self) -> int:
        return BESIDE_BYTES + SCORE_BYTES * self.scored

    def shared(self, budgets: Sequence[int], most: int | None = None) -> list[int]:
        """What each layer may keep by the scheme's own rule, where a policy gives it `budgets`:
        layers that are stored in more bits keep fewer units, at the same bytes.

        Args:
            most: units that a layer may keep; None = any number. What the policy gives it above
                goes to other layers; what only fewer bits give it is left.
        """
        if most is not None:
            budgets = capped(budgets, most)
        by_budget = {
            budget: self.scheme.budgets(budget, self.num_layers, self.head_size, self.element_size)
            for budget in set(budgets)
        }
        units = [by_budget[budget][layer] for layer, budget in enumerate(budgets)]
        return units if most is None else [min(each, most) for each in units]

    def units_within(self, nbytes: int, most: int, slot_bytes: int = 0) -> int:
        """Units, `most` at most, that fit into `nbytes`, by the scheme's rule for equal budgets;
        0 = not even one does.

        Args:
            slot_bytes: what else one more unit costs.
        """

        def needed(units: int) -> int:
            of_layers = self.shared([units] * self.num_layers)
            return self.cache_bytes(of_layers) + units * slot_bytes

        return bisect_right(range(1, most + 1), nbytes, key=needed)


def packed_positions(positions: Tensor, owner: Tensor, heads: int) -> Tensor:
    """Source positions of a row: bits uint8 [H, W], or its numbers int32, whichever is smaller.

    The host waits for the device, to learn how many tokens the row has read.

    Args:
        positions: int32 [N], ascending in each head, at least 0.
        owner: long [N], the head of each.
    """
    last = int(positions.max()) if len(positions) else -1
    tokens = (last // BYTE + 1) * BYTE
    if not 0 < heads * tokens < BYTE * positions.nbytes:
        return positions.clone()
    bits = torch.zeros(heads, tokens, dtype=torch.uint8, device=positions.device)
    bits[owner, positions.long()] = 1
    return pack(bits, 1)


def unpacked_positions(rows: Sequence[Tensor]) -> Tensor:
    """The int32 [N] of several rows that `packed_positions` was given."""
    return torch.cat([_unpacked(row) if row.dtype == torch.uint8 else row for row in rows])


def _unpacked(bits: Tensor) -> Tensor:
    return unpack(bits, 1, bits.shape[1] * BYTE).nonzero()[:, 1].int()


def positions_bytes(units: int, heads: int, tokens: int) -> int:
    """Most bytes of a row of that many units in all heads, of so many tokens read."""
    return min(units * torch.int32.itemsize, heads * -(-tokens // BYTE))
