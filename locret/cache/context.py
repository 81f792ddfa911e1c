"""What evictions have left of a layer: flat, ragged tensors that never change where they stand, and
the lengths of their sequences.

A *sequence* is the units of one row and KV head, in the order of their slots. A flat tensor [N, *]
has the sequences one after the other, rows outermost; N is the sum of their lengths. So no slot is
ever empty. Python knows all lengths: nothing waits for the device to learn one.

B rows, H KV heads, Q = B * H sequences, D head size.
"""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import cached_property, lru_cache
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from locret.cache.sizing import packed_positions, unpacked_positions
from locret.kernels import gather_sequences
from locret.quantization import Scheme
from locret.quantization.codes import Outliers
from locret.quantization.packed import (
    Expansion,
    Packed,
    PackedKeys,
    PackedValues,
    fetch,
    join,
    select_keys,
    select_values,
    take,
)

Counts = tuple[tuple[int, ...], ...]
"""Units by row and head."""


@dataclass(frozen=True)
class Sequences:
    """The lengths of sequences: units of each row and head, [B][H]. Made by `sequences_of`, so that
    equal ones share their tensors."""

    counts: Counts
    device: torch.device

    @cached_property
    def flat(self) -> tuple[int, ...]:
        """The lengths of the Q sequences."""
        return tuple(itertools.chain.from_iterable(self.counts))

    @property
    def shape(self) -> tuple[int, int]:
        """(B, H)."""
        return len(self.counts), len(self.counts[0])

    @cached_property
    def total(self) -> int:
        """N."""
        return sum(self.flat)

    @cached_property
    def longest(self) -> int:
        return max(self.flat)

    @cached_property
    def longest_of_rows(self) -> tuple[int, ...]:
        """Of each row, over its heads."""
        return tuple(map(max, self.counts))

    @cached_property
    def equal(self) -> bool:
        """All have one length, so that flat tensors are rectangles too."""
        return min(self.flat) == self.longest

    @cached_property
    def bounds(self) -> tuple[int, ...]:
        """Where each sequence begins in flat tensors, and N: Q + 1 numbers."""
        return (0, *itertools.accumulate(self.flat))

    @cached_property
    def lengths(self) -> Tensor:
        """[B, H] long."""
        return sent(self.counts, self.device)

    @cached_property
    def offsets(self) -> Tensor:
        """`bounds` on the device, [Q + 1] int32."""
        return sent(self.bounds, self.device, torch.int32)

    @cached_property
    def owner(self) -> Tensor:
        """The sequence of each unit, [N] long."""
        which = torch.arange(len(self.flat), device=self.device)
        return which.repeat_interleave(self.lengths.flatten(), output_size=self.total)

    @cached_property
    def local(self) -> Tensor:
        """The number of each unit within its sequence, [N] long."""
        every = torch.arange(self.total, device=self.device)
        return every - self.offsets.long()[self.owner]

    @cached_property
    def empty(self) -> Tensor | None:
        """How many slots of a rectangle that is filled up in front stay empty, [B, H] long; None =
        none in any."""
        return None if self.equal else self.longest - self.lengths

    @cached_property
    def slots(self) -> Tensor:
        """The slot of each unit at compact positions, [N] long: its number within its sequence,
        such that the last units of a row's heads share a slot."""
        longest = sent(self.longest_of_rows, self.device)
        front = (longest[:, None] - self.lengths).flatten()
        return self.local + front[self.owner]

    def plus(self, more: int) -> "Sequences":
        """Each `more` units longer."""
        return sequences_of(tuple(tuple(n + more for n in row) for row in self.counts), self.device)

    def take(self, rows: Sequence[int]) -> "Sequences":
        """Some rows, which may repeat."""
        return sequences_of(tuple(self.counts[row] for row in rows), self.device)

    def rows(self) -> list["Sequences"]:
        """Each row by itself."""
        return [self.take([row]) for row in range(len(self.counts))]

    def index_of(self, rows: Sequence[int]) -> Tensor:
        """Where the units of some rows are in flat tensors, [N'] long."""
        heads, bounds = self.shape[1], self.bounds
        ranges = [(bounds[row * heads], bounds[(row + 1) * heads]) for row in rows]
        return torch.cat([torch.arange(*span, device=self.device) for span in ranges])

    def rectangle(self, x: Tensor) -> Tensor:
        """A flat tensor [N, *] as [B, H, longest, *], filled up in front with zeros where lengths
        differ; a view where they do not."""
        if self.equal:
            return x.view(*self.shape, self.longest, *x.shape[1:])
        whole = x.new_zeros(len(self.flat) * self.longest, *x.shape[1:])
        whole.index_copy_(0, self._in_rectangle, x)
        return whole.view(*self.shape, self.longest, *x.shape[1:])

    def flattened(self, x: Tensor) -> Tensor:
        """What `rectangle` made [B, H, longest, *], flat again."""
        flat = x.flatten(0, 2)
        return flat if self.equal else flat.index_select(0, self._in_rectangle)

    @cached_property
    def _in_rectangle(self) -> Tensor:
        front = (self.longest - self.lengths).flatten()
        return self.owner * self.longest + front[self.owner] + self.local


_IN_USE: WeakValueDictionary[tuple[Counts, torch.device], Sequences] = WeakValueDictionary()
"""By what makes them. Weak: their tensors are as large as what they index, and go with it."""


def sequences_of(counts: Counts, device: torch.device) -> Sequences:
    """The sequences of these lengths; the same object for the same ones, while it is in use."""
    found = _IN_USE.get((counts, device))
    if found is None:
        found = _IN_USE[counts, device] = Sequences(counts, device)
    return found


def alike(rows: int, heads: Sequence[int], device: torch.device) -> Sequences:
    """Rows whose heads hold so many units each."""
    return sequences_of((tuple(heads),) * rows, device)


def sent(
    numbers: Sequence[int] | Sequence[Sequence[int]],
    device: torch.device,
    dtype: torch.dtype = torch.long,
) -> Tensor:
    """Python's numbers as a tensor on a device. `torch.tensor(numbers, device=device)` waits for
    all that is queued there; this does not."""
    return torch.tensor(numbers, dtype=dtype).to(device, non_blocking=True)


POSITIONS = "source_positions"


@dataclass(frozen=True)
class StoredContext:
    """What evictions have left of a layer.

    Attributes:
        sequences: of all N units.
        packed: of the first units of each, which are packed.
        plain: of the others, which stand as they came.
        keys, values: of the plain units, flat [*, D].
        exact: what is never packed, of all units, by name: "source_positions" [N] int32, "scores"
            [N] float32 (higher = keep), "weights" [N] float32, how many tokens the value of a unit
            is the mean of.
        packed_keys, packed_values: None = nothing is packed.
        positions: source positions of each row (`packed_positions`), which `exact` has no
            more then; None = it has.
        appended: of each row, how many of every head's last units came after its last eviction.
    """

    sequences: Sequences
    packed: Sequences
    plain: Sequences
    keys: Tensor
    values: Tensor
    exact: dict[str, Tensor]
    packed_keys: PackedKeys | None = None
    packed_values: PackedValues | None = None
    positions: tuple[Tensor, ...] | None = None
    appended: tuple[int, ...] = field(kw_only=True)

    @property
    def kv_tensors(self) -> tuple[Tensor, ...]:
        """All storage of keys and values."""
        packed = [p.tensors for p in (self.packed_keys, self.packed_values) if p is not None]
        return (self.keys, self.values, *sum(packed, ()))

    @cached_property
    def plainly(self) -> tuple[Tensor, Tensor, Sequences | None]:
        """Keys and values where nothing is packed: rectangles [B, H, S, D] and None, or if lengths
        differ flat [N, D] and these. Every token of an answer asks."""
        if not self.sequences.equal:
            return self.keys, self.values, self.sequences
        return self.sequences.rectangle(self.keys), self.sequences.rectangle(self.values), None

    def all_keys(self) -> Tensor:
        """[N, D] in the order of slots; packed ones are expanded."""
        return self._whole(self.keys, self.packed_keys)

    def all_values(self) -> Tensor:
        """[N, D] in the order of slots; packed ones are expanded."""
        return self._whole(self.values, self.packed_values)

    def flat(self, name: str) -> Tensor:
        """[N, *] of one of `NAMES`, in the order of slots."""
        if name in ("keys", "values"):
            return self.all_keys() if name == "keys" else self.all_values()
        return self.in_full[name]

    @property
    def in_full(self) -> dict[str, Tensor]:
        """`exact` with the source positions."""
        if self.positions is None:
            return self.exact
        return {POSITIONS: unpacked_positions(self.positions)} | self.exact

    def closed(self) -> "StoredContext":
        """The same units, their source positions in less: nothing is evicted any more."""
        if self.positions is not None:
            return self
        exact, rows = dict(self.exact), self.sequences.rows()
        each = exact.pop(POSITIONS).split([row.total for row in rows])
        packed = [packed_positions(x, y.owner, y.shape[1]) for x, y in zip(each, rows, strict=True)]
        return replace(self, exact=exact, positions=tuple(packed))

    def _whole(self, plain: Tensor, packed: PackedKeys | PackedValues | None) -> Tensor:
        if packed is None:
            return plain
        whole = plain.new_empty(self.sequences.total, plain.shape[1])
        if self.packed is self.sequences:
            Expansion(packed).write(whole)
            return whole
        Expansion(packed, places(self.sequences, self.packed, at_end=False)).write(whole)
        return whole.index_copy_(0, places(self.sequences, self.plain, at_end=True), plain)

    def tightened(self) -> "StoredContext":
        """The same units, thin blocks of keys packed anew but for few."""
        keys, lengths = self.packed_keys, self.packed.flat
        if keys is None:
            return self
        every = torch.arange(keys.count, device=keys.device)
        unused = self.keys.new_zeros(1, keys.head_size)  # kernels want an address
        keys = select_keys(keys.scheme, keys, lengths, unused, every, lengths, tight=True)
        return replace(self, packed_keys=keys)

    def take(self, rows: Sequence[int]) -> "StoredContext":
        """Some rows, which may repeat."""
        index, plain = self.sequences.index_of(rows), self.plain.index_of(rows)
        keys, values = self.packed_keys, self.packed_values
        if keys is not None and values is not None:
            heads = self.sequences.shape[1]
            which = [row * heads + head for row in rows for head in range(heads)]
            keys = take(keys, self.packed.flat, which)
            values = take(values, self.packed.flat, which)
        return StoredContext(
            self.sequences.take(rows),
            self.packed.take(rows),
            self.plain.take(rows),
            self.keys.index_select(0, plain),
            self.values.index_select(0, plain),
            {name: x.index_select(0, index) for name, x in self.exact.items()},
            keys,
            values,
            self.positions and tuple(self.positions[row] for row in rows),
            appended=tuple(self.appended[row] for row in rows),
        )


def moved(x: Any, device: torch.device) -> Any:
    """`x` with all tensors in it on `device`."""
    if isinstance(x, Tensor):
        return x.to(device)
    if isinstance(x, Sequences):
        return sequences_of(x.counts, device)
    if isinstance(x, tuple):
        return tuple(moved(each, device) for each in x)
    if isinstance(x, dict):
        return {name: moved(each, device) for name, each in x.items()}
    if isinstance(x, StoredContext | Packed | Outliers):
        return replace(x, **{f.name: moved(getattr(x, f.name), device) for f in fields(x)})
    return x


def standing(names: Sequence[str], units: Sequence[Tensor]) -> StoredContext:
    """Units as a context, views if it can be: [B, H, T, *] by name, keys and values first."""
    rows, heads, count = units[0].shape[:3]
    keys, values, *exact = (x.reshape(-1, *x.shape[3:]) for x in units)
    none, whole = (alike(rows, (n,) * heads, keys.device) for n in (0, count))
    named = dict(zip(names[2:], exact, strict=True))
    return StoredContext(whole, none, whole, keys, values, named, appended=(0,) * rows)


@lru_cache(maxsize=4)  # a layer's keys and values; what is kept keeps memory
def places(whole: Sequences, some: Sequences, at_end: bool) -> Tensor:
    """Where in flat tensors of `whole` the first, or the last, units of each sequence are, of which
    there are as many as `some` has; long [units of `some`]."""
    first = whole.offsets[:-1].long()
    if at_end:
        first = first + (whole.lengths - some.lengths).flatten()
    return first[some.owner] + some.local


def taken(x: Tensor, whole: Sequences, some: Sequences, at_end: bool) -> Tensor:
    """What `places` says of a flat tensor; itself where that is all of it."""
    if some is whole:
        return x
    return x.index_select(0, places(whole, some, at_end))


def stack(rows: Sequence[StoredContext | None]) -> StoredContext | None:
    """Contexts of one row each as one, closed if one is; None = a row without units, or no row has
    any."""
    if any(row is not None and row.positions is not None for row in rows):
        rows = [row and row.closed() for row in rows]
    some = [row for row in rows if row is not None]
    if not some:
        return None
    heads, device = some[0].sequences.shape[1], some[0].sequences.device

    def joined(which: Callable[[StoredContext], Sequences]) -> Sequences:
        counts = tuple((0,) * heads if row is None else which(row).counts[0] for row in rows)
        return sequences_of(counts, device)

    keys = [row.packed_keys for row in some if row.packed_keys is not None]
    values = [row.packed_values for row in some if row.packed_values is not None]
    none = some[0].sequences.offsets.new_empty(0)  # int32
    positions = [(none,) if row is None else row.positions or () for row in rows]
    names = min((row.exact for row in some), key=len)  # some rows may have no scores any more
    return StoredContext(
        joined(lambda row: row.sequences),
        joined(lambda row: row.packed),
        joined(lambda row: row.plain),
        torch.cat([row.keys for row in some]),
        torch.cat([row.values for row in some]),
        {name: torch.cat([row.exact[name] for row in some]) for name in names},
        join(keys) if keys else None,
        join(values) if values else None,
        None if some[0].positions is None else sum(positions, ()),
        appended=tuple(0 if row is None else row.appended[0] for row in rows),
    )


def _in_storage(context: StoredContext, index: Tensor, owner: Tensor, tokens: int) -> Tensor:
    """Where the units at `index` of the sequences `owner`, both long [K], are: of the context the
    packed ones, then the plain ones, then fresh ones, `tokens` of each sequence."""
    packed, plain = context.packed, context.plain
    # Each sequence is three stretches: their lengths, and where they begin in storage.
    lengths = [n for both in zip(packed.flat, plain.flat, strict=True) for n in (*both, tokens)]
    where = enumerate(zip(packed.bounds[:-1], plain.bounds[:-1], strict=True))
    first_plain, first_fresh = packed.total, packed.total + plain.total
    stored = [n for i, (p, q) in where for n in (p, first_plain + q, first_fresh + i * tokens)]
    bounds = [0, *itertools.accumulate(lengths)]
    shifts = [at - start for at, start in zip(stored, bounds[:-1], strict=True)]
    starts, ends, shift = sent((bounds[:-1], bounds[1:], shifts), index.device)
    unit = index + starts[::3][owner]  # all stretches counted through
    return unit + shift[torch.searchsorted(ends, unit, right=True)]


def gathered(
    context: StoredContext,
    names: Sequence[str],
    fresh: Sequence[Tensor],
    index: Tensor,
    kept: Sequences,
    *,
    appended: tuple[int, ...],
) -> StoredContext:
    """Some units of a context and of fresh ones, named as for `standing`, as a context, unpacked:
    those at `index`, long [K], ascending in each sequence, its units counted through both, of which
    it keeps as many as `kept` says."""
    old = [context.keys, context.values, *context.in_full.values()]
    offsets = context.sequences.offsets, kept.offsets
    keys, values, *exact = gather_sequences(old, fresh, index, *offsets)
    none = sequences_of(tuple((0,) * len(row) for row in kept.counts), kept.device)
    named = dict(zip(names[2:], exact, strict=True))
    return StoredContext(kept, none, kept, keys, values, named, appended=appended)


def repacked(
    scheme: Scheme,
    context: StoredContext,
    names: Sequence[str],
    fresh: Sequence[Tensor],
    index: Tensor,
    kept: Sequences,
    packed: Sequences,
    *,
    appended: tuple[int, ...],
) -> StoredContext:
    """`gathered`, the first `packed` units of each sequence packed. ValueError: one cannot be."""
    new_keys, new_values, *new_exact = fresh
    offsets = context.sequences.offsets, kept.offsets
    exact = gather_sequences([*context.in_full.values()], new_exact, index, *offsets)
    rest = tuple(
        tuple(n - p for n, p in zip(*row, strict=True))
        for row in zip(kept.counts, packed.counts, strict=True)
    )
    plain = sequences_of(rest, kept.device)
    # Where each unit is now: first the packed ones, then the plain ones, then the fresh ones.
    at = _in_storage(context, index, kept.owner, new_keys.shape[2])
    to_pack = taken(at, kept, packed, at_end=False)
    to_leave = taken(at, kept, plain, at_end=True)
    both = [x.flatten(0, 2) for x in (new_keys, new_values)]
    if context.plain.total:
        both = [torch.cat(x) for x in zip((context.keys, context.values), both, strict=True)]
    old = context.packed_keys, context.packed_values
    keys, values = None, None
    if packed.total:
        keys = select_keys(scheme, old[0], context.packed.flat, both[0], to_pack, packed.flat)
        values = select_values(scheme, old[1], both[1], to_pack)
    left = [fetch(o, x, to_leave).to(x.dtype) for o, x in zip(old, both, strict=True)]
    named = dict(zip(names[2:], exact, strict=True))
    made = kept, packed, plain, left[0], left[1], named, keys, values
    return StoredContext(*made, appended=appended)
