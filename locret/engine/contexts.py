"""What of prompts, contexts and questions is read when: which tokens together, cut into which
chunks, and how much of them stays. What a layer does with a chunk is `locret.engine.reading`.

A prompt's last tokens are left for the call that answers; query-aware heads read some of them in
front of it. Every chunk goes through all layers, each of which evicts at once
(`locret.engine.reading`). Rows of different lengths are not padded to be read: chunks that begin
and end alike are read together, and each row's last ones by themselves. Contexts of one row each
may be asked `together`, with questions of any lengths.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor, nn

from locret.cache.cache import Budgets, RetainedCache
from locret.cache.context import Counts
from locret.cache.files import describe
from locret.cache.sizing import Sizing
from locret.engine.arguments import check_ids, check_together, unpadded
from locret.engine.attention import freeze
from locret.engine.config import EngineConfig
from locret.engine.reading import ChunkForward
from locret.model.backbone import Backbone
from locret.model.hooks import without_autocast
from locret.quantities import ByteShare, Memory

Progress = Callable[[int, int], None]
"""Called after every chunk with the tokens read so far and the tokens to read in all."""

TOGETHER = 8192
"""Tokens of different rows that are read at a time: more does not make a device faster."""


class Planned(NamedTuple):
    """How a context is read.

    Attributes:
        ids: [B, n] long, a question in front of or behind the context included.
        prompt_length: tokens of the whole prompt.
        counts: units that every head of every layer keeps of it; None = all.
        query_length: tokens of the question in front.
        drop: tokens of the question behind, which are not kept.
        chunks: start and end of every chunk.
        slots: units that a head may get at most where the policy shares them out; None = any
            number.
    """

    ids: Tensor
    prompt_length: int
    counts: Counts | None
    query_length: int
    drop: int
    chunks: tuple[tuple[int, int], ...]
    slots: int | None


@dataclass
class Reader:
    """Reads contexts through an attached backbone, into caches of their own.

    Attributes:
        forward: runs a chunk through the layers.
        config: the engine's settings.
        sizing: what units take.
        progress: called after every chunk.
    """

    backbone: Backbone
    forward: ChunkForward
    config: EngineConfig
    sizing: Sizing
    progress: Progress | None = None

    def read_context(
        self, input_ids: Tensor, padding: list[int], query_ids: Tensor | None
    ) -> RetainedCache:
        """The cache of whole contexts [B, n], for a query [B, q] if one is given."""
        rows = unpadded(input_ids, padding)
        lengths = [row.shape[1] for row in rows]
        if len(set(lengths)) == 1:
            return self.read(torch.cat(rows), lengths[0], query_ids)
        queries = [None] * len(rows) if query_ids is None else query_ids.split(1)
        return self.read_rows(rows, lengths, queries, input_ids.shape[1])

    @property
    def unread(self) -> int:
        """Last tokens of a prompt that are read after the final eviction."""
        return 1 if self.config.reading.query_aware else self.config.reading.local_tokens

    def read_prompt(self, input_ids: Tensor, padding: list[int]) -> RetainedCache:
        """The cache after all of the prompt but its local tokens, or the last one of them."""
        width = input_ids.shape[1]
        unread = min(self.unread, width - max(padding))
        rows = unpadded(input_ids, padding)
        # A row that is shorter than the local tokens has fewer to be read by the call that answers;
        # what other rows have more, they read before.
        before = [row.shape[1] - min(self.unread, row.shape[1]) for row in rows]
        if not any(padding):
            context = input_ids[:, : before[0]]
            return self.read(context, width, self._query_of(input_ids, context))
        contexts = [row[:, :end] for row, end in zip(rows, before, strict=True)]
        queries = [self._query_of(row, c) for row, c in zip(rows, contexts, strict=True)]
        in_front = {0 if query is None else query.shape[1] for query in queries}
        if self.config.reading.decode_interval and len(in_front) > 1:
            raise ValueError(
                "decode_interval: some rows are too short for query-aware heads to read a question "
                "in front, which is never evicted, and others are not; ask one row at a time"
            )
        lengths = [row.shape[1] for row in rows]
        readings = self._plans(contexts, lengths, queries)
        caches = self._read_apart(readings)
        for i, row in enumerate(rows):
            local = row[:, before[i] : row.shape[1] - unread]
            caches[i] = self._with_local(caches[i], local, readings[i])
        return self.stacked(caches, width - unread)

    def _with_local(self, cache: RetainedCache, local: Tensor, reading: Planned) -> RetainedCache:
        """The cache of one row after some of its local tokens [1, n], too. None is evicted before
        they are all read."""
        if not local.shape[1]:
            return cache
        interval, eviction = self.config.reading.decode_interval, None
        if interval and reading.counts is not None:
            eviction = self.config.eviction(
                reading.counts, reading.query_length, interval + local.shape[1]
            )
        self.forward.store(local, cache, eviction)
        assert cache.token_ids is not None
        cache.token_ids = torch.cat([cache.token_ids, local.cpu()], dim=1)
        return cache

    @property
    def asks_together(self) -> bool:
        """Whether questions of different lengths about contexts can be asked together: all but
        their last tokens are read before, which is not the same to eviction and recall."""
        return self.config.reading.decode_interval is None and self.config.storage.recall is None

    def read_on(self, cache: RetainedCache, tokens: Tensor) -> None:
        """Let a cache read tokens [B, n] too, of which it evicts none."""
        assert cache.token_ids is not None
        new = torch.cat([cache.unread_ids, tokens.cpu()], dim=1)
        self.forward.store(new.to(tokens.device), cache)
        cache.token_ids = torch.cat([cache.token_ids, new], dim=1)
        cache.unread_ids = new[:, :0]

    def _query_of(self, prompt: Tensor, context: Tensor) -> Tensor | None:
        """What query-aware heads read in front of a prompt's context, if there is any."""
        tokens = self.config.recorded.query_tokens
        if tokens and self.config.reading.budget is not None and context.shape[1]:
            return prompt[:, -tokens:]
        return None

    def read(
        self, input_ids: Tensor, prompt_length: int, query_ids: Tensor | None = None
    ) -> RetainedCache:
        """The cache of contexts [B, n] of one length, after their last chunk.

        Args:
            prompt_length: tokens of the whole prompt, of which the context is the beginning.
            query_ids: [B, q] long, read behind the context and given up where the reader is
                `query_aware`, else in front of it and kept.
        """
        if input_ids.shape[0] > self._rows_at_once(input_ids.shape[1]):
            rows = input_ids.split(1)
            queries = [None] * len(rows) if query_ids is None else query_ids.split(1)
            return self.read_rows(rows, [prompt_length] * len(rows), queries, input_ids.shape[1])
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
        readings = self._plans(contexts, prompt_lengths, queries)
        return self.stacked(self._read_apart(readings), width)

    def stacked(self, rows: Sequence[RetainedCache], width: int) -> RetainedCache:
        """Caches of one row each as one of at least `width` tokens."""
        # Not of more than the longest has by itself: what padded a row in another batch goes.
        own = [row.shifted(row.seen)[0] for row in rows]
        padded_to = max(width, *own)
        ids = [row.token_ids for row in rows if row.token_ids is not None]
        assert len(ids) == len(rows)
        ids = [each[:, each.shape[1] - n :] for each, n in zip(ids, own, strict=True)]
        with without_autocast(self.backbone.model.device):
            cache = RetainedCache.stack(list(rows), padded_to)
        cache.token_ids = torch.cat(
            [nn.functional.pad(i, (padded_to - i.shape[1], 0)) for i in ids]
        )
        cache.unread_ids = cache.token_ids[:, :0]
        return cache

    def new_cache(self, context: int) -> tuple[RetainedCache, Counts | None]:
        """An empty cache for a context of that many tokens, and what each head keeps of it."""
        counts = self.config.counts(self.forward.policy, self.sizing, context)
        return self._empty(counts), counts

    def _plans(
        self,
        contexts: Sequence[Tensor],
        prompt_lengths: Sequence[int],
        queries: Sequence[Tensor | None],
    ) -> list[Planned]:
        each = zip(contexts, prompt_lengths, queries, strict=True)
        return [self._plan(context, length, query) for context, length, query in each]

    def _plan(self, ids: Tensor, prompt_length: int, query_ids: Tensor | None) -> Planned:
        length, aware = ids.shape[1], self.config.reading.query_aware
        in_last, drop, query = self.config.reading.local_tokens - 1 if aware else 0, 0, 0
        if query_ids is not None and aware:
            in_last = drop = query_ids.shape[1]
            ids = torch.cat([ids, query_ids], dim=1)
        elif query_ids is not None:
            query = query_ids.shape[1]
            ids = torch.cat([query_ids, ids], dim=1)
        chunks = tuple(_chunks(ids.shape[1], self.config.reading.chunk, in_last))
        longest = max((end - start for start, end in chunks), default=0)
        sizing = replace(self.sizing, chunk=longest, beside=ids.shape[1] - length)
        counts = self.config.counts(self.forward.policy, sizing, length)
        slots = sizing.head_slots(length) if self.forward.policy.shares else None
        return Planned(ids, prompt_length, counts, query, drop, chunks, slots)

    def _read_apart(self, readings: list[Planned]) -> list[RetainedCache]:
        """A cache for each reading of one row. Chunks that begin and end alike are read together,
        as many as make up `TOGETHER` tokens."""
        done: dict[int, RetainedCache] = {}
        longest = max(reading.ids.shape[1] for reading in readings)
        groups = _together(readings, self._rows_at_once(longest))
        left = [(self._opened([readings[i] for i in rows]), rows, 0) for rows in groups]
        while left:
            cache, rows, at = left.pop()
            for alike in _alike_at(readings, rows, at):
                whole = len(alike) == len(rows)
                those = cache if whole else cache.rows([rows.index(i) for i in alike])
                if at == len(readings[alike[0]].chunks):
                    for place, i in enumerate(alike):
                        row = those if len(alike) == 1 else those.rows([place])
                        done[i] = self._closed(row, readings[i])
                else:
                    self._read_chunk(those, [readings[i] for i in alike], at)
                    left.append((those, alike, at + 1))
        return [done[i] for i in range(len(readings))]

    def _rows_at_once(self, length: int) -> int:
        """Rows of so many tokens whose chunks make up `TOGETHER` tokens: more would need memory for
        their activations, and read no faster."""
        return max(1, TOGETHER // max(1, min(self.config.reading.chunk or length, length)))

    def _opened(self, readings: Sequence[Planned]) -> RetainedCache:
        """An empty cache for readings that go together."""
        cache = self._empty(readings[0].counts)
        cache.model = describe(self.backbone.model)
        cache.longrope = self.backbone.longrope
        lengths = tuple(reading.prompt_length for reading in readings)
        cache.prompt_lengths = lengths if len(set(lengths)) > 1 else lengths[:1]
        cache.query_length = readings[0].query_length
        return cache

    def _read_chunk(self, cache: RetainedCache, readings: Sequence[Planned], at: int) -> None:
        """Read the chunk number `at`, which all readings have."""
        like, eviction = readings[0], None
        (start, end), final = like.chunks[at], at + 1 == len(like.chunks)
        if like.counts is not None:
            drop, query, slots = like.drop if final else 0, like.query_length, like.slots
            eviction = self.config.eviction(
                like.counts, query, drop=drop, merging=cache.merging, slots=slots
            )
            if final:
                eviction = replace(eviction, stabilizers=0)
        chunk = torch.cat([reading.ids[:, start:end] for reading in readings])
        self.forward.store(chunk, cache, eviction, like.chunks[-1][1] - end)
        if final and eviction is not None and self.forward.policy.rereads:
            context = torch.cat([reading.ids[:, : end - eviction.drop] for reading in readings])
            self.forward.reread(context, cache, replace(eviction, drop=0))
        if self.progress is not None:
            self.progress(end, like.ids.shape[1])

    def _closed(self, cache: RetainedCache, reading: Planned) -> RetainedCache:
        """The cache after the last chunk, to be asked."""
        cache.token_ids = reading.ids[:, : reading.ids.shape[1] - reading.drop].cpu()
        cache.unread_ids = cache.token_ids[:, :0]
        if self.config.reading.decode_interval is None:
            in_bytes = isinstance(self.config.reading.budget, Memory | ByteShare)
            for layer in cache.layers:
                layer.close(tight=in_bytes)
        return cache

    def _empty(self, counts: Counts | None) -> RetainedCache:
        windows, storage = self.backbone.windows, self.config.storage
        return RetainedCache(
            len(windows),
            one_if_equal(counts),
            self.config.reading.positions,
            windows,
            storage.quantization,
            merging=storage.merging if counts else None,
            recall=storage.recall,
        )


def one_if_equal(counts: Counts | None) -> Budgets:
    """What heads keep, as `RetainedCache` has it."""
    if counts is None or any(len(set(heads)) > 1 for heads in counts):
        return counts
    budgets = tuple(heads[0] for heads in counts)
    return budgets[0] if len(set(budgets)) == 1 else budgets


def counts_of(budgets: Budgets, layers: int, heads: int) -> Counts:
    """What `one_if_equal` was given."""
    assert budgets is not None
    of_layers = (budgets,) * layers if isinstance(budgets, int) else budgets
    return tuple((of,) * heads if isinstance(of, int) else of for of in of_layers)


def _together(readings: Sequence[Planned], most: int) -> list[list[int]]:
    """Which readings may begin together, `most` at a time: they keep alike, of alike questions."""
    groups: dict[tuple[object, ...], list[int]] = {}
    for i, reading in enumerate(readings):
        alike = reading.counts, reading.query_length, reading.drop, reading.slots
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


def together(
    reader: Reader, caches: Sequence[RetainedCache], questions: Sequence[Tensor]
) -> RetainedCache:
    """Caches of one row each as one batch, after tokens [1, n] more of each, or none.

    Raises:
        ValueError: no caches, one of several rows, or some that differ in what a batch has in
            common; some caches have no question and others do, or some have tokens to read that
            may evict units (`decode_interval`).
    """
    check_together(caches, reader.backbone, reader.config.reading.decode_interval is not None)
    for question in questions:
        check_ids(question)
    if len(questions) not in (0, len(caches)):
        raise ValueError(
            f"{len(questions)} questions for {len(caches)} caches; expected one for each, or none"
        )
    rows = [cache.fork() for cache in caches]
    if len({layer.rotated for row in rows for layer in row.retained_layers}) > 1:
        for row in rows:
            _freeze(reader, row)
    unread = [row.unread_ids for row in rows]
    if not questions and len({ids.shape[1] for ids in unread}) == 1:
        batch = reader.stacked(rows, 0)
        batch.unread_ids = torch.cat(unread)  # it is read with the next question
        return batch
    if reader.config.reading.decode_interval and rows[0].budget is not None:
        raise ValueError(
            "decode_interval: contexts cannot read questions together, nor can those that were "
            "asked before stand beside fresh ones; ask one at a time"
        )
    asked = [question.cpu() for question in questions] or [ids[:, :0] for ids in unread]
    # Stacking forgets what is unread.
    tokens = [torch.cat(both, dim=1) for both in zip(unread, asked, strict=True)]
    return _after(reader, lambda alike: reader.stacked([rows[i] for i in alike], 0), tokens)


def _after(
    reader: Reader, take: Callable[[list[int]], RetainedCache], tokens: Sequence[Tensor]
) -> RetainedCache:
    """All rows as one batch after what is unread of each and tokens [1, n] more, which may be none;
    those that read equally many read at once.

    Args:
        take: some rows as a cache of their own.
    """
    device = reader.backbone.layers[0].device  # that of the model is "meta" where weights wait
    lengths = [ids.shape[1] for ids in tokens]
    read: dict[int, RetainedCache] = {}
    for length in sorted(set(lengths)):
        alike = [i for i, own in enumerate(lengths) if own == length]
        some = take(alike)
        if length + some.unread_ids.shape[1]:
            reader.read_on(some, torch.cat([tokens[i] for i in alike]).to(device))
        read |= {i: some.rows([place]) for place, i in enumerate(alike)}
    return reader.stacked([read[i] for i in range(len(tokens))], 0)


def read_questions(
    reader: Reader, cache: RetainedCache, questions: Tensor, padding: list[int]
) -> Tensor:
    """Read questions of different lengths, all but their last tokens.

    Returns:
        [B, n] long: all that the cache knows then, padded on the left, and the last tokens.
    """
    one = questions.shape[1] - max(padding) + cache.unread_ids.shape[1] == 1
    if one or not reader.asks_together or cache.recall is not None:
        what = "a question of one token" if one else "with decode_interval or recall, questions"
        raise ValueError(
            f"attention_mask holds zeros: {what} cannot be asked together with longer ones; "
            "ask rows of equal length, or one row at a time"
        )
    before = [questions[i : i + 1, skip:-1] for i, skip in enumerate(padding)]
    cache.restore(_after(reader, cache.rows, before).snapshot())
    assert cache.token_ids is not None
    return torch.cat([cache.token_ids.to(questions.device), questions[:, -1:]], dim=1)


def _freeze(reader: Reader, cache: RetainedCache) -> None:
    """Rotate what a cache holds, as those have that were asked before."""
    for at, layer in zip(reader.backbone.layers, cache.layers, strict=True):
        if layer.window is None and not layer.is_empty:
            freeze(layer, at.rotary, cache.prompt_lengths)
