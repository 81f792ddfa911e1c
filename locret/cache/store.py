"""The units of one layer: a flat, ragged context that never changes, and a tail that grows.

The *context* is what evictions have left (`locret.cache.context`): as many units in each sequence
as it keeps. Where a scheme packs (`locret.quantization`), all but the last `residual` of each are
packed. The *tail* is a rectangle of what came after, as it came: equally many in all sequences.
Appending writes behind it, all else makes new tensors. An eviction chooses among both and makes a
new context. That is why a view, and so a snapshot of a cache, costs nothing.

B rows, H KV heads, Q = B * H sequences, N units of the context, T units of the tail, D head size.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from locret.cache.context import (
    POSITIONS,
    Sequences,
    StoredContext,
    alike,
    gathered,
    moved,
    repacked,
    sequences_of,
    stack,
    standing,
    taken,
)
from locret.quantization import NO_SCHEME, Scheme
from locret.quantization.packed import pack_keys

NAMES = ("keys", "values", POSITIONS, "scores", "weights")
"""What a unit has: its score until nothing is evicted any more, a weight where evicted values are
merged (`locret.cache.merging`)."""

STEPS = 256
"""Most units of an answer that stay as they are before they are packed, where its steps come from a
CUDA graph: packing makes new tensors, and so a new graph."""


class Tail:
    """Tensors [B, H, T] or [B, H, T, D], parallel to each other.

    Storage may be larger than the units in it (`room`), so that units are appended in place.

    Attributes:
        tensors: the storage, spare room included.
        count: T.
    """

    tensors: tuple[Tensor, ...]
    count: int

    def __init__(self, storage: Sequence[Tensor] = ()) -> None:
        self.tensors, self._room_is_ours = tuple(storage), True
        self.count = storage[0].shape[2] if storage else 0

    def __getitem__(self, which: int) -> Tensor:
        return self.tensors[which][:, :, : self.count]

    def __iter__(self) -> Iterator[Tensor]:
        return (tensor[:, :, : self.count] for tensor in self.tensors)

    @property
    def capacity(self) -> int:
        """Units that there is room for."""
        if not self.tensors or not self._room_is_ours:
            return self.count
        if self.tensors[0].is_inference() and not torch.is_inference_mode_enabled():
            return self.count  # what was made in inference mode cannot be written outside it
        return self.tensors[0].shape[2]

    @property
    def nbytes(self) -> int:
        """Bytes of the storage, spare room included."""
        return sum(tensor.nbytes for tensor in self.tensors)

    def append(self, new: Sequence[Tensor], room: int = 0) -> None:
        """Add units after the others, tensors parallel to those here; when the storage must grow,
        it takes `room` more units than needed."""
        end = self.count + new[0].shape[2]
        if end > self.capacity or not self.tensors:
            grown = tuple(x.new_empty(*x.shape[:2], end + room, *x.shape[3:]) for x in new)
            for whole, old in zip(grown, self, strict=False):
                whole[:, :, : self.count] = old
            self.tensors, self._room_is_ours = grown, True
        for stored, fresh in zip(self.tensors, new, strict=True):
            stored[:, :, self.count : end] = fresh
        self.count = end

    def replace(self, which: int, tensor: Tensor) -> None:
        """Hold `tensor` in place of one of the tensors, for the same units."""
        if self.tensors[0].shape[2] > self.count:  # there may be room behind the units
            whole = self.tensors[which].clone()
            whole[:, :, : self.count] = tensor
            tensor = whole
        self.tensors = (*self.tensors[:which], tensor, *self.tensors[which + 1 :])

    def view(self) -> Any:
        """What is held now, for `restore`."""
        return self.tensors, self.count

    def restore(self, view: Any) -> None:
        """Hold again what was held when `view` was taken.

        What came after it may be in the spare room, and in another view: the room is not used.
        """
        self.tensors, self.count = view
        self._room_is_ours = False

    def select_batch(self, rows: Tensor) -> None:
        """Hold only the batch rows `rows` [B'] (long); rows may repeat."""
        self.tensors = tuple(tensor.index_select(0, rows) for tensor in self.tensors)
        self._room_is_ours = True

    def move(self, device: torch.device) -> None:
        """Be on `device`."""
        self.tensors = tuple(tensor.to(device) for tensor in self.tensors)
        self._room_is_ours = True


class NewTokens(NamedTuple):
    """Units to be added, as they are stored: keys and values [B, H, T, D], scores [B, H, T] float32
    (higher = keep), source positions [B, H, T] int32, above all that are there."""

    keys: Tensor
    values: Tensor
    scores: Tensor
    positions: Tensor

    @classmethod
    def of(
        cls, keys: Tensor, values: Tensor, positions: Tensor, scores: Tensor | None = None
    ) -> "NewTokens":
        """Units with positions [T], or [1 or B, 1 or H, T], and scores [B, H, T]; None = those of
        units that are not to be evicted."""
        scores = unscored(keys) if scores is None else scores.float()
        return cls(keys, values, scores, positions.int().expand(keys.shape[:3]))

    def first(self, count: int) -> "NewTokens":
        """The first `count` of them."""
        return NewTokens(*(x[:, :, :count] for x in self))


def unscored(keys: Tensor) -> Tensor:
    """Scores [B, H, T] for units that no policy has scored and that are not to be evicted."""
    return torch.zeros(keys.shape[:3], dtype=torch.float32, device=keys.device)


class Store:
    """Context and tail of one layer.

    Args:
        scheme: how keys and values of the context are packed.
        weighs: units hold a weight ("weights", see `NAMES`): 1 for new ones.

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
        own = () if self.context is None else self.context.kv_tensors
        return sum(tensor.nbytes for tensor in (*own, *self.tail.tensors[:2]))

    @property
    def full_bytes(self) -> int:
        """Bytes of one token's keys and values as they come, in all rows and heads."""
        if self.is_empty:
            return 0
        rows, heads = self.sequences.shape
        return 2 * rows * heads * self.like.shape[-1] * self.like.element_size()

    def rectangle(self, name: str) -> Tensor:
        """`name` (of `NAMES`) of context and tail as [B, H, S, *], filled up in front with zeros
        where sequences are shorter than others (`Sequences.empty`): for what relates units to each
        other."""
        tail = None if not self.tail.tensors else self.tail[self.names.index(name)]
        if self.context is None:
            assert tail is not None
            return tail
        own = self.context.sequences.rectangle(self.context.flat(name))
        return own if tail is None or not tail.shape[2] else torch.cat([own, tail], dim=2)

    def split(self, name: str) -> list[list[Tensor]]:
        """What each row and head has of `name`, context and tail together, [B][H]."""
        if self.is_empty:
            return []
        whole, counts = self.rectangle(name), self.sequences.counts
        return [
            [x[len(x) - n :] for x, n in zip(*row, strict=True)]
            for row in zip(whole, counts, strict=True)
        ]

    def append(self, new: NewTokens, room: int = 0) -> None:
        """Add units to the tail; `room` more are expected to come."""
        if self.scheme.packs:
            room = min(room, self.scheme.residual + self.scheme.group)
        self.tail.append(self._tensors(new), room)

    def _tensors(self, new: NewTokens) -> tuple[Tensor, ...]:
        """What is stored of new units: `names`."""
        scores = (new.scores,) if self.scored else ()
        weights = (torch.ones_like(new.scores),) if self.weighs else ()
        return (new.keys, new.values, new.positions, *scores, *weights)

    def retain(self, index: Tensor, kept: Sequences, new: NewTokens | None = None) -> None:
        """Hold some of the units of context, tail and `new` ones, as a context: those at `index`,
        long [K], ascending in each sequence, its units counted through all three, of which it keeps
        as many as `kept` says. ValueError: one cannot be packed; nothing has changed then,
        but within `refusing_last`, which says so at its end."""
        most, packed = self.scheme.residual, None
        if self.scheme.packs:
            counts = tuple(tuple(max(n - most, 0) for n in row) for row in kept.counts)
            packed = sequences_of(counts, kept.device)
        made = self._remade(index, kept, packed, *self._sources(new))
        self.context, self.tail = replace(made, appended=(0,) * len(kept.counts)), Tail()

    def pack(self, tight: bool = False) -> None:
        """What was appended has been attended to: pack it as far as it fills blocks; if `tight`,
        all but the scheme's residual, so that the bytes are those of an eviction. ValueError: a key
        or value cannot be packed, as for `retain`."""
        scheme = self.scheme
        if not scheme.packs or not self.tail.count:
            return
        whole, sources = self.sequences, self._sources(None)
        done = sources[0].packed.counts
        unit = 1 if tight else scheme.group

        def packed_of(count: int, before: int) -> int:
            return before + max(count - before - scheme.residual, 0) // unit * unit

        packed = tuple(tuple(map(packed_of, *row)) for row in zip(whole.counts, done, strict=True))
        if packed != done or tight:
            made = self._remade(whole.local, whole, sequences_of(packed, whole.device), *sources)
            self.context, self.tail = made, Tail()

    def _sources(self, new: NewTokens | None) -> tuple[StoredContext, tuple[Tensor, ...]]:
        """The context, and tail and `new` units: side by side only where there are all three, so
        that a layer is in memory once. Before the first eviction the context has none, or what is
        in the tail."""
        fresh = tuple(self._tail_like()) if new is None else self._tensors(new)
        in_front = [*self.tail] if self.tail.count and new is not None else []
        if self.context is None:
            return standing(self.names, in_front or [x[:, :, :0] for x in fresh]), fresh
        if in_front:
            fresh = tuple(torch.cat(pair, dim=2) for pair in zip(in_front, fresh, strict=True))
        return self.context, fresh

    def _remade(
        self,
        index: Tensor,
        kept: Sequences,
        packed: Sequences | None,
        context: StoredContext,
        fresh: tuple[Tensor, ...],
    ) -> StoredContext:
        """The units at `index` of context and fresh ones as a context, closed if that was; the
        first `packed` of each sequence are packed, None = none."""
        appended = tuple(count + self.tail.count for count in context.appended)
        how = context, self.names, fresh, index, kept
        if packed is None:
            made = gathered(*how, appended=appended)
        else:
            made = repacked(self.scheme, *how, packed, appended=appended)
        return made if context.positions is None else made.closed()

    def freeze(
        self,
        rotate_context: Callable[[Tensor], Tensor],
        rotate_tail: Callable[[Tensor], Tensor],
        room: int,
    ) -> None:
        """Hold the same units with rotated keys: slots do not move any more. ValueError: a key
        cannot be packed, as for `retain`.

        Args:
            rotate_context: of all keys of the context, flat [N, D].
            rotate_tail: of the tail's keys [B, H, T, D].
            room: units that are expected to come.
        """
        context = self.context
        if context is not None:
            keys = rotate_context(context.all_keys())
            packed = context.packed_keys
            if packed is not None:
                first = taken(keys, context.sequences, context.packed, at_end=False)
                packed = pack_keys(self.scheme, first, context.packed.flat)
                keys = taken(keys, context.sequences, context.plain, at_end=True)
            context = replace(context, keys=keys, packed_keys=packed)
        if self.tail.count:
            keys, *others = self.tail
            tail = Tail()
            tail.append((rotate_tail(keys), *others), room)
            self.tail = tail
        self.context = context

    def make_room(self, room: int, starts: Tensor) -> None:
        """Let units be written to the tail in place: spare room for as many, whose scores are zero
        and whose source positions go on from `starts` [1 or B], each row's or that of all."""
        if self.scheme.packs:
            self.pack()
            room = min(room, STEPS)
        if self.tail.capacity - self.tail.count < (room if self.scheme.packs else 1):
            tail = Tail()
            tail.append([*self._tail_like()], room)
            self.tail = tail
        spare = [tensor[:, :, self.tail.count :] for tensor in self.tail.tensors]
        after = torch.arange(spare[2].shape[2], dtype=torch.int32, device=spare[2].device)
        spare[2][:] = starts[:, None, None] + after
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
        tail = self.tail.tensors
        self.tail.tensors = (*tail[:which], *tail[which + 1 :])
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

    def view(self) -> Any:
        """What is held now, for `restore`. Nothing is copied."""
        return self.context, self.tail.view(), self.names

    def restore(self, view: Any) -> None:
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
        self.context = moved(self.context, device)
        self.tail.move(device)

    @staticmethod
    def of_rows(rows: "Sequence[Store]") -> "Store":
        """The rows of a batch, of one row each, as one. All of it is context then; no unit is
        packed, or packed anew, for it."""
        stacked = Store(rows[0].scheme, rows[0].weighs)
        stacked.context = stack([row.as_context() for row in rows])
        if stacked.context is not None:
            stacked.names = min((row.names for row in rows if not row.is_empty), key=len)
        return stacked

    def as_context(self) -> StoredContext | None:
        """All units as a context, those of the tail as they are; None = there are none."""
        if self.is_empty or not self.tail.count:
            return self.context
        whole, sources = self.sequences, self._sources(None)
        packed = sources[0].packed if self.scheme.packs else None
        return self._remade(whole.local, whole, packed, *sources)
