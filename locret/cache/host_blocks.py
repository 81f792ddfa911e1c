"""The evicted units of a layer: those that wait to fill a block, and the blocks in host memory.

Recalled units all stand at one slot, the oldest one held (InfLLM, section 3.3), in compact
positions; at their own in original ones. Units that do not fill a block yet wait on the device and
are attended to with every chunk and step.

B batch, H KV heads, G query heads a KV head, T new tokens, S units held, D head size, n units a
block, N blocks, R recalled units.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from locret.cache.recall import HostPool, Recall, block_relevance, mean_logits

WAITING = ("keys", "values", "positions", "scores")
BLOCK = WAITING[:3]


class Recalled(NamedTuple):
    """What came back: keys, rotated, and values [B, H, R, D]; source positions [B, H, R] long;
    which of them are units at all, bool [B, H, R], None = all."""

    keys: Tensor
    values: Tensor
    positions: Tensor
    valid: Tensor | None


@dataclass(frozen=True)
class _Stored:
    """All that was evicted in one layer. Never changed where it stands.

    Attributes:
        waiting: `WAITING` of units that fill no block yet, [B, H, W, D] or [B, H, W], on the
            device, each head's at the front; the oldest first.
        counts: how many a head has of them, long [B, H] on the CPU.
        table: the pool's place of every block of a head, in the order they came, long [B, H, N] on
            the CPU; -1 behind a head's last.
        means: mean keys of the blocks' representatives, [B, H, N, D] on the device.
        pool: the blocks.
    """

    waiting: tuple[Tensor, ...]
    counts: Tensor
    table: Tensor
    means: Tensor
    pool: HostPool

    @classmethod
    def nothing(cls, like: Sequence[Tensor], counts: Tensor) -> "_Stored":
        """No units, in tensors like these `WAITING`."""
        waiting = tuple(tensor[:, :, :0] for tensor in like)
        table = torch.empty(*counts.shape, 0, dtype=torch.long)
        return cls(waiting, torch.zeros_like(counts), table, waiting[0], HostPool())

    @property
    def blocks(self) -> Tensor:
        """Blocks of each head, long [B, H] on the CPU."""
        return (self.table >= 0).sum(dim=-1)


class HostBlocks:
    """The evicted units of one layer.

    Args:
        recall: what comes back of them.
    """

    def __init__(self, recall: Recall) -> None:
        self.recall = recall
        self.clear()

    def clear(self) -> None:
        """Hold nothing."""
        self.restore(None)

    def view(self) -> Any:
        """What is held now, for `restore`. Nothing is copied."""
        return self._stored

    def restore(self, view: Any) -> None:
        """Hold again what was held when `view` was taken."""
        self._stored: _Stored | None = view
        self._looked: Callable[[Tensor], Tensor] | None = None  # of stored keys [B, H, S, D]
        self._rotate: Callable[[Tensor], Tensor] | None = None
        self._fetched: tuple[Tensor, ...] = ()  # tensors `BLOCK` of [B * H * blocks, n, ...]
        self._places = torch.empty(0, 0, 0, dtype=torch.long)  # in the pool, [B, H, blocks]

    @property
    def nbytes(self) -> int:
        """Bytes on the device: units that wait, mean keys, and the blocks that came back last."""
        on_device = self._fetched
        if self._stored is not None:
            on_device = (*on_device, *self._stored.waiting, self._stored.means)
        return sum(tensor.nbytes for tensor in on_device)

    @property
    def host_bytes(self) -> int:
        """Bytes of host memory."""
        return 0 if self._stored is None else self._stored.pool.nbytes

    @property
    def units(self) -> int:
        """Evicted units, in the head that has most."""
        if self._stored is None:
            return 0
        filled = self._stored.blocks * self.recall.block_size
        return int((filled + self._stored.counts).max())

    @property
    def recalled(self) -> int:
        """Units that came back last and that wait to fill a block, each in the head that has
        most."""
        if self._stored is None:
            return 0
        blocks = (self._places >= 0).sum(dim=-1)
        blocks_at_most = int(blocks.max()) if blocks.numel() else 0
        return blocks_at_most * self.recall.block_size + int(self._stored.counts.max())

    def look(
        self,
        query: Tensor,
        context: Tensor | None,
        key: Tensor,
        rotate: Callable[[Tensor], Tensor] | None,
        at_once: bool,
    ) -> None:
        """Note how a chunk looks at the units that may be evicted after it.

        Args:
            query: [B, H*G, T, D]; context: keys [B, H, S, D], None = none; key: [B, H, T, D]; all
                rotated.
            rotate: rotates stored keys [B, H, any, D] at the one slot of recalled units; None =
                they are stored as they are attended to.
            at_once: what comes is decided only after other layers ran.
        """
        scores = mean_logits(query, context, key) if at_once else None
        self._rotate = rotate
        self._looked = lambda _: mean_logits(query, context, key) if scores is None else scores

    def look_at_none(self, rotate: Callable[[Tensor], Tensor] | None) -> None:
        """The same where no chunk is read before the eviction, nor looks at any unit: those that
        were evicted first represent a block."""
        self._rotate = rotate
        self._looked = lambda keys: torch.full(
            keys.shape[:3], -torch.inf, dtype=torch.float32, device=keys.device
        )

    def forget_look(self) -> None:
        """The chunk is done with: keep none of its tensors."""
        self._looked = self._rotate = None

    def take(
        self,
        context: Sequence[Tensor],
        new: Sequence[Tensor],
        kept: Tensor,
        fillers: Tensor | None,
        empty: Tensor | None,
    ) -> None:
        """Take those of held and new units that are not kept.

        Args:
            context: keys, values [B, H, S, D] as stored, and source positions [B, H, S]; new: the
                same of T units, which may be fewer than `look` was shown.
            kept: indices [B, H, K] long, ascending, of held and new units together.
            fillers: how many leading ones of a head's `kept` keep nothing, [B, H]; None = none.
            empty: leading slots of a head that hold nothing, [B, H]; None = none.
        """
        assert self._looked is not None, "a chunk is looked at before it is evicted from"
        scores = self._looked(context[0])[:, :, : context[0].shape[2] + new[0].shape[2]]
        index, counts = _not_kept(scores.shape[2], kept, fillers, empty)
        if not index.shape[2]:
            return
        keys, values, positions = _gathered(context, new, index)
        if self._rotate is not None:
            keys = self._rotate(keys)
        self._add((keys, values, positions, scores.gather(2, index)), counts)
        self.forget_look()

    def _add(self, evicted: Sequence[Tensor], counts: Tensor) -> None:
        """Take `WAITING` of evicted units, [B, H, E, D] or [B, H, E], of which each head's `counts`
        first ones, [B, H] on the CPU, are units: full blocks go to the host, what is left waits."""
        stored = self._stored or _Stored.nothing(evicted, counts)
        size, device = self.recall.block_size, evicted[0].device
        total = stored.counts + counts
        order = _in_front(stored.counts, counts, stored.waiting[0], evicted[0])
        full = total // size
        most, left = int(full.max()), total - full * size
        pool, table, means = stored.pool, stored.table, stored.means
        if most:
            blocks = _gathered(stored.waiting, evicted, order[:, :, : most * size])
            which = (torch.arange(most) < full[..., None]).nonzero().unbind(dim=1)
            at = tuple(x.to(device) for x in which)
            keys, *others, scores = (x.unflatten(2, (most, size))[at] for x in blocks)
            table, means = self._listed(stored, full, which, self._mean_keys(keys, scores))
            pool = pool.with_blocks([keys, *others])
        step = torch.arange(int(left.max()))
        rest = (full[..., None] * size + step).clamp(max=order.shape[2] - 1).to(device)
        waiting = _gathered(stored.waiting, evicted, order.gather(2, rest))
        self._stored = _Stored(waiting, left, table, means, pool)

    def _mean_keys(self, keys: Tensor, scores: Tensor) -> Tensor:
        """[N, D], of the representatives of blocks with keys [N, n, D] and scores [N, n]."""
        # Stable: the last token of each chunk has no logits yet, so many units tie at -inf, and
        # the ones that stand first represent the block whatever the device.
        best = scores.sort(dim=-1, descending=True, stable=True).indices
        chosen = best[..., : self.recall.representatives]
        chosen = chosen[..., None].expand(*chosen.shape, keys.shape[-1])
        return keys.gather(1, chosen).float().mean(dim=1).to(keys.dtype)

    def _listed(
        self, stored: _Stored, more: Tensor, which: Sequence[Tensor], new_means: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Table and means with `more` [B, H] blocks; the new ones are blocks `which` of these."""
        row, head, number = which
        blocks = stored.blocks
        count = int((blocks + more).max())
        grow = count - stored.table.shape[2]
        table = pad(stored.table, (0, grow), value=-1)
        means = pad(stored.means, (0, 0, 0, grow))
        at = blocks[row, head] + number
        table[row, head, at] = stored.pool.count + torch.arange(len(row))
        device = means.device
        means[row.to(device), head.to(device), at.to(device)] = new_means
        return table, means

    def in_front(
        self, query: Tensor, keys: Tensor, values: Tensor, empty: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Keys and values [B, H, R + S, D] that `query` attends to: what it recalls, before those
        given, which stay in order; and how many leading slots hold nothing, as `empty` before.

        Args:
            query: [B, H*G, T, D]; keys: [B, H, S, D], both rotated; values: [B, H, S, D].
            empty: [B, H] long: leading slots of a head that hold nothing; None = none. More than S
                where padding goes on among the tokens that follow.
        """
        recalled = self.come_back(query)
        if recalled is None:
            return keys, values, empty
        keys = torch.cat([recalled.keys, keys], dim=2)
        values = torch.cat([recalled.values, values], dim=2)
        if recalled.valid is None and empty is None:
            return keys, values, None
        came, slots = recalled.keys.shape[2], torch.arange(keys.shape[2], device=keys.device)
        beyond = 0 if empty is None else (empty - (len(slots) - came)).clamp(min=0)
        valid = slots >= (0 if empty is None else empty[..., None] + came)
        valid = valid.expand(*keys.shape[:3]).clone()
        valid[:, :, :came] = True if recalled.valid is None else recalled.valid
        order = valid.byte().argsort(dim=-1, stable=True)
        none = [x[:, :, :0] for x in (keys, values)]
        keys, values = _gathered((keys, values), none, order)
        return keys, values, (~valid).sum(dim=-1) + beyond

    def come_back(self, query: Tensor) -> Recalled | None:
        """The most relevant blocks and the units that wait; None if nothing was evicted.

        Args:
            query: [B, H*G, T, D], rotated.
        """
        stored = self._stored
        if stored is None:
            return None
        waiting, counts = stored.waiting[:3], stored.counts
        self._fetch(stored, self._choose(stored, query))
        blocks = [x[:, :, :0] for x in waiting]
        if self._places.shape[2]:
            shape = (*self._places.shape[:2], -1)
            blocks = [x.reshape(*shape, *x.shape[2:]) for x in self._fetched]
        keys, values, positions = (torch.cat(two, 2) for two in zip(blocks, waiting, strict=True))
        filled = (self._places >= 0).repeat_interleave(self.recall.block_size, dim=2)
        step = torch.arange(waiting[0].shape[2])
        valid = torch.cat([filled, step < counts[..., None]], dim=2)
        some = None if bool(valid.all()) else valid.to(query.device)
        return Recalled(keys, values, positions, some)

    def _choose(self, stored: _Stored, query: Tensor) -> Tensor:
        """The pool's places of each head's most relevant blocks, in the order they came, long
        [B, H, blocks at most] on the CPU; -1 at the end of heads that have fewer."""
        count = stored.table.shape[2]
        if count <= self.recall.blocks:
            return stored.table
        relevance = block_relevance(query, stored.means)
        blocks = stored.blocks
        if int(blocks.min()) < count:
            beyond = torch.arange(count) >= blocks[..., None]
            relevance = relevance.masked_fill(beyond.to(relevance.device), -torch.inf)
        # Of blocks that are equally relevant the oldest, on every device.
        order = relevance.sort(dim=-1, descending=True, stable=True).indices
        chosen = order[..., : self.recall.blocks].sort(dim=-1).values
        return stored.table.gather(2, chosen.cpu())

    def _fetch(self, stored: _Stored, places: Tensor) -> None:
        """Have the blocks on `places` [B, H, blocks] on the device. Those there are not copied."""
        if torch.equal(places, self._places) or not places.numel():
            self._places = places
            return
        device, wanted = stored.means.device, places.flatten().tolist()
        there = {place: i for i, place in enumerate(self._places.flatten().tolist()) if place >= 0}
        missing = sorted({place for place in wanted if place >= 0} - set(there))
        tensors = self._fetched
        if missing:
            fetched = stored.pool.fetch(missing, device)
            before = len(self._fetched[0]) if self._fetched else 0
            there |= {place: before + i for i, place in enumerate(missing)}
            tensors = fetched
            if before:
                tensors = tuple(map(torch.cat, zip(self._fetched, fetched, strict=True)))
        # A head with fewer blocks has any block in the places of those that it has not.
        index = torch.tensor([there.get(place, 0) for place in wanted], device=device)
        self._fetched = tuple(tensor.index_select(0, index) for tensor in tensors)
        self._places = places

    def move(self, device: torch.device) -> None:
        """Be on `device`, but for what is in host memory."""
        if self._stored is None:
            return
        waiting = tuple(tensor.to(device) for tensor in self._stored.waiting)
        means, pool = self._stored.means.to(device), self._stored.pool
        if device.type == "cuda":
            pool = pool.pinned()
        self.restore(replace(self._stored, waiting=waiting, means=means, pool=pool))

    def select_batch(self, rows: Tensor, known: Sequence[int]) -> None:
        """Hold only the batch rows `rows` [B'] (long), which Python knows as `known`; rows may
        repeat, and then share blocks."""
        if self._stored is None:
            return
        at = torch.tensor(known)
        table = self._stored.table[at]
        most = int((table >= 0).sum(dim=-1).max())  # blocks of the rows that are left
        self._stored = replace(
            self._stored,
            waiting=tuple(tensor.index_select(0, rows) for tensor in self._stored.waiting),
            counts=self._stored.counts[at],
            table=table[:, :, :most],
            means=self._stored.means.index_select(0, rows)[:, :, :most],
        )

    def named_tensors(self) -> dict[str, Tensor]:
        """What is held, by name; the names that begin with `host` are of host memory."""
        stored = self._stored
        if stored is None:
            return {}
        named = {f"waiting.{name}": x for name, x in zip(WAITING, stored.waiting, strict=True)}
        named |= {"means": stored.means, "host.counts": stored.counts}
        places, table = stored.table.unique(return_inverse=True)
        used = places[places >= 0]
        named["host.table"] = table - (len(places) - len(used))
        if len(used):
            blocks = stored.pool.fetch(used.tolist(), torch.device("cpu"))
            named |= {f"host.{name}": x for name, x in zip(BLOCK, blocks, strict=True)}
        return named

    def take_tensors(self, named: Mapping[str, Tensor]) -> None:
        """Hold what `named_tensors` gave, those of host memory on the CPU."""
        if "means" not in named:
            return
        pool = HostPool()
        if "host.keys" in named:
            pool = pool.with_blocks([named[f"host.{name}"] for name in BLOCK])
        waiting = tuple(named[f"waiting.{name}"] for name in WAITING)
        means = named["means"]
        if means.is_cuda:
            pool = pool.pinned()
        self.restore(_Stored(waiting, named["host.counts"], named["host.table"], means, pool))

    @staticmethod
    def stack(rows: "Sequence[HostBlocks]") -> "HostBlocks":
        """The rows of a batch, of one row each, as one."""
        stacked = HostBlocks(rows[0].recall)
        some = next((row._stored for row in rows if row._stored is not None), None)
        if some is None:
            return stacked
        stored = [row._stored or _Stored.nothing(some.waiting, some.counts) for row in rows]
        pool, tables = HostPool(), []
        for row in stored:
            pool, moved = pool.joined(row.pool)
            there = row.table >= 0
            tables.append(row.table.masked_scatter(there, moved[row.table[there]]))
        waiting = zip(*(row.waiting for row in stored), strict=True)
        stacked._stored = _Stored(
            tuple(_stack(tensors) for tensors in waiting),
            torch.cat([row.counts for row in stored]),
            _stack(tables, -1),
            _stack([row.means for row in stored]),
            pool,
        )
        return stacked


def _gathered(old: Sequence[Tensor], new: Sequence[Tensor], index: Tensor) -> tuple[Tensor, ...]:
    """The units at `index` [B, H, K] of old and, after them, new ones, [B, H, any, D] or
    [B, H, any]."""
    both = (torch.cat(pair, dim=2) for pair in zip(old, new, strict=True))
    at = {3: index, 4: index[..., None]}
    return tuple(units.take_along_dim(at[units.dim()], dim=2) for units in both)


def _not_kept(
    size: int, kept: Tensor, fillers: Tensor | None, empty: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Indices [B, H, E] of those of `size` units that are not kept and hold something, ascending;
    each head's first `counts` [B, H] (on the CPU) count."""
    shape, device = kept.shape[:2], kept.device
    if fillers is not None:
        kept = kept.masked_fill(
            torch.arange(kept.shape[2], device=device) < fillers[..., None], size
        )
    slot = torch.arange(size, device=device).expand(*shape, size)
    gone = torch.ones(*shape, size + 1, dtype=torch.bool, device=device)
    gone = gone.scatter_(2, kept, False)[..., :size]  # noqa: FBT003
    if empty is not None:
        gone = gone & (slot >= empty[..., None])
    if fillers is None and empty is None:
        counts = torch.full(shape, size - kept.shape[2])
    else:
        counts = gone.sum(dim=-1).cpu()
    index = slot.masked_fill(~gone, size).sort(dim=-1).values[..., : int(counts.max())]
    return index.clamp(max=max(size - 1, 0)).contiguous(), counts


def _in_front(first: Tensor, second: Tensor, like: Tensor, other: Tensor) -> Tensor:
    """The order [B, H, W + E] in which the units that count come before the others: of `like`
    [B, H, W, D] each head's `first`, of `other` [B, H, E, D] its `second` first ones."""
    widths, device = (like.shape[2], other.shape[2]), other.device
    counted = torch.cat(
        [torch.arange(w) < c[..., None] for w, c in zip(widths, (first, second), strict=True)], -1
    )
    if bool(counted.all()):
        return torch.arange(sum(widths), device=device).expand(*first.shape, sum(widths))
    return (~counted).byte().argsort(dim=-1, stable=True).to(device)


def _stack(tensors: Sequence[Tensor], filler: int = 0) -> Tensor:
    """Tensors [1, H, any, ...] as one batch, filled up behind."""
    longest = max(tensor.shape[2] for tensor in tensors)
    return torch.cat(
        [pad(x, (*[0, 0] * (x.dim() - 3), 0, longest - x.shape[2]), value=filler) for x in tensors]
    )
