"""The units of one layer: a flat, ragged context that never changes, and a tail that grows.

The *context* is what evictions have left: keys, values, scores and source positions of all
sequences, one after the other, as many in each as it keeps (`locret.cache.sequences`). Where a
scheme packs (`locret.quantization`), all but the last `residual` units of each sequence are packed.
It is never changed where it stands: snapshots share it. The *tail* is a rectangle of what came
after, as it came. An eviction chooses among both and makes a new context.

B rows, H KV heads, Q = B * H sequences, N units of the context, T units of the tail, D head size.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from locret.cache.context import (
    POSITIONS,
    StoredContext,
    from_named,
    in_storage,
    nothing,
    places,
    stack,
    to_named,
)
from locret.cache.sequences import Sequences, alike, sequences_of
from locret.cache.tail import NewTokens, Tail, TailView
from locret.kernels import gather_sequences
from locret.quantization import NO_SCHEME, Scheme
from locret.quantization.packed import fetch, pack_keys, select_keys, select_values

NAMES = ("keys", "values", POSITIONS, "scores", "weights")
"""What a unit has: its score until nothing is evicted any more, a weight where evicted values are
merged (`locret.cache.merging`)."""

STEPS = 256
"""Most units of an answer that stay as they are before they are packed, where its steps come from a
CUDA graph: packing makes new tensors, and so a new graph."""


StoreView = tuple[StoredContext | None, TailView, tuple[str, ...]]
"""What a store held at some moment: context, tail and names."""


class Store:
    """Context and tail of one layer.

    Args:
        scheme: how keys and values of the context are packed.
        weighs: units hold a weight (`StoredContext.weights`): 1 for new ones.

    Attributes:
        context: None before the first eviction.
        tail: `names` of its units: keys and values [B, H, T, D], all else [B, H, T].
        names: those of `NAMES` that units have.
    """

    def __init__(self, scheme: Scheme = NO_SCHEME, weighs: bool = False) -> None:
        self.scheme = scheme
        self.weighs = weighs
        self.clear()

    def clear(self) -> None:
        """Hold nothing."""
        self.context: StoredContext | None = None
        self.tail = Tail()
        self.names: tuple[str, ...] = NAMES if self.weighs else NAMES[:4]

    @property
    def scored(self) -> bool:
        """Whether units have scores still (`drop_scores`)."""
        return "scores" in self.names

    @property
    def is_empty(self) -> bool:
        return self.context is None and not self.tail.count

    @property
    def like(self) -> Tensor:
        """A tensor whose dtype, device and last dimension are those of keys."""
        return self.tail.tensors[0] if self.context is None else self.context.keys

    @property
    def sequences(self) -> Sequences:
        """Units of context and tail together."""
        tail = self.tail.count
        if self.context is not None:
            return self.context.sequences.plus(tail)
        keys = self.tail.tensors[0]
        return alike(keys.shape[0], (tail,) * keys.shape[1], keys.device)

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """All storage, spare room of the tail included."""
        context = self.context
        if context is None:
            return self.tail.tensors
        beside = (*(context.positions or ()), *context.exact.values())
        return (*context.kv_tensors, *beside, *self.tail.tensors)

    @property
    def nbytes(self) -> int:
        """Bytes of all storage."""
        return sum(tensor.nbytes for tensor in self.tensors)

    @property
    def kv_bytes(self) -> int:
        """Bytes of the storage of keys and values alone."""
        context = self.context
        own = () if context is None else context.kv_tensors
        return sum(tensor.nbytes for tensor in (*own, *self.tail.tensors[:2]))

    @property
    def full_bytes(self) -> int:
        """Bytes of one token's keys and values as they come, in all rows and heads."""
        if self.is_empty:
            return 0
        rows, heads = self.sequences.shape
        return 2 * rows * heads * self.like.shape[-1] * self.like.element_size()

    def rectangle(self, name: str) -> Tensor:
        """Context and tail as [B, H, S, *], filled up in front with zeros where sequences are
        shorter than others (`Sequences.empty`): for what relates units to each other.

        Args:
            name: of `NAMES`.
        """
        tail = None if not self.tail.tensors else self.tail[self.names.index(name)]
        if self.context is None:
            assert tail is not None
            return tail
        own = self.context.sequences.rectangle(self.context.flat(name))
        return own if tail is None or not tail.shape[2] else torch.cat([own, tail], dim=2)

    def split(self, name: str) -> list[list[Tensor]]:
        """What each row and head has of `name`, context and tail together, [B][H]."""
        tail = [[*row] for row in self.tail[self.names.index(name)]] if self.tail.count else []
        if self.context is None:
            return tail
        own = self.context.sequences.split(self.context.flat(name))
        if not tail:
            return own
        rows = zip(own, tail, strict=True)
        return [[torch.cat(pair) for pair in zip(*row, strict=True)] for row in rows]

    def append(self, new: NewTokens, room: int = 0) -> None:
        """Add units to the tail.

        Args:
            room: units that are expected to come.
        """
        if self.scheme.packs:
            room = min(room, self.scheme.residual + self.scheme.group)
        self.tail.append(self._tensors(new), room)

    def _tensors(self, new: NewTokens) -> tuple[Tensor, ...]:
        """What is stored of new units: `names`."""
        scores = (new.scores,) if self.scored else ()
        weights = (torch.ones_like(new.scores),) if self.weighs else ()
        return (new.keys, new.values, new.positions, *scores, *weights)

    def retain(self, index: Tensor, kept: Sequences, new: NewTokens | None = None) -> None:
        """Hold some of the units of context, tail and `new` ones, as a context.

        Args:
            index: long [K], ascending in each sequence, its units counted through all three.
            kept: how many each sequence keeps of them.

        Raises:
            ValueError: a key or value cannot be packed; nothing has changed then.
        """
        fresh = self._fresh(new)
        if self.scheme.packs:
            most = self.scheme.residual
            packed = tuple(tuple(max(n - most, 0) for n in row) for row in kept.counts)
            self._repack(index, kept, sequences_of(packed, kept.device), fresh)
        else:
            self._gather(index, kept, fresh)
        assert self.context is not None
        self.context = replace(self.context, appended=(0,) * len(kept.counts))

    def pack(self, tight: bool = False) -> None:
        """What was appended has been attended to: pack it as far as it fills blocks; if `tight`,
        all but the scheme's residual, so that the bytes are those of an eviction. ValueError: a key
        or value cannot be packed; nothing has changed then."""
        scheme = self.scheme
        if not scheme.packs or not self.tail.count:
            return
        whole, fresh = self.sequences, self._fresh(None)
        done = self._before(fresh).packed.counts
        unit = 1 if tight else scheme.group

        def packed_of(count: int, before: int) -> int:
            return before + max(count - before - scheme.residual, 0) // unit * unit

        packed = tuple(tuple(map(packed_of, *row)) for row in zip(whole.counts, done, strict=True))
        if packed != done or tight:
            self._repack(whole.local, whole, sequences_of(packed, whole.device), fresh)

    def _before(self, fresh: tuple[Tensor, ...]) -> StoredContext:
        """The context; before the first eviction, one like fresh units that holds none."""
        return nothing(self.names, fresh) if self.context is None else self.context

    def _appended(self, context: StoredContext) -> tuple[int, ...]:
        """`StoredContext.appended` once the tail is context."""
        return tuple(count + self.tail.count for count in context.appended)

    def _fresh(self, new: NewTokens | None) -> tuple[Tensor, ...]:
        """Tail and new units, put side by side only where there are both."""
        if new is None:
            return tuple(self._tail_like())
        if not self.tail.count:
            return self._tensors(new)
        pairs = zip(self.tail, self._tensors(new), strict=True)
        return tuple(torch.cat(pair, dim=2) for pair in pairs)

    def _gather(self, index: Tensor, kept: Sequences, fresh: tuple[Tensor, ...]) -> None:
        """Hold units as they are."""
        context = self._before(fresh)
        old, offsets = [*context.in_full.values()], context.sequences.offsets
        old = [context.keys, context.values, *old]
        keys, values, *exact = gather_sequences(old, fresh, index, offsets, kept.offsets)
        none = sequences_of(tuple((0,) * len(row) for row in kept.counts), kept.device)
        made = kept, none, kept, keys, values, self._named(exact)
        self._hold(StoredContext(*made, appended=self._appended(context)), context)

    def _repack(
        self, index: Tensor, kept: Sequences, packed: Sequences, fresh: tuple[Tensor, ...]
    ) -> None:
        """Hold units of which the first `packed` of each sequence are packed."""
        context, (new_keys, new_values, *new_exact) = self._before(fresh), fresh
        old_exact, offsets = [*context.in_full.values()], context.sequences.offsets
        exact = gather_sequences(old_exact, new_exact, index, offsets, kept.offsets)
        rest = tuple(
            tuple(n - p for n, p in zip(*row, strict=True))
            for row in zip(kept.counts, packed.counts, strict=True)
        )
        plain = sequences_of(rest, kept.device)
        # Where each unit is now: first the packed ones, then the plain ones, then the fresh ones.
        at = in_storage(context, index, kept.owner, new_keys.shape[2])
        to_pack = at.index_select(0, places(kept, packed, at_end=False))
        to_leave = at.index_select(0, places(kept, plain, at_end=True))
        both = [x.flatten(0, 2) for x in (new_keys, new_values)]
        if context.plain.total:
            both = [torch.cat(x) for x in zip((context.keys, context.values), both, strict=True)]
        old = context.packed_keys, context.packed_values
        keys, values = None, None
        if packed.total:
            keys = select_keys(
                self.scheme, old[0], context.packed.flat, both[0], to_pack, packed.flat
            )
            values = select_values(self.scheme, old[1], both[1], to_pack)
        left = [fetch(o, x, to_leave).to(x.dtype) for o, x in zip(old, both, strict=True)]
        made = kept, packed, plain, left[0], left[1], self._named(exact), keys, values
        self._hold(StoredContext(*made, appended=self._appended(context)), context)

    def _hold(self, made: StoredContext, before: StoredContext) -> None:
        """Hold a context in place of another, closed if that was, and of the tail."""
        self.context = made if before.positions is None else made.closed()
        self.tail = Tail()

    def _named(self, exact: Sequence[Tensor]) -> dict[str, Tensor]:
        return dict(zip(self.names[2:], exact, strict=True))

    def freeze(
        self,
        rotate_context: Callable[[Tensor], Tensor],
        rotate_tail: Callable[[Tensor], Tensor],
        room: int,
    ) -> None:
        """Hold the same units with rotated keys: slots do not move any more.

        Args:
            rotate_context: of all keys of the context, flat [N, D].
            rotate_tail: of the tail's keys [B, H, T, D].
            room: units that are expected to come.

        Raises:
            ValueError: a key cannot be packed; nothing has changed then.
        """
        context = self.context
        if context is not None:
            keys = rotate_context(context.all_keys())
            packed = context.packed_keys
            if packed is not None:
                first = places(context.sequences, context.packed, at_end=False)
                packed = pack_keys(self.scheme, keys.index_select(0, first), context.packed.flat)
                keys = keys.index_select(0, places(context.sequences, context.plain, at_end=True))
            context = replace(context, keys=keys, packed_keys=packed)
        if self.tail.count:
            keys, *others = self.tail
            tail = Tail()
            tail.append((rotate_tail(keys), *others), room)
            self.tail = tail
        self.context = context

    def make_room(self, room: int, first_position: int) -> None:
        """Let units be written to the tail in place: spare room for as many, whose scores are zero
        and whose source positions go on from `first_position`."""
        if self.scheme.packs:
            self.pack()
            room = min(room, STEPS)
        if self.tail.capacity - self.tail.count < (room if self.scheme.packs else 1):
            self.tail = self._tail_like().with_room(room)
        spare = [tensor[:, :, self.tail.count :] for tensor in self.tail.tensors]
        last, device = first_position + spare[2].shape[2], spare[2].device
        spare[2][:] = torch.arange(first_position, last, dtype=torch.int32, device=device)
        for name, tensor in zip(self.names[3:], spare[3:], strict=True):
            tensor[:] = name == "weights"

    def _tail_like(self) -> Tail:
        """The tail, with tensors even if nothing is in it."""
        if self.tail.tensors:
            return self.tail
        assert self.context is not None
        rows, heads = self.context.sequences.shape
        exact = {POSITIONS: self.context.sequences.offsets} | self.context.exact
        like = (self.context.keys, self.context.values, *exact.values())
        tail = Tail()
        tail.append([x.new_empty(rows, heads, 0, *x.shape[1:]) for x in like])
        return tail

    def replace_scores(self, context: Tensor | None, tail: Tensor) -> None:
        """Give the units other scores: [N] of the context, [B, H, T] of the tail."""
        if self.context is not None and context is not None:
            exact = self.context.exact | {"scores": context}
            self.context = replace(self.context, exact=exact)
        if self.tail.count:
            self.tail.replace(self.names.index("scores"), tail)

    def drop_scores(self) -> None:
        """Nothing is evicted any more: hold no scores from here on."""
        if not self.scored:
            return
        which = self.names.index("scores")
        if self.context is not None:
            exact = {name: x for name, x in self.context.exact.items() if name != "scores"}
            self.context = replace(self.context, exact=exact)
        if self.tail.tensors:
            self.tail.drop(which)
        self.names = (*self.names[:which], *self.names[which + 1 :])

    def replace_values(self, values: Tensor, weights: Tensor) -> None:
        """Give the units of the context other values [N, D] and weights [N]; there is no tail."""
        assert self.context is not None and not self.tail.count
        exact = self.context.exact | {"weights": weights}
        self.context = replace(self.context, values=values, exact=exact)

    def drop_last(self, count: int) -> None:
        """Give up the last units of the tail."""
        if count:
            left = [x[:, :, : self.tail.count - count] for x in self.tail]
            self.tail = Tail()
            self.tail.append(left)

    def view(self) -> StoreView:
        """What is held now, for `restore`. Nothing is copied."""
        return self.context, self.tail.view(), self.names

    def restore(self, view: StoreView) -> None:
        """Hold again what was held when `view` was taken."""
        self.context, tail, self.names = view
        self.tail.restore(tail)

    def select_rows(self, rows: Sequence[int], index: Tensor) -> None:
        """Hold only some rows of the batch, which may repeat: `rows`; on the device, `index`."""
        if self.context is not None:
            self.context = self.context.take(rows)
        if self.tail.tensors:
            self.tail.select_batch(index)

    def move(self, device: torch.device) -> None:
        """Be on `device`."""
        if self.is_empty:
            return
        positions = None if self.context is None else self.context.positions
        moved = {name: tensor.to(device) for name, tensor in self.named_tensors().items()}
        self.take_tensors(moved, {n: x for n, x in self.lengths().items() if n != "closed"})
        if self.context is not None and positions is not None:
            self.context = self.context.closed(tuple(x.to(device) for x in positions))

    @staticmethod
    def of_rows(rows: "Sequence[Store]") -> "Store":
        """The rows of a batch, of one row each, as one. All of it is context then; no unit is
        packed, or packed anew, for it."""
        stacked = Store(rows[0].scheme, rows[0].weighs)
        stacked.context = stack([row.as_context() for row in rows])
        if stacked.context is not None:
            stacked.names = next(row.names for row in rows if not row.is_empty)
        return stacked

    def as_context(self) -> StoredContext | None:
        """All units as a context, those of the tail as they are; None = there are none."""
        if self.is_empty or not self.tail.count:
            return self.context
        absorbed = Store(self.scheme, self.weighs)
        absorbed.context, absorbed.tail, absorbed.names = self.context, self.tail, self.names
        whole, fresh = self.sequences, self._fresh(None)
        if self.scheme.packs:
            absorbed._repack(whole.local, whole, self._before(fresh).packed, fresh)
        else:
            absorbed._gather(whole.local, whole, fresh)
        return absorbed.context

    def lengths(self) -> dict[str, Any]:
        """How many units the context's sequences have, for `take_tensors`."""
        context = self.context
        if context is None:
            return {}
        counts = {name: getattr(context, name).counts for name in ("sequences", "packed", "plain")}
        return counts | {"appended": context.appended, "closed": context.positions is not None}

    def named_tensors(self) -> dict[str, Tensor]:
        """What is held, by name, without spare room."""
        named = {f"tail.{name}": x for name, x in zip(self.names, self.tail, strict=False)}
        context = self.context
        if context is not None:
            named |= {"keys": context.keys, "values": context.values} | context.in_full
            named |= to_named(context.packed_keys, context.packed_values)
        return named

    def take_tensors(self, named: dict[str, Tensor], counts: dict[str, Any]) -> None:
        """Hold what `named_tensors` gave, which may be among other things, and `lengths` did."""
        self.clear()
        if "tail.keys" in named:
            self.names = tuple(name for name in NAMES if f"tail.{name}" in named)
            self.tail.append([named[f"tail.{name}"] for name in self.names])
        if not counts:
            return
        self.names = tuple(name for name in NAMES if name in named)
        keys, values, device = named["keys"], named["values"], named["keys"].device
        whole, packed, plain = (
            sequences_of(counts[name], device) for name in ("sequences", "packed", "plain")
        )
        exact = {name: named[name] for name in self.names[2:]}
        both = from_named(self.scheme, keys.shape[-1], named)
        own = (whole, packed, plain, keys, values, exact)
        context = StoredContext(*own, *both, appended=counts["appended"])
        self.context = context.closed() if counts.get("closed") else context
