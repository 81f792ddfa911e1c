"""The keys and values of one layer under a bounded cache: packed units, then a residual.

B batch, H KV heads, S units held, P of them packed, T new units, D head size.
"""

import torch
from torch import Tensor

from locret.quantization.base import Scheme
from locret.quantization.costs import costs_of, run_limit
from locret.quantization.eviction import fetch, select_keys, select_values
from locret.quantization.packed import PackedKeys, PackedValues, quantize_keys, quantize_values


class QuantizedUnits:
    """Keys and values [B, H, S, D], the first P packed, the others (the residual) as they came.

    New units enter the residual. They are packed by `select`, which evicts first, and by `pack`,
    for a cache that evicts nothing.

    Attributes:
        scheme: how units are packed.
        keys, values: what is packed; None while nothing is.
    """

    def __init__(self, scheme: Scheme) -> None:
        self.scheme = scheme
        self.clear()

    @property
    def packed(self) -> int:
        """P, units that are packed."""
        return self.keys.count if self.keys else 0

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
        packed = [part.tensors for part in (self.keys, self.values) if part]
        return *sum(packed, ()), *((self._keys, self._values) if self.held else ())

    @property
    def nbytes(self) -> int:
        """Bytes of all storage: codes, tables, outliers, residual, spare room."""
        return sum(tensor.nbytes for tensor in self.tensors)

    def clear(self) -> None:
        self.keys: PackedKeys | None = None
        self.values: PackedValues | None = None
        self._rest = 0
        self._keys = self._values = torch.empty(0)

    def append(self, keys: Tensor, values: Tensor, room: int = 0) -> None:
        """Add T new units [B, H, T, D] to the residual.

        Args:
            room: when the residual must grow, how many units more than needed it takes.
        """
        end = self._rest + keys.shape[2]
        if not self.held or end > self._keys.shape[2]:
            self._keys = _grown(self.residual_keys if self.held else None, keys, end + room)
            self._values = _grown(self.residual_values if self.held else None, values, end + room)
        self._keys[:, :, self._rest : end] = keys
        self._values[:, :, self._rest : end] = values
        self._rest = end

    def dequantized(self, dtype: torch.dtype | None = None) -> tuple[Tensor, Tensor]:
        """All keys and values [B, H, S, D], in order; `dtype` None = as they came."""
        dtype = dtype or self._keys.dtype
        sides = [(self.residual_keys, self.keys), (self.residual_values, self.values)]
        keys, values = (
            torch.cat([packed.dequantize(dtype), rest.to(dtype)], 2) if packed else rest.to(dtype)
            for rest, packed in sides
        )
        return keys, values

    def pack(self) -> None:
        """Pack the oldest of the residual, in full runs, when there are enough beyond the last
        `scheme.residual` units.

        Raises:
            ValueError: a key or value cannot be stored; nothing has changed then.
        """
        ready = max(self._rest - self.scheme.residual, 0) // self.scheme.group * self.scheme.group
        if not self.scheme.packs or not ready:
            return
        every = torch.arange(self.packed + ready, device=self._keys.device)
        self._pack(every.expand(*self._keys.shape[:2], -1), self._rest - ready)
        left = self._rest - ready
        for stored in (self._keys, self._values):
            stored[:, :, :left] = stored[:, :, ready : self._rest].clone()
        self._rest = left

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
        keys = fetch(self.keys, self.residual_keys, last)
        values = fetch(self.values, self.residual_values, last)
        self._pack(index[:, :, : kept - rest], rest)
        self._keys, self._values, self._rest = keys, values, rest

    def replace_keys(self, keys: Tensor) -> None:
        """Overwrite the keys held with `keys` [B, H, S, D]; packed ones are encoded in full runs.

        Raises:
            ValueError: a key cannot be stored; nothing has changed then.
        """
        if self.keys:
            self.keys = quantize_keys(self.scheme, keys[:, :, : self.packed])
        self._keys[:, :, : self._rest] = keys[:, :, self.packed :]

    def select_batch(self, rows: Tensor) -> None:
        """Hold only the batch rows `rows` [B'] (long); rows may repeat."""
        if self.keys and self.values:
            self.keys, self.values = self.keys.select_batch(rows), self.values.select_batch(rows)
        self._keys, self._values = self._keys[rows], self._values[rows]

    def _pack(self, index: Tensor, rest: int) -> None:
        """Pack the units at `index` and no others; `rest` units are going to stay as they are."""
        if not index.shape[2]:
            self.keys = self.values = None
        elif self.keys and self.values:
            costs = costs_of(self.scheme, self._keys.shape[-1], self._keys.element_size())
            limit = run_limit(costs, index.shape[2], rest)
            keys = select_keys(self.keys, self.residual_keys, index, limit)
            self.values = select_values(self.values, self.residual_values, index)
            self.keys = keys
        else:
            keys = quantize_keys(self.scheme, fetch(None, self.residual_keys, index))
            self.values = quantize_values(self.scheme, fetch(None, self.residual_values, index))
            self.keys = keys


def _grown(old: Tensor | None, like: Tensor, capacity: int) -> Tensor:
    grown = like.new_empty(*like.shape[:2], capacity, like.shape[3])
    if old is not None:
        grown[:, :, : old.shape[2]] = old
    return grown
