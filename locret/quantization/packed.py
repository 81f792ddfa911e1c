"""Packed keys and packed values of one layer: how they are made, read, selected from and joined.
`docs/quantization.md` says what each tensor is.

Evict first, then quantize: units that were packed keep their codes. Keys keep the entries of their
block with them, unless their sequence has too many thin blocks (`blocks.arrange`); only then are
some decoded and encoded anew. Units that were not packed yet are encoded once, in blocks of their
own.

All tensors are flat: the units of one row and KV head are a *sequence*, sequences stand one after
the other, and Python knows the length of each. Nothing that is packed is ever written to.

Q sequences, N packed units, M blocks, F fresh units (in full precision), K units kept, D head size.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import accumulate
from typing import TypeVar

import torch
from torch import Tensor

from locret.quantization.base import Scheme, Tensors
from locret.quantization.blocks import (
    FRESH,
    REPACKED,
    Blocks,
    arrange,
    block_limit,
    costs_of,
)
from locret.quantization.codes import Outliers, find_outliers, ragged
from locret.quantization.waiting import from_device, to_device

SLAB = 16384
"""Units that are decoded at a time, so that float32 copies stay small."""


@dataclass(frozen=True)
class Packed:
    """What packed keys and packed values share.

    Attributes:
        scheme: encodes and decodes.
        head_size: D.
        units: what each unit needs, tensors [N, *].
        outliers: None unless the scheme keeps them.
    """

    scheme: Scheme
    head_size: int
    units: Tensors
    outliers: Outliers | None

    @property
    def count(self) -> int:
        """N."""
        return self.units[0].shape[0]

    @property
    def device(self) -> torch.device:
        return self.units[0].device

    @property
    def tensors(self) -> Tensors:
        return *self.units, *(() if self.outliers is None else self.outliers.tensors)

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors)

    def at(self, index: Tensor) -> Tensor:
        """float32 [..., D]: the units at `index` [...] (long, below N)."""
        x = self.decoded(_at(self.units, index), self.blocks_of(index))
        if self.outliers is not None:
            self.outliers.write(x, index)
        return x

    def dense(self, dtype: torch.dtype) -> Tensor:
        """[N, D] in `dtype`."""
        out = torch.empty(self.count, self.head_size, dtype=dtype, device=self.device)
        Expansion(self).write(out)
        return out

    def blocks_of(self, index: Tensor) -> Tensor | None:
        """The blocks that the units at `index` [...] are in, long; None = they share nothing."""
        return None

    def decoded(self, units: Tensors, blocks: Tensor | None) -> Tensor:
        """float32 [..., D] from what units need and their blocks; anything where outliers are."""
        raise NotImplementedError

    def expanded(self, out: Tensor, at: Tensor | None) -> bool:
        """Whether a kernel wrote all units to the rows `at` of `out`, but for outliers."""
        raise NotImplementedError


@dataclass(frozen=True)
class PackedKeys(Packed):
    """
    Attributes:
        tables: tensors [M, *], an entry a block.
        starts: int32 [M + 1]: block i is the units `starts[i] <= u < starts[i + 1]`. No block is
            empty, none crosses a sequence's border.
    """

    tables: Tensors
    starts: Tensor

    @property
    def tensors(self) -> Tensors:
        return *super().tensors, *self.tables, self.starts

    def blocks_of(self, index: Tensor) -> Tensor:
        return torch.searchsorted(self.starts[1:], index.int(), right=True)

    def decoded(self, units: Tensors, blocks: Tensor | None) -> Tensor:
        assert blocks is not None
        return self.scheme.decode_keys(units, _at(self.tables, blocks), self.head_size)

    def expanded(self, out: Tensor, at: Tensor | None) -> bool:
        return self.scheme.expand((*self.units, *self.tables), self.starts, out, at)


@dataclass(frozen=True)
class PackedValues(Packed):
    def decoded(self, units: Tensors, blocks: Tensor | None) -> Tensor:
        return self.scheme.decode_values(units, self.head_size)

    def expanded(self, out: Tensor, at: Tensor | None) -> bool:
        return self.scheme.expand(self.units, None, out, at)


@dataclass(frozen=True)
class Expansion:
    """Writes all units in full, as often as it is asked. It does not wait for the device, and works
    out at its first time what stays the same, so that later times may be recorded as a CUDA graph.

    Attributes:
        packed: N units.
        at: long [N], the row that each goes to; None = the first N, in order.
    """

    packed: Packed
    at: Tensor | None = None

    def write(self, out: Tensor) -> None:
        """Write them to `out` [*, D], contiguous."""
        packed, outliers = self.packed, self.packed.outliers
        if not packed.expanded(out, self.at):
            for start in range(0, packed.count, SLAB):
                slab = slice(start, min(start + SLAB, packed.count))
                blocks = None if self._blocks is None else self._blocks[slab]
                x = packed.decoded(tuple(units[slab] for units in packed.units), blocks)
                out[slab if self.at is None else self.at[slab]] = x.to(out.dtype)
        if outliers is not None:
            out.view(-1).index_copy_(0, self._outlying, outliers.values.to(out.dtype))

    @cached_property
    def _blocks(self) -> Tensor | None:
        return self.packed.blocks_of(torch.arange(self.packed.count, device=self.packed.device))

    @cached_property
    def _outlying(self) -> Tensor:
        """long [O], where outliers are in a flat `out`."""
        assert self.packed.outliers is not None
        counts, channels, _ = self.packed.outliers.tensors
        row = torch.repeat_interleave(counts.long(), output_size=len(channels))
        row = row if self.at is None else self.at[row]
        return row * self.packed.head_size + channels.long()


_P = TypeVar("_P", bound=Packed)


def pack_keys(scheme: Scheme, x: Tensor, lengths: Sequence[int]) -> PackedKeys:
    """Pack keys [N, D] of sequences of these lengths, each in blocks of `scheme.group` units from
    its first on. ValueError: a value is not finite, or too large to be stored."""
    none, fresh = torch.tensor([], dtype=torch.long), torch.tensor(lengths, dtype=torch.long)
    blocks = arrange(none, none, fresh, fresh, scheme.group)
    starts, sizes, former = (
        each.to(x.device, non_blocking=True)
        for each in (blocks.starts, blocks.sizes, blocks.kept.int())
    )
    every = torch.arange(len(x), device=x.device)
    fused = scheme.keys_at(None, None, x, every, former, starts)
    if fused is not None:
        return PackedKeys(scheme, x.shape[-1], fused[0], None, fused[1], starts)
    filled = x[_places(starts[:-1], sizes, scheme.group)]
    units, tables, outliers = _encoded(scheme, filled, sizes, sum(lengths))
    return PackedKeys(scheme, x.shape[-1], units, outliers, tables, starts)


def pack_values(scheme: Scheme, x: Tensor) -> PackedValues:
    """Pack values [N, D]. Raises as `pack_keys` does."""
    fused = scheme.values_at(None, x, torch.arange(len(x), device=x.device))
    if fused is not None:
        return PackedValues(scheme, x.shape[-1], fused, None)
    units, outliers = _encoded_values(scheme, x)
    return PackedValues(scheme, x.shape[-1], _owned(units), outliers)


def select_keys(
    scheme: Scheme,
    packed: PackedKeys | None,
    lengths: Sequence[int],
    fresh: Tensor,
    index: Tensor,
    new_lengths: Sequence[int],
    tight: bool = False,
) -> PackedKeys:
    """Pack the keys at `index`, and no others.

    The host waits for the device to learn how many units are left of each block, since the size of
    the new tables depends on it. (Schemes wait besides, to refuse what they cannot store.)

    Args:
        packed: N keys; None = none.
        lengths: how many of them each sequence has.
        fresh: [F, D], other keys.
        index: long [K]: u < N is unit u of `packed`, N + i is unit i of `fresh`. Sequence by
            sequence, in slot order: the packed ones of a sequence before its fresh ones.
        new_lengths: how many of the K each sequence has.
        tight: have few thin blocks (`blocks.block_limit`).

    Raises:
        ValueError: a value that is to be encoded cannot be stored.
    """
    if packed is None or not packed.count:
        return pack_keys(scheme, fresh.index_select(0, index), new_lengths)
    here = index.clamp(max=packed.count - 1)
    block = packed.blocks_of(here)
    how = lengths, index < packed.count, new_lengths, fresh.element_size(), tight
    blocks = _arranged(packed, block, *how)
    former, starts = (to_device(x.int(), index.device) for x in (blocks.kept, blocks.starts))
    own = *packed.units, *packed.tables
    fused = scheme.keys_at(own, block, fresh, index, former, starts)
    if fused is not None:
        return replace(packed, units=fused[0], tables=fused[1], starts=starts)
    tables = _at(packed.tables, former.clamp(min=0))
    kept = replace(packed, units=_at(packed.units, here), tables=tables, starts=starts)
    places, outliers = _encode_blocks(kept, blocks, packed, fresh, index)
    return replace(kept, outliers=_outliers_after(packed, index, places, outliers))


def _arranged(
    packed: PackedKeys,
    block: Tensor,
    lengths: Sequence[int],
    old: Tensor,
    new_lengths: Sequence[int],
    element_size: int,
    tight: bool,
) -> Blocks:
    """The blocks of what `select_keys` keeps, on the host.

    Args:
        block: long [K], the block of each unit that is `old`, bool [K].
        element_size: of fresh keys.
    """
    survivors = torch.zeros(len(packed.starts) - 1, dtype=torch.long, device=old.device)
    survivors.scatter_add_(0, block, old.long())
    survivors, starts = from_device(torch.stack([survivors, packed.starts[:-1]]))
    before, total = (torch.tensor(counts, dtype=torch.long) for counts in (lengths, new_lengths))
    sequence = torch.searchsorted(before.cumsum(0), starts, right=True)
    costs = costs_of(packed.scheme, packed.head_size, element_size)
    residual = packed.scheme.residual
    limits = torch.tensor([block_limit(costs, n, residual, tight) for n in new_lengths])
    fresh = total.index_add(0, sequence, survivors, alpha=-1)
    return arrange(survivors, sequence, fresh, limits, packed.scheme.group)


def _encode_blocks(
    kept: PackedKeys, blocks: Blocks, packed: PackedKeys, fresh: Tensor, index: Tensor
) -> tuple[Tensor, Outliers | None]:
    """Fill in the codes and entries of the blocks of `kept` that are to be encoded. Returns where
    in `kept` the units of these blocks are, long [n], and their outliers."""
    which = [(blocks.kept == what).nonzero()[:, 0] for what in (FRESH, REPACKED)]
    at = torch.cat(which)
    if not len(at):
        return index[:0], None
    total, group = int(blocks.sizes[at].sum()), packed.scheme.group
    sizes, at = (x.to(index.device, non_blocking=True) for x in (blocks.sizes[at], at))
    starts = kept.starts[at].long()
    unit = index[_places(starts, sizes, group)]
    new, mixed = unit.split([*map(len, which)])
    x = fresh[new - packed.count].float()
    if len(mixed):
        x = torch.cat([x, fetch(packed, fresh, mixed)])
    units, tables, outliers = _encoded(packed.scheme, x, sizes, total)
    places = ragged(starts, sizes, total)
    for tensor, own in zip(kept.units, units, strict=True):
        tensor.index_copy_(0, places, own)
    for table, own in zip(kept.tables, tables, strict=True):
        table.index_copy_(0, at, own)
    return places, outliers


def _outliers_after(
    packed: PackedKeys, index: Tensor, places: Tensor, encoded: Outliers | None
) -> Outliers | None:
    """The outliers of the units at `index`: new ones, `encoded`, at `places`, else the old."""
    if packed.outliers is None or encoded is None:
        return packed.outliers and packed.outliers.select(index)
    at = torch.arange(len(places), device=index.device)
    index = index.index_copy(0, places, packed.count + at)
    return Outliers.join([packed.outliers, encoded]).select(index)


def _encoded(
    scheme: Scheme, x: Tensor, sizes: Tensor, total: int
) -> tuple[Tensors, Tensors, Outliers | None]:
    """What each of `total` units needs, [total, *], each block's entries, [A, *], and the units'
    outliers.

    Args:
        x: [A, group, D], blocks of keys, short ones filled up with their last unit.
        sizes: long [A], units of each block.
    """
    large = scheme.outlying_keys(x)
    units, tables = scheme.encode_keys(x, None if large is None else ~large)
    first = torch.arange(len(sizes), device=x.device) * scheme.group
    own = ragged(first, sizes, total)
    units = _at(tuple(tensor.flatten(0, 1) for tensor in units), own)
    outliers = large if large is None else find_outliers(x.flatten(0, 1), large.flatten(0, 1))
    return units, _owned(tables), outliers and outliers.select(own)


def _places(starts: Tensor, sizes: Tensor, group: int) -> Tensor:
    """long [A, group], where the units of blocks are. Short blocks are filled up with their last
    unit, which has no say in a smallest or largest value."""
    step = torch.arange(group, device=sizes.device)
    return starts[:, None] + torch.minimum(step, sizes[:, None] - 1)


def select_values(
    scheme: Scheme, packed: PackedValues | None, fresh: Tensor, index: Tensor
) -> PackedValues:
    """Pack the values at `index`, and no others; arguments as for keys.

    The host waits for the device to learn how many are fresh.
    """
    if packed is None or not packed.count:
        return pack_values(scheme, fresh.index_select(0, index))
    fused = packed.scheme.values_at(packed.units, fresh, index)
    if fused is not None:
        return replace(packed, units=fused)
    units, outliers = _at(packed.units, index.clamp(max=packed.count - 1)), packed.outliers
    new_at = (index >= packed.count).nonzero()[:, 0]
    if len(new_at):
        encoded, found = _encoded_values(packed.scheme, fresh[index[new_at] - packed.count])
        for tensor, new in zip(units, encoded, strict=True):
            tensor[new_at] = new
        outliers = outliers and found and Outliers.join([outliers, found])
        at = torch.arange(len(new_at), device=index.device)
        index = index.index_copy(0, new_at, packed.count + at)
    return replace(packed, units=units, outliers=outliers and outliers.select(index))


def _encoded_values(scheme: Scheme, x: Tensor) -> tuple[Tensors, Outliers | None]:
    """What each of the values [N, D] needs, and their outliers."""
    large = scheme.outlying_values(x)
    units = scheme.encode_values(x, None if large is None else ~large)
    return units, large if large is None else find_outliers(x, large)


def fetch(packed: Packed | None, fresh: Tensor, index: Tensor) -> Tensor:
    """float32 [..., D]: the units at `index` [...], counted as for `select_keys`."""
    if packed is None or not packed.count:
        return fresh[index].float()
    here = index.clamp(max=packed.count - 1)
    own, tables = packed.units, packed.tables if isinstance(packed, PackedKeys) else ()
    fused = packed.scheme.units_at((*own, *tables), packed.blocks_of(here), fresh, index)
    if fused is not None:
        return fused
    # Both for every unit: to ask which ones are packed would be to wait for the device.
    old = packed.at(here)
    if not len(fresh):
        return old
    new = fresh[(index - packed.count).clamp(min=0)].float()
    return torch.where((index < packed.count)[..., None], old, new)


def join(some: Sequence[_P]) -> _P:
    """The sequences of one after those of the other: rows of a batch."""
    found = [each.outliers for each in some if each.outliers is not None]
    joined = replace(
        some[0],
        units=_joined([each.units for each in some]),
        outliers=Outliers.join(found) if found else None,
    )
    keys = [each for each in some if isinstance(each, PackedKeys)]
    if not isinstance(joined, PackedKeys):
        return joined
    before = accumulate((each.count for each in keys), initial=0)
    ends = [each.starts[1:] + first for each, first in zip(keys, before, strict=False)]
    starts = torch.cat([keys[0].starts[:1], *ends])
    return replace(joined, tables=_joined([each.tables for each in keys]), starts=starts)


def take(packed: _P, lengths: Sequence[int], sequences: Sequence[int]) -> _P:
    """Only these sequences, in this order; they may repeat.

    Of keys, the host waits for the device once: it does not know how many blocks a sequence has.

    Args:
        lengths: of all the sequences in `packed`.
    """
    firsts = list(accumulate(lengths, initial=0))
    of = torch.tensor(sequences, dtype=torch.long)
    ranges = torch.tensor([firsts[:-1], lengths], dtype=torch.long)[:, of]
    at, counts = ranges.to(packed.device, non_blocking=True)
    index = ragged(at, counts, int(ranges[1].sum()))
    taken = replace(
        packed,
        units=_at(packed.units, index),
        outliers=packed.outliers and packed.outliers.select(index),
    )
    if not isinstance(packed, PackedKeys) or not isinstance(taken, PackedKeys):
        return taken
    starts = packed.starts.cpu().long()
    bounds = torch.searchsorted(starts, torch.tensor(firsts))
    blocks = ragged(bounds[of], bounds.diff()[of])
    own = Blocks(starts.diff()[blocks], blocks).to(packed.device)
    return replace(taken, tables=_at(packed.tables, own.kept), starts=own.starts)


def _owned(tensors: Tensors) -> Tensors:
    """The same, each in memory of its own size and no larger one that it is a view of."""
    return tuple(
        tensor
        if tensor.untyped_storage().nbytes() == tensor.nbytes
        else tensor.clone(memory_format=torch.contiguous_format)
        for tensor in tensors
    )


def _at(tensors: Tensors, index: Tensor) -> Tensors:
    """Rows of all tensors, [..., *] of [N, *]."""
    return tuple(
        x.index_select(0, index.flatten()).view(*index.shape, *x.shape[1:]) for x in tensors
    )


def _joined(some: Sequence[Tensors]) -> Tensors:
    return tuple(torch.cat(each) for each in zip(*some, strict=True))
