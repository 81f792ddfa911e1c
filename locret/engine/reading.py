"""How contexts are read: in which chunks, what is kept of them, and which rows go together.

Every chunk goes through all layers, each of which evicts at once (`locret.engine.attention`). Rows
of different lengths are not padded to be read: chunks that begin and end alike are read together,
and each row's last ones by themselves.
"""

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from locret.cache.cache import Eviction, RetainedCache
from locret.cache.files import describe
from locret.cache.sizing import Sizing
from locret.engine.attention import TakenIn
from locret.engine.config import EngineConfig
from locret.model.backbone import Backbone
from locret.model.cache_names import as_argument
from locret.model.hooks import without_autocast
from locret.policies import Policy

Progress = Callable[[int, int], None]
"""Called after every chunk with the tokens read so far and the tokens to read in all."""

TOGETHER = 8192
"""Tokens of different rows that are read at a time: more does not make a device faster."""


class Planned(NamedTuple):
    """How a context is read.

    Attributes:
        ids: [B, n] long, a question in front of or behind the context included.
        prompt_length: tokens of the whole prompt.
        budgets: units that every layer keeps of it; None = all.
        query_length: tokens of the question in front.
        drop: tokens of the question behind, which are not kept.
        chunks: start and end of every chunk.
    """

    ids: Tensor
    prompt_length: int
    budgets: tuple[int, ...] | None
    query_length: int
    drop: int
    chunks: tuple[tuple[int, int], ...]


@dataclass
class Reader:
    """Reads contexts through an attached backbone, into caches of their own.

    Attributes:
        config: the engine's settings.
        sizing: what units take.
        progress: called after every chunk.
    """

    backbone: Backbone
    policy: Policy
    config: EngineConfig
    sizing: Sizing
    progress: Progress | None = None

    def read(
        self, input_ids: Tensor, prompt_length: int, query_ids: Tensor | None = None
    ) -> RetainedCache:
        """The cache of contexts [B, n] of one length, after their last chunk.

        Args:
            prompt_length: tokens of the whole prompt, of which the context is the beginning.
            query_ids: [B, q] long, read behind the context and given up where the reader is
                `query_aware`, else in front of it and kept.
        """
        reading = self._plan(input_ids, prompt_length, query_ids)
        cache = self._opened([reading])
        for at in range(len(reading.chunks)):
            self._read_chunk(cache, [reading], at)
        return self._closed(cache, reading)

    def read_rows(
        self,
        contexts: Sequence[Tensor],
        prompt_lengths: Sequence[int],
        queries: Sequence[Tensor | None],
        width: int,
    ) -> RetainedCache:
        """The cache of contexts [1, n] of different lengths, each read as it would be alone; as
        one of at least `width` tokens."""
        readings = [
            self._plan(context, length, query)
            for context, length, query in zip(contexts, prompt_lengths, queries, strict=True)
        ]
        return self.stacked(self._read_apart(readings), width)

    def take_in(self, chunk: Tensor, cache: RetainedCache) -> None:
        """Run a chunk [B, n] through the layers, for what they store of it."""
        # Devices that share a model put layers back after use; they must be let finish.
        spread = getattr(self.backbone.model, "hf_device_map", None)
        decoder = self.backbone.decoder
        cache.takes_in = not spread and not self.policy.waits
        try:
            with contextlib.suppress(TakenIn):
                decoder(input_ids=chunk, use_cache=True, **as_argument(decoder, cache))
        finally:
            cache.takes_in = False

    def stacked(self, rows: Sequence[RetainedCache], width: int) -> RetainedCache:
        """Caches of one row each as one of at least `width` tokens."""
        padded_to = max(width, *(row.seen for row in rows))
        ids = [row.token_ids for row in rows if row.token_ids is not None]
        assert len(ids) == len(rows)
        heads, device = self.backbone.geometry.num_kv_heads, self.backbone.model.device
        with without_autocast(device):
            cache = RetainedCache.stack(list(rows), padded_to, heads, device)
        cache.token_ids = torch.cat(
            [nn.functional.pad(i, (padded_to - i.shape[1], 0)) for i in ids]
        )
        cache.unread_ids = cache.token_ids[:, :0]
        return cache

    def new_cache(self, context: int) -> tuple[RetainedCache, tuple[int, ...] | None]:
        """An empty cache for a context of that many tokens, and what each layer keeps of it."""
        budgets = self.config.budgets(self.policy, self.sizing, context)
        return self._empty(budgets), budgets

    def _plan(self, ids: Tensor, prompt_length: int, query_ids: Tensor | None) -> Planned:
        budgets = self.config.budgets(self.policy, self.sizing, ids.shape[1])
        aware = self.config.reading.query_aware
        in_last, drop, query = self.config.reading.local_tokens - 1 if aware else 0, 0, 0
        if query_ids is not None and aware:
            in_last = drop = query_ids.shape[1]
            ids = torch.cat([ids, query_ids], dim=1)
        elif query_ids is not None:
            query = query_ids.shape[1]
            ids = torch.cat([query_ids, ids], dim=1)
        chunks = tuple(_chunks(ids.shape[1], self.config.reading.chunk_size, in_last))
        return Planned(ids, prompt_length, budgets, query, drop, chunks)

    def _read_apart(self, readings: list[Planned]) -> list[RetainedCache]:
        """A cache for each reading of one row. Chunks that begin and end alike are read together,
        as many as make up `TOGETHER` tokens."""
        done: dict[int, RetainedCache] = {}
        size = self.config.reading.chunk_size or TOGETHER
        groups = _together(readings, max(1, TOGETHER // size))
        left = [(self._opened([readings[i] for i in rows]), rows, 0) for rows in groups]
        while left:
            cache, rows, at = left.pop()
            for alike in _alike_at(readings, rows, at):
                whole = len(alike) == len(rows)
                part = cache if whole else cache.rows([rows.index(i) for i in alike])
                if at == len(readings[alike[0]].chunks):
                    for place, i in enumerate(alike):
                        row = part if len(alike) == 1 else part.rows([place])
                        done[i] = self._closed(row, readings[i])
                else:
                    self._read_chunk(part, [readings[i] for i in alike], at)
                    left.append((part, alike, at + 1))
        return [done[i] for i in range(len(readings))]

    def _opened(self, readings: Sequence[Planned]) -> RetainedCache:
        """An empty cache for readings that go together."""
        cache = self._empty(readings[0].budgets)
        cache.model = describe(self.backbone.model)
        cache.longrope = self.backbone.longrope
        lengths = tuple(reading.prompt_length for reading in readings)
        cache.prompt_lengths = lengths if len(set(lengths)) > 1 else lengths[:1]
        cache.query_length = readings[0].query_length
        return cache

    def _read_chunk(self, cache: RetainedCache, readings: Sequence[Planned], at: int) -> None:
        """Read the chunk number `at`, which all readings have."""
        like = readings[0]
        (start, end), final = like.chunks[at], at + 1 == len(like.chunks)
        if like.budgets is not None:
            stabilizers = 0 if final else self.config.stabilizers_for(like.budgets)
            drop = like.drop if final else 0
            query, merging = like.query_length, cache.merging
            cache.eviction = Eviction(like.budgets, stabilizers, query, drop=drop, merging=merging)
        self.take_in(torch.cat([reading.ids[:, start:end] for reading in readings]), cache)
        if self.progress is not None:
            self.progress(end, like.ids.shape[1])

    def _closed(self, cache: RetainedCache, reading: Planned) -> RetainedCache:
        """The cache after the last chunk, to be asked."""
        cache.eviction = None
        cache.token_ids = reading.ids[:, : reading.ids.shape[1] - reading.drop].cpu()
        cache.unread_ids = cache.token_ids[:, :0]
        return cache

    def _empty(self, budgets: tuple[int, ...] | None) -> RetainedCache:
        windows, storage = self.backbone.windows, self.config.storage
        return RetainedCache(
            len(windows),
            one_if_equal(budgets),
            self.config.reading.positions,
            windows,
            storage.quantization,
            merging=storage.merging if budgets else None,
            recall=storage.recall,
        )


def one_if_equal(budgets: tuple[int, ...] | None) -> int | tuple[int, ...] | None:
    """The budgets of layers as `RetainedCache` has them."""
    return budgets[0] if budgets and len(set(budgets)) == 1 else budgets


def _together(readings: Sequence[Planned], most: int) -> list[list[int]]:
    """Which readings may begin together, `most` at a time: they keep alike, of alike questions."""
    groups: dict[tuple[object, ...], list[int]] = {}
    for i, reading in enumerate(readings):
        alike = reading.budgets, reading.query_length, reading.drop
        groups.setdefault(alike, []).append(i)
    return [group[at : at + most] for group in groups.values() for at in range(0, len(group), most)]


def _alike_at(readings: Sequence[Planned], rows: Sequence[int], at: int) -> list[list[int]]:
    """Those of `rows` whose chunks number `at` are alike: both final or not, or there is none."""
    groups: dict[tuple[object, ...], list[int]] = {}
    for i in rows:
        chunks = readings[i].chunks
        alike = chunks[at : at + 1], at + 1 == len(chunks)
        groups.setdefault(alike, []).append(i)
    return list(groups.values())


def _chunks(total: int, size: int | None, together: int) -> list[tuple[int, int]]:
    """Start and end of every chunk; the last `together` tokens are all in the last one."""
    starts = [*range(0, max(total - together, 1), size or max(total, 1))] if total else []
    return [*zip(starts, [*starts[1:], total], strict=False)]
