"""The keys and values of one layer under a bounded cache: packed units, then a residual; their
tensors by name, for files; stores of one row each as one batch.

What is stored is never changed where it stands: appending writes behind it, all else makes new
tensors. So what a layer held can be restored (`view`, `restore`) without a copy.

B batch, H KV heads, S units, P of them packed, T new units, D head size, G blocks.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from locret.quantization.base import Scheme, Tensors
from locret.quantization.buffers import Buffers, BuffersView
from locret.quantization.codes import Outliers
from locret.quantization.costs import block_limit, costs_of
from locret.quantization.packed import (
    Packed,
    PackedKeys,
    PackedValues,
    fetch,
    quantize_keys,
    quantize_values,
    select_keys,
    select_values,
)

RESIDUAL = ("residual_keys", "residual_values")
_P = TypeVar("_P", bound=Packed)


class QuantizedView(NamedTuple):
    """What a layer held at some moment."""

    packed_keys: PackedKeys | None
    packed_values: PackedValues | None
    residual: BuffersView


class QuantizedStore:
    """Keys and values [B, H, S, D], the first P packed, the others (the residual) as they came.

    New units enter the residual. They are packed by `select`, which evicts first, and by `pack`,
    for a cache that evicts nothing.

    Attributes:
        scheme: how units are packed.
        packed_keys, packed_values: the packed units; None while there are none.
    """

    def __init__(self, scheme: Scheme) -> None:
        self.scheme = scheme
        self.clear()

    @property
    def packed(self) -> int:
        """P, units that are packed."""
        return self.packed_keys.count if self.packed_keys else 0

    @property
    def count(self) -> int:
        """S."""
        return self.packed + self.residual.count

    @property
    def residual_keys(self) -> Tensor:
        """[B, H, S - P, D]."""
        return self.residual[0]

    @property
    def residual_values(self) -> Tensor:
        """[B, H, S - P, D]."""
        return self.residual[1]

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """All storage, spare room included."""
        packed = [packed.tensors for packed in (self.packed_keys, self.packed_values) if packed]
        return *sum(packed, ()), *self.residual.tensors

    @property
    def nbytes(self) -> int:
        """Bytes of all storage: codes, tables, outliers, residual, spare room."""
        return sum(tensor.nbytes for tensor in self.tensors)

    @property
    def full_bytes(self) -> int:
        """Bytes of one token's keys and values as they came."""
        batch, heads, _, size = self.residual_keys.shape
        return 2 * batch * heads * size * self.residual_keys.element_size()

    def clear(self) -> None:
        self.packed_keys: PackedKeys | None = None
        self.packed_values: PackedValues | None = None
        self.residual = Buffers()

    def append(self, keys: Tensor, values: Tensor, room: int = 0) -> None:
        """Add T new units [B, H, T, D] to the residual.

        Args:
            room: when the residual must grow, how many units more than needed it takes.
        """
        self.residual.append((keys, values), room)

    def dequantized(self, dtype: torch.dtype | None = None) -> tuple[Tensor, Tensor]:
        """All keys and values [B, H, S, D], in order; `dtype` None = as they came."""
        return self.keys(dtype), self.values(dtype)

    def keys(self, dtype: torch.dtype | None = None) -> Tensor:
        """All keys, as `dequantized` gives them."""
        return _whole(self.packed_keys, self.residual_keys, dtype)

    def values(self, dtype: torch.dtype | None = None) -> Tensor:
        """All values, as `dequantized` gives them."""
        return _whole(self.packed_values, self.residual_values, dtype)

    def pack(self, room: int = 0) -> None:
        """Pack the oldest of the residual, in full blocks, when there are enough beyond the last
        `scheme.residual` units.

        Args:
            room: units to spare in the residual that is left.

        Raises:
            ValueError: a key or value cannot be stored; nothing has changed then.
        """
        spare = max(self.residual.count - self.scheme.residual, 0)
        ready = spare // self.scheme.group * self.scheme.group
        if not self.scheme.packs or not ready:
            return
        every = torch.arange(self.packed + ready, device=self.residual_keys.device)
        left = tuple(tensor[:, :, ready:] for tensor in self.residual)
        self._pack(every.expand(*self.residual_keys.shape[:2], -1), left[0].shape[2])
        self.residual = Buffers(left).with_room(room)

    def select(self, index: Tensor) -> None:
        """Hold only the units at `index`, and pack all of them but the last `scheme.residual`.

        Spare room is dropped.

        Args:
            index: long [B, H, K], ascending in each head, below S.

        Raises:
            ValueError: a key or value cannot be stored; nothing has changed then.
        """
        kept = index.shape[2]
        rest = min(self.scheme.residual, kept) if self.scheme.packs else kept
        last = index[:, :, kept - rest :]
        keys = fetch(self.packed_keys, self.residual_keys, last)
        values = fetch(self.packed_values, self.residual_values, last)
        self._pack(index[:, :, : kept - rest], rest)
        self.residual = Buffers((keys, values))

    def rebuild(self, keys: Tensor, room: int) -> None:
        """Hold the same units with other `keys` [B, H, S, D], in a residual with `room` to spare.

        Keys that are packed are encoded in full blocks, from the first on.

        Raises:
            ValueError: a key cannot be stored; nothing has changed then.
        """
        if self.packed_keys:
            self.packed_keys = quantize_keys(self.scheme, keys[:, :, : self.packed])
        rest = keys[:, :, self.packed :].to(self.residual_keys.dtype)
        self.residual = Buffers((rest, self.residual_values)).with_room(room)

    def view(self) -> QuantizedView:
        """What is held now, for `restore`."""
        return QuantizedView(self.packed_keys, self.packed_values, self.residual.view())

    def restore(self, view: QuantizedView) -> None:
        """Hold again what was held when `view` was taken."""
        self.packed_keys, self.packed_values, residual = view
        self.residual.restore(residual)

    def select_batch(self, rows: Tensor) -> None:
        """Hold only the batch rows `rows` [B'] (long); rows may repeat."""
        if self.packed_keys and self.packed_values:
            self.packed_keys, self.packed_values = (
                self.packed_keys.select_batch(rows),
                self.packed_values.select_batch(rows),
            )
        self.residual.select_batch(rows)

    def _pack(self, index: Tensor, rest: int) -> None:
        """Pack the units at `index` and no others; `rest` units are going to stay as they are."""
        old_keys, old_values = self.packed_keys, self.packed_values
        keys, values = None, None
        if index.shape[2] and old_keys and old_values:
            like = self.residual_keys
            costs = costs_of(self.scheme, like.shape[-1], like.element_size())
            limit = block_limit(costs, index.shape[2], rest)
            keys = select_keys(old_keys, self.residual_keys, index, limit)
            values = select_values(old_values, self.residual_values, index)
        elif index.shape[2]:
            keys = quantize_keys(self.scheme, fetch(None, self.residual_keys, index))
            values = quantize_values(self.scheme, fetch(None, self.residual_values, index))
        self.packed_keys, self.packed_values = keys, values


def _whole(packed: Packed | None, rest: Tensor, dtype: torch.dtype | None) -> Tensor:
    dtype = dtype or rest.dtype
    if packed is None:
        return rest.to(dtype)
    batch, heads, units, size = rest.shape
    whole = rest.new_empty(batch, heads, packed.count + units, size, dtype=dtype)
    packed.write(whole[:, :, : packed.count])
    whole[:, :, packed.count :] = rest
    return whole


def named_tensors(store: QuantizedStore) -> dict[str, Tensor]:
    """All that `store` holds by name, without spare room: what files hold."""
    named = dict(zip(RESIDUAL, store.residual, strict=True)) if store.count else {}
    keys, values = store.packed_keys, store.packed_values
    if keys is not None and values is not None:
        named |= _named("key_units", keys.units) | _named("key_rows", keys.tables)
        named |= {"key_starts": keys.starts} | _named("value_units", values.units)
        named |= _named("key_outliers", keys.outliers.tensors if keys.outliers else ())
        named |= _named("value_outliers", values.outliers.tensors if values.outliers else ())
    return named


def store_of(scheme: Scheme, named: dict[str, Tensor]) -> QuantizedStore:
    """The store that `named_tensors` was told of; there may be other tensors among them."""
    store = QuantizedStore(scheme)
    if RESIDUAL[0] not in named:
        return store
    store.residual = Buffers([named[name] for name in RESIDUAL])
    size = store.residual_keys.shape[-1]
    if "key_starts" in named:
        outliers = [_tensors(f"{side}_outliers", named) for side in ("key", "value")]
        of_keys, of_values = (Outliers(*found) if found else None for found in outliers)
        units, tables = _tensors("key_units", named), _tensors("key_rows", named)
        store.packed_keys = PackedKeys(scheme, size, units, of_keys, tables, named["key_starts"])
        store.packed_values = PackedValues(scheme, size, _tensors("value_units", named), of_values)
    return store


def _named(name: str, tensors: Tensors) -> dict[str, Tensor]:
    return {f"{name}.{i}": tensor for i, tensor in enumerate(tensors)}


def _tensors(name: str, named: dict[str, Tensor]) -> Tensors:
    count = sum(other.startswith(f"{name}.") for other in named)
    return tuple(named[f"{name}.{i}"] for i in range(count))


def stack_stores(rows: Sequence[QuantizedStore]) -> QuantizedStore:
    """The rows, stores of one batch row and the same scheme, as one store, aligned at their last
    unit. No unit is encoded anew.

    Slots before a row's first unit are zeros, in blocks of their own. As many units of every row
    as the longest residual has are in the batch's residual; those that were packed are expanded.
    """
    stacked = QuantizedStore(rows[0].scheme)
    rest = max(row.residual.count for row in rows)
    packed = max(row.count for row in rows) - rest
    stacked.residual = Buffers.stack([_last_units(row, rest) for row in rows])
    if packed:
        counts = [max(row.count - rest, 0) for row in rows]
        keys = [row.packed_keys if count else None for row, count in zip(rows, counts, strict=True)]
        values = [row.packed_values if key else None for row, key in zip(rows, keys, strict=True)]
        stacked.packed_keys = _stack_keys(keys, counts, packed)
        stacked.packed_values = _stack(values, counts, packed)
    return stacked


def _last_units(row: QuantizedStore, count: int) -> Buffers:
    """The last `count` units in full precision; all, if there are fewer."""
    if not row.count or row.residual.count == count:
        return row.residual
    keys, values = row.residual
    index = torch.arange(max(row.count - count, 0), row.count, device=keys.device)
    index = index.expand(*keys.shape[:2], -1)
    return Buffers([fetch(row.packed_keys, keys, index), fetch(row.packed_values, values, index)])


def _stack_keys(
    rows: Sequence[PackedKeys | None], counts: Sequence[int], packed: int
) -> PackedKeys:
    """The first `counts[row]` keys of each row, at the end of `packed` slots."""
    stacked = _stack(rows, counts, packed)
    group, heads = stacked.scheme.group, stacked.starts.shape[1]
    leading = [-(-(packed - count) // group) for count in counts]
    own = [row.starts.shape[-1] - 1 if row else 0 for row in rows]
    blocks = max(before + count for before, count in zip(leading, own, strict=True))
    starts = stacked.starts.new_full((len(rows), heads, blocks + 1), packed)
    tables = tuple(t.new_zeros(len(rows), heads, blocks, t.shape[-1]) for t in stacked.tables)
    for i, (row, count, before) in enumerate(zip(rows, counts, leading, strict=True)):
        starts[i, :, :before] = torch.arange(before, device=starts.device) * group
        if row:
            after = before + own[i]
            starts[i, :, before : after + 1] = row.starts[0].clamp(max=count) + packed - count
            for table, entries in zip(tables, row.tables, strict=True):
                table[i, :, before:after] = entries[0]
    return replace(stacked, tables=tables, starts=starts)


def _stack(rows: Sequence[_P | None], counts: Sequence[int], packed: int) -> _P:
    """Units and outliers of the first `counts[row]` units of each row, at the end of `packed`
    slots; of keys, tables and starts are still those of one row."""
    some = next(row for row in rows if row)
    units = _stack_tensors([row.units if row else () for row in rows], counts, packed)
    outliers = None
    if some.outliers:
        found = [_first_outliers(row, count) for row, count in zip(rows, counts, strict=True)]
        own_counts = [(each.counts,) if each else () for each in found]
        (of_units,) = _stack_tensors(own_counts, counts, packed)
        channels = torch.cat([each.channels for each in found if each])
        values = torch.cat([each.values for each in found if each])
        outliers = Outliers(of_units, channels, values)
    return replace(some, units=units, outliers=outliers)


def _first_outliers(row: Packed | None, count: int) -> Outliers | None:
    if row is None or row.outliers is None:
        return None
    counts = row.outliers.counts
    first = torch.arange(count, device=counts.device).expand(*counts.shape[:2], -1)
    return row.outliers.select(first)


def _stack_tensors(rows: Sequence[Tensors], counts: Sequence[int], packed: int) -> Tensors:
    first = zip(rows, counts, strict=True)
    stacked = Buffers.stack([Buffers([x[:, :, :count] for x in row]) for row, count in first])
    assert stacked.count == packed
    return stacked.tensors
