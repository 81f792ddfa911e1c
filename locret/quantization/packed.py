"""Packed keys and packed values of one layer: how they are made, read and selected from.
`docs/quantization.md` says what each tensor is.

Evict first, then quantize: units that were packed keep their codes. Keys keep the entries of their
block with them, unless the head has too many thin blocks (`blocks.arrange`); only then are some
decoded and encoded anew. Units that were not packed yet are encoded once, in blocks of their own.

B batch, H KV heads, P packed units, r others after them, D head size, G blocks, K units kept.
"""

from dataclasses import dataclass, replace
from typing import Self

import torch
from torch import Tensor

from locret.kernels.packed import owners
from locret.quantization.base import Scheme, Tensors
from locret.quantization.blocks import Blocks, aligned, arrange, owners_at
from locret.quantization.buffers import gathered
from locret.quantization.codes import Outliers, as_stored, find_outliers

SLAB = 4096
"""Units of a head that are expanded at a time, so that float32 copies stay small."""


@dataclass(frozen=True)
class Packed:
    """What packed keys and packed values share.

    Attributes:
        scheme: encodes and decodes.
        head_size: D.
        units: what each unit needs, tensors [B, H, P, *].
        outliers: None unless the scheme keeps them.
    """

    scheme: Scheme
    head_size: int
    units: Tensors
    outliers: Outliers | None

    @property
    def count(self) -> int:
        """P."""
        return self.units[0].shape[2]

    @property
    def tensors(self) -> Tensors:
        return *self.units, *(() if self.outliers is None else self.outliers.tensors)

    def at(self, head: Tensor, unit: Tensor) -> Tensor:
        """float32 [..., D], some units.

        Args:
            head: long [...], of the flattened B * H heads.
            unit: long [...], below P.
        """
        flat = head * self.count + unit
        x = self._decoded(flat)
        if self.outliers is None or self.scheme.outliers is None:
            return x
        # Rounding must not make outliers of values that were none.
        x = x.clamp(-self.scheme.outliers, self.scheme.outliers)
        self.outliers.write(x, flat)
        return x

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        """[B, H, P, D] in `dtype`."""
        like = self.units[0]
        out = torch.empty(*like.shape[:3], self.head_size, dtype=dtype, device=like.device)
        self.write(out)
        return out

    def write(self, out: Tensor) -> None:
        """Write all units to `out` [B, H, P, D]."""
        if self.outliers is None and self._expanded(out):
            return
        batch, heads, count, _ = self.units[0].shape
        head = torch.arange(batch * heads, device=out.device).view(batch, heads, 1)
        for start in range(0, count, SLAB):
            unit = torch.arange(start, min(start + SLAB, count), device=out.device)
            out[:, :, start : start + SLAB] = self.at(*torch.broadcast_tensors(head, unit))

    def select_batch(self, rows: Tensor) -> Self:
        """The batch rows `rows` [B'] (long)."""
        outliers = self.outliers and self.outliers.select_batch(rows)
        return replace(self, units=tuple(t[rows] for t in self.units), outliers=outliers)

    def _decoded(self, flat: Tensor) -> Tensor:
        """float32 [..., D], units of the flattened B * H * P, outliers clipped."""
        raise NotImplementedError

    def _expanded(self, out: Tensor) -> bool:
        """Whether a kernel wrote all units to `out`."""
        raise NotImplementedError


@dataclass(frozen=True)
class PackedKeys(Packed):
    """
    Attributes:
        tables: tensors [B, H, G, *], an entry a block.
        starts: int32 [B, H, G + 1], the first unit of each block; `starts[..., -1]` is P.
    """

    tables: Tensors
    starts: Tensor

    @property
    def tensors(self) -> Tensors:
        return *super().tensors, *self.tables, self.starts

    def select_batch(self, rows: Tensor) -> Self:
        """The batch rows `rows` [B'] (long)."""
        tables = tuple(table[rows] for table in self.tables)
        return replace(super().select_batch(rows), tables=tables, starts=self.starts[rows])

    def _decoded(self, flat: Tensor) -> Tensor:
        entries = _at(self.tables, owners_at(self.starts, flat))
        return self.scheme.decode_keys(_at(self.units, flat), entries, self.head_size)

    def _expanded(self, out: Tensor) -> bool:
        return self.scheme.expand((*self.units, *self.tables), self.starts, out)


@dataclass(frozen=True)
class PackedValues(Packed):
    def _decoded(self, flat: Tensor) -> Tensor:
        return self.scheme.decode_values(_at(self.units, flat), self.head_size)

    def _expanded(self, out: Tensor) -> bool:
        return self.scheme.expand(self.units, None, out)


def quantize_keys(scheme: Scheme, x: Tensor) -> PackedKeys:
    """Pack keys [B, H, P, D], P >= 1, in blocks of `scheme.group` units from the first on.

    Raises:
        ValueError: a value is not finite, or too large to be stored.
    """
    batch, heads, count, size = x.shape
    total = torch.full((batch, heads), count, device=x.device)
    sizes = aligned(total, scheme.group, -(-count // scheme.group))
    # The last block is filled up with its last unit, which has no say in a smallest or largest
    # value.
    padded = torch.arange(sizes.shape[-1] * scheme.group, device=x.device).clamp(max=count - 1)
    filled = x[:, :, padded].unflatten(2, (-1, scheme.group))
    units, tables = scheme.encode_keys(filled, _usable(scheme, filled))
    units = _owned(tuple(tensor.flatten(2, 3)[:, :, :count] for tensor in units))
    starts = Blocks(sizes, sizes).starts
    return PackedKeys(scheme, size, units, _outliers_of(scheme, x), tables, starts)


def quantize_values(scheme: Scheme, x: Tensor) -> PackedValues:
    """Pack values [B, H, P, D]. Raises as `quantize_keys` does."""
    units = _owned(scheme.encode_values(x, _usable(scheme, x)))
    return PackedValues(scheme, x.shape[-1], units, _outliers_of(scheme, x))


def select_keys(packed: PackedKeys, others: Tensor, index: Tensor, limit: int) -> PackedKeys:
    """Pack the keys at `index`, and no others.

    Args:
        packed: P keys.
        others: [B, H, r, D], the keys after them.
        index: long [B, H, K], ascending, below P + r; K >= 1.
        limit: most blocks of a head.

    Raises:
        ValueError: a value that is to be encoded cannot be stored.
    """
    there = index.clamp(max=packed.count - 1)
    old = index < packed.count
    survivors = torch.zeros_like(packed.starts[..., 1:], dtype=torch.long)
    survivors.scatter_add_(2, owners(packed.starts, packed.count).gather(2, there), old.long())
    fresh, most = (~old).sum(2), min(others.shape[2], index.shape[2])
    blocks = arrange(survivors, fresh, most, packed.scheme.group, limit)
    kept = replace(
        packed,
        units=gathered(packed.units, there),
        outliers=_selected_outliers(packed, others, index),
        tables=gathered(packed.tables, blocks.kept.clamp(min=0)),
        starts=blocks.starts,
    )
    _encode_blocks(kept, blocks, packed, others, index)
    return kept


def _encode_blocks(
    kept: PackedKeys, blocks: Blocks, packed: PackedKeys, others: Tensor, index: Tensor
) -> None:
    """Fill in the codes and entries of the blocks of `kept` that keep no entry."""
    at = ((blocks.kept < 0) & (blocks.sizes > 0)).nonzero(as_tuple=True)
    if not len(at[0]):
        return
    starts, sizes = blocks.starts[..., :-1][at].long(), blocks.sizes[at]
    # Short blocks are filled up with their last unit: it is encoded, and written, repeatedly.
    step = torch.arange(packed.scheme.group, device=index.device)
    place = starts[:, None] + torch.minimum(step, sizes[:, None] - 1)
    head = (at[0] * index.shape[1] + at[1])[:, None].expand(place.shape)
    x = _in_full(packed, others, head, index.flatten(0, 1)[head, place])
    units, tables = packed.scheme.encode_keys(x, _usable(packed.scheme, x))
    for tensor, new in zip(kept.units, units, strict=True):
        tensor.flatten(0, 1)[head, place] = new
    for table, new in zip(kept.tables, tables, strict=True):
        table[at] = new


def select_values(packed: PackedValues, others: Tensor, index: Tensor) -> PackedValues:
    """Pack the values at `index`, and no others; arguments as for keys."""
    units = gathered(packed.units, index.clamp(max=packed.count - 1))
    new_at = (index >= packed.count).nonzero(as_tuple=True)
    if len(new_at[0]):
        x = others[new_at[0], new_at[1], index[new_at] - packed.count]
        encoded = packed.scheme.encode_values(x, _usable(packed.scheme, x))
        for tensor, new in zip(units, encoded, strict=True):
            tensor[new_at] = new
    return replace(packed, units=units, outliers=_selected_outliers(packed, others, index))


def fetch(packed: Packed | None, others: Tensor, index: Tensor) -> Tensor:
    """The units at `index` [B, H, K] in full precision, [B, H, K, D] like `others`.

    Args:
        packed: P units, or None for P = 0.
        others: [B, H, r, D], the units after them.
    """
    if packed is None:
        return gathered((others,), index)[0]
    heads = torch.arange(index.shape[0] * index.shape[1], device=index.device)
    head = heads.view(*index.shape[:2], 1).expand(index.shape)
    return _in_full(packed, others, head, index).to(others.dtype)


def _in_full(packed: Packed, others: Tensor, head: Tensor, slot: Tensor) -> Tensor:
    """float32 [..., D]: the units at `slot` [...] of the flattened B * H heads `head` [...]."""
    # Both for every unit: to ask which ones are packed would be to wait for the device.
    old = packed.at(head, slot.clamp(max=packed.count - 1))
    if not others.shape[2]:
        return old
    new = others.flatten(0, 1)[head, (slot - packed.count).clamp(min=0)].float()
    return torch.where((slot < packed.count)[..., None], old, new)


def _outliers_of(scheme: Scheme, x: Tensor) -> Outliers | None:
    """The outliers that `scheme` keeps of `x` [B, H, P, D]."""
    return None if scheme.outliers is None else find_outliers(x, scheme.outliers)


def _selected_outliers(packed: Packed, others: Tensor, index: Tensor) -> Outliers | None:
    found = _outliers_of(packed.scheme, others)
    if packed.outliers is None or found is None:
        return None
    return packed.outliers.join(found).select(index)


def _usable(scheme: Scheme, x: Tensor) -> Tensor | None:
    """What has a say in scale and minimum: all but outliers."""
    # NaN stays usable, so that it is refused rather than left out.
    return None if scheme.outliers is None else ~(as_stored(x).abs() > scheme.outliers)


def _owned(tensors: Tensors) -> Tensors:
    """The same, each in memory of its own size and no larger one that it is a view of."""
    return tuple(
        tensor
        if tensor.untyped_storage().nbytes() == tensor.nbytes
        else tensor.clone(memory_format=torch.contiguous_format)
        for tensor in tensors
    )


def _at(tensors: Tensors, flat: Tensor) -> Tensors:
    return tuple(tensor.flatten(0, 2)[flat] for tensor in tensors)
