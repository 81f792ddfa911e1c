"""The keys and values of one layer under a bounded cache: packed units, then a residual.

What is stored is never changed where it stands: appending writes behind it, all else makes new
tensors. So what a layer held can be restored (`view`, `restore`) without a copy.

B batch, H KV heads, S units held, P of them packed, T new units, D head size.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from locret.quantization.base import Scheme
from locret.quantization.costs import costs_of, run_limit
from locret.quantization.eviction import fetch, select_keys, select_values
from locret.quantization.packed import PackedKeys, PackedValues, quantize_keys, quantize_values


class QuantizedView(NamedTuple):
    """What a layer held at some moment: what was packed, the residual's storage, how much of it was
    in use."""

    packed_keys: PackedKeys | None
    packed_values: PackedValues | None
    residual: tuple[Tensor, Tensor]
    rest: int


class QuantizedUnits:
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
    def held(self) -> int:
        """S."""
        return self.packed + self._rest

    @property
    def residual_keys(self) -> Tensor:
        """[B, H, S - P, D]."""
        return self._keys[:, :, : self._rest]

    @property
    def residual_values(self) -> Tensor:
        """[B, H, S - P, D]."""
        return self._values[:, :, : self._rest]

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """All storage, spare room included."""
        packed = [part.tensors for part in (self.packed_keys, self.packed_values) if part]
        return *sum(packed, ()), *((self._keys, self._values) if self.held else ())

    @property
    def nbytes(self) -> int:
        """Bytes of all storage: codes, tables, outliers, residual, spare room."""
        return sum(tensor.nbytes for tensor in self.tensors)

    def clear(self) -> None:
        self.packed_keys: PackedKeys | None = None
        self.packed_values: PackedValues | None = None
        self._rest = 0
        self._keys = self._values = torch.empty(0)

    def append(self, keys: Tensor, values: Tensor, room: int = 0) -> None:
        """Add T new units [B, H, T, D] to the residual.

        Args:
            room: when the residual must grow, how many units more than needed it takes.
        """
        end = self._rest + keys.shape[2]
        if not self.held:
            self._keys, self._values = _grown(keys, room), _grown(values, room)
        elif end > self._keys.shape[2]:
            more = end - self._rest + room
            self._keys = _grown(self.residual_keys, more)
            self._values = _grown(self.residual_values, more)
        self._keys[:, :, self._rest : end] = keys
        self._values[:, :, self._rest : end] = values
        self._rest = end

    def dequantized(self, dtype: torch.dtype | None = None) -> tuple[Tensor, Tensor]:
        """All keys and values [B, H, S, D], in order; `dtype` None = as they came."""
        dtype = dtype or self._keys.dtype
        sides = [(self.residual_keys, self.packed_keys), (self.residual_values, self.packed_values)]
        keys, values = (
            torch.cat([packed.dequantize(dtype), rest.to(dtype)], 2) if packed else rest.to(dtype)
            for rest, packed in sides
        )
        return keys, values

    def pack(self, room: int = 0) -> None:
        """Pack the oldest of the residual, in full runs, when there are enough beyond the last
        `scheme.residual` units.

        Args:
            room: units to spare in the residual that is left.

        Raises:
            ValueError: a key or value cannot be stored; nothing has changed then.
        """
        ready = max(self._rest - self.scheme.residual, 0) // self.scheme.group * self.scheme.group
        if not self.scheme.packs or not ready:
            return
        every = torch.arange(self.packed + ready, device=self._keys.device)
        self._pack(every.expand(*self._keys.shape[:2], -1), self._rest - ready)
        self._keys = _grown(self.residual_keys[:, :, ready:], room)
        self._values = _grown(self.residual_values[:, :, ready:], room)
        self._rest -= ready

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
        self._keys, self._values, self._rest = keys, values, rest

    def rebuild(self, keys: Tensor, room: int) -> None:
        """Hold the same units with other `keys` [B, H, S, D], in a residual with `room` to spare.

        Keys that are packed are encoded in full runs, from the first on.

        Raises:
            ValueError: a key cannot be stored; nothing has changed then.
        """
        if self.packed_keys:
            self.packed_keys = quantize_keys(self.scheme, keys[:, :, : self.packed])
        self._keys = _grown(keys[:, :, self.packed :].to(self._keys.dtype), room)
        self._values = _grown(self.residual_values, room)

    def view(self) -> QuantizedView:
        """What is held now, for `restore`."""
        residual = (self._keys, self._values)
        return QuantizedView(self.packed_keys, self.packed_values, residual, self._rest)

    def restore(self, view: QuantizedView) -> None:
        """Hold again what was held when `view` was taken."""
        self.packed_keys, self.packed_values, (self._keys, self._values), self._rest = view

    def select_batch(self, rows: Tensor) -> None:
        """Hold only the batch rows `rows` [B'] (long); rows may repeat."""
        if self.packed_keys and self.packed_values:
            self.packed_keys, self.packed_values = (
                self.packed_keys.select_batch(rows),
                self.packed_values.select_batch(rows),
            )
        self._keys, self._values = self._keys[rows], self._values[rows]

    def _pack(self, index: Tensor, rest: int) -> None:
        """Pack the units at `index` and no others; `rest` units are going to stay as they are."""
        old_keys, old_values = self.packed_keys, self.packed_values
        keys, values = None, None
        if index.shape[2] and old_keys and old_values:
            costs = costs_of(self.scheme, self._keys.shape[-1], self._keys.element_size())
            limit = run_limit(costs, index.shape[2], rest)
            keys = select_keys(old_keys, self.residual_keys, index, limit)
            values = select_values(old_values, self.residual_values, index)
        elif index.shape[2]:
            keys = quantize_keys(self.scheme, fetch(None, self.residual_keys, index))
            values = quantize_values(self.scheme, fetch(None, self.residual_values, index))
        self.packed_keys, self.packed_values = keys, values


def _grown(x: Tensor, room: int) -> Tensor:
    """A copy of `x` [B, H, n, D] with `room` more units, which hold anything."""
    grown = x.new_empty(*x.shape[:2], x.shape[2] + room, x.shape[3])
    grown[:, :, : x.shape[2]] = x
    return grown
