"""The keys and values of one layer under a bounded cache: packed units, then a residual.

What is stored is never changed where it stands: appending writes behind it, all else makes new
tensors. So what a layer held can be restored (`view`, `restore`) without a copy.

B batch, H KV heads, S units held, P of them packed, T new units, D head size.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from locret.quantization.base import Scheme
from locret.quantization.columns import Columns, ColumnsView
from locret.quantization.costs import costs_of, run_limit
from locret.quantization.eviction import fetch, select_keys, select_values
from locret.quantization.packed import PackedKeys, PackedValues, quantize_keys, quantize_values


class QuantizedView(NamedTuple):
    """What a layer held at some moment."""

    packed_keys: PackedKeys | None
    packed_values: PackedValues | None
    residual: ColumnsView


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
        return self.packed + self.residual.held

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
        packed = [part.tensors for part in (self.packed_keys, self.packed_values) if part]
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
        self.residual = Columns()

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
        """Pack the oldest of the residual, in full runs, when there are enough beyond the last
        `scheme.residual` units.

        Args:
            room: units to spare in the residual that is left.

        Raises:
            ValueError: a key or value cannot be stored; nothing has changed then.
        """
        spare = max(self.residual.held - self.scheme.residual, 0)
        ready = spare // self.scheme.group * self.scheme.group
        if not self.scheme.packs or not ready:
            return
        every = torch.arange(self.packed + ready, device=self.residual_keys.device)
        left = tuple(column[:, :, ready:] for column in self.residual)
        self._pack(every.expand(*self.residual_keys.shape[:2], -1), left[0].shape[2])
        self._keep(left, room)

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
        self.residual = Columns((keys, values))

    def rebuild(self, keys: Tensor, room: int) -> None:
        """Hold the same units with other `keys` [B, H, S, D], in a residual with `room` to spare.

        Keys that are packed are encoded in full runs, from the first on.

        Raises:
            ValueError: a key cannot be stored; nothing has changed then.
        """
        if self.packed_keys:
            self.packed_keys = quantize_keys(self.scheme, keys[:, :, : self.packed])
        rest = keys[:, :, self.packed :].to(self.residual_keys.dtype)
        self._keep((rest, self.residual_values), room)

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

    def _keep(self, residual: Sequence[Tensor], room: int) -> None:
        """Hold these as the residual, copied, with `room` to spare."""
        self.residual = Columns()
        self.residual.append(residual, room)

    def _pack(self, index: Tensor, rest: int) -> None:
        """Pack the units at `index` and no others; `rest` units are going to stay as they are."""
        old_keys, old_values = self.packed_keys, self.packed_values
        keys, values = None, None
        if index.shape[2] and old_keys and old_values:
            like = self.residual_keys
            costs = costs_of(self.scheme, like.shape[-1], like.element_size())
            limit = run_limit(costs, index.shape[2], rest)
            keys = select_keys(old_keys, self.residual_keys, index, limit)
            values = select_values(old_values, self.residual_values, index)
        elif index.shape[2]:
            keys = quantize_keys(self.scheme, fetch(None, self.residual_keys, index))
            values = quantize_values(self.scheme, fetch(None, self.residual_values, index))
        self.packed_keys, self.packed_values = keys, values


def _whole(
    packed: PackedKeys | PackedValues | None, rest: Tensor, dtype: torch.dtype | None
) -> Tensor:
    dtype = dtype or rest.dtype
    if packed is None:
        return rest.to(dtype)
    batch, heads, units, size = rest.shape
    whole = rest.new_empty(batch, heads, packed.count + units, size, dtype=dtype)
    packed.write(whole[:, :, : packed.count])
    whole[:, :, packed.count :] = rest
    return whole
