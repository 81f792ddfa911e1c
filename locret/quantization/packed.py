"""Packed keys and packed values of one layer, and how they are read. `docs/quantization.md` says
what each tensor is.

B batch, H KV heads, P packed units, D head size, G runs.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from locret.quantization.affine import as_stored
from locret.quantization.base import Parts, Scheme
from locret.quantization.outliers import Outliers, find_outliers
from locret.quantization.runs import Runs, aligned, owners_at

SLAB = 4096
"""Units of a head that are expanded at a time, so that float32 copies stay small."""


@dataclass(frozen=True)
class PackedKeys:
    """
    Attributes:
        scheme: encodes and decodes.
        head_size: D.
        units: what each unit needs, tensors [B, H, P, *].
        rows: the tables, tensors [B, H, G, *], a row a run.
        starts: int32 [B, H, G + 1], the first unit of each run; `starts[..., -1]` is P.
        outliers: None unless the scheme keeps them.
    """

    scheme: Scheme
    head_size: int
    units: Parts
    rows: Parts
    starts: Tensor
    outliers: Outliers | None

    @property
    def count(self) -> int:
        """P."""
        return self.units[0].shape[2]

    @property
    def tensors(self) -> Parts:
        return *self.units, *self.rows, self.starts, *_tensors(self.outliers)

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors: codes, tables, starts, outliers."""
        return sum(tensor.nbytes for tensor in self.tensors)

    def at(self, head: Tensor, unit: Tensor) -> Tensor:
        """float32 [..., D], the keys of some units.

        Args:
            head: long [...], of the flattened B * H heads.
            unit: long [...], below P.
        """
        flat = head * self.count + unit
        run = owners_at(self.starts, flat)
        x = self.scheme.decode_keys(_at(self.units, flat), _at(self.rows, run), self.head_size)
        return _with_outliers(x, self.outliers, self.scheme, flat)

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        """[B, H, P, D] in `dtype`."""
        return _expanded(self, dtype)

    def write(self, out: Tensor) -> None:
        """Write all keys to `out` [B, H, P, D]."""
        done = self.outliers is None and self.scheme.expand_keys(
            self.units, self.rows, self.starts, out
        )
        if not done:
            _write_slabs(self, out)

    def select_batch(self, rows: Tensor) -> "PackedKeys":
        """The batch rows `rows` [B'] (long)."""
        units, tables = (tuple(t[rows] for t in parts) for parts in (self.units, self.rows))
        outliers = self.outliers and self.outliers.select_batch(rows)
        return PackedKeys(self.scheme, self.head_size, units, tables, self.starts[rows], outliers)


@dataclass(frozen=True)
class PackedValues:
    """
    Attributes:
        scheme: encodes and decodes.
        head_size: D.
        units: what each unit needs, tensors [B, H, P, *].
        outliers: None unless the scheme keeps them.
    """

    scheme: Scheme
    head_size: int
    units: Parts
    outliers: Outliers | None

    @property
    def count(self) -> int:
        """P."""
        return self.units[0].shape[2]

    @property
    def tensors(self) -> Parts:
        return *self.units, *_tensors(self.outliers)

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors: codes, scales, outliers."""
        return sum(tensor.nbytes for tensor in self.tensors)

    def at(self, head: Tensor, unit: Tensor) -> Tensor:
        """float32 [..., D], the values of some units; arguments as for keys."""
        flat = head * self.count + unit
        x = self.scheme.decode_values(_at(self.units, flat), self.head_size)
        return _with_outliers(x, self.outliers, self.scheme, flat)

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        """[B, H, P, D] in `dtype`."""
        return _expanded(self, dtype)

    def write(self, out: Tensor) -> None:
        """Write all values to `out` [B, H, P, D]."""
        if self.outliers is not None or not self.scheme.expand_values(self.units, out):
            _write_slabs(self, out)

    def select_batch(self, rows: Tensor) -> "PackedValues":
        """The batch rows `rows` [B'] (long)."""
        outliers = self.outliers and self.outliers.select_batch(rows)
        return PackedValues(
            self.scheme, self.head_size, tuple(t[rows] for t in self.units), outliers
        )


def quantize_keys(scheme: Scheme, x: Tensor) -> PackedKeys:
    """Pack keys [B, H, P, D], P >= 1, in runs of `scheme.group` units from the first on.

    Raises:
        ValueError: a value is not finite, or too large to be stored.
    """
    batch, heads, count, size = x.shape
    total = torch.full((batch, heads), count, device=x.device)
    runs = aligned(total, scheme.group, -(-count // scheme.group))
    # The last run is filled up with its last unit, which has no say in a smallest or largest value.
    padded = torch.arange(runs.shape[-1] * scheme.group, device=x.device).clamp(max=count - 1)
    units, rows = encode_keys(scheme, x[:, :, padded].unflatten(2, (-1, scheme.group)))
    units = _owned(tuple(part.flatten(2, 3)[:, :, :count] for part in units))
    starts = Runs(runs, runs).starts
    return PackedKeys(scheme, size, units, rows, starts, outliers_of(scheme, x))


def quantize_values(scheme: Scheme, x: Tensor) -> PackedValues:
    """Pack values [B, H, P, D]. Raises as `quantize_keys` does."""
    units = _owned(encode_values(scheme, x))
    return PackedValues(scheme, x.shape[-1], units, outliers_of(scheme, x))


def encode_keys(scheme: Scheme, x: Tensor) -> tuple[Parts, Parts]:
    """`scheme.encode_keys` of runs [..., g, D], outliers left out of scale and minimum."""
    return scheme.encode_keys(x, _usable(scheme, x))


def encode_values(scheme: Scheme, x: Tensor) -> Parts:
    """`scheme.encode_values` of [..., D], outliers left out of scale and minimum."""
    return scheme.encode_values(x, _usable(scheme, x))


def outliers_of(scheme: Scheme, x: Tensor) -> Outliers | None:
    """The outliers that `scheme` keeps of `x` [B, H, P, D]."""
    return None if scheme.outliers is None else find_outliers(x, scheme.outliers)


def _usable(scheme: Scheme, x: Tensor) -> Tensor | None:
    # NaN stays usable, so that it is refused rather than left out.
    return None if scheme.outliers is None else ~(as_stored(x).abs() > scheme.outliers)


def _tensors(outliers: Outliers | None) -> Parts:
    return () if outliers is None else outliers.tensors


def _owned(parts: Parts) -> Parts:
    """The same, each in memory of its own size and no larger one that it is a view of."""
    return tuple(
        part
        if part.untyped_storage().nbytes() == part.nbytes
        else part.clone(memory_format=torch.contiguous_format)
        for part in parts
    )


def _at(parts: Parts, flat: Tensor) -> Parts:
    return tuple(part.flatten(0, 2)[flat] for part in parts)


def _with_outliers(x: Tensor, outliers: Outliers | None, scheme: Scheme, flat: Tensor) -> Tensor:
    if outliers is None or scheme.outliers is None:
        return x
    # Rounding must not make outliers of values that were none.
    x = x.clamp(-scheme.outliers, scheme.outliers)
    outliers.write(x, flat)
    return x


def _expanded(packed: PackedKeys | PackedValues, dtype: torch.dtype) -> Tensor:
    like = packed.units[0]
    out = torch.empty(*like.shape[:3], packed.head_size, dtype=dtype, device=like.device)
    packed.write(out)
    return out


def _write_slabs(packed: PackedKeys | PackedValues, out: Tensor) -> None:
    batch, heads, count, _ = packed.units[0].shape
    head = torch.arange(batch * heads, device=out.device).view(batch, heads, 1)
    for start in range(0, count, SLAB):
        unit = torch.arange(start, min(start + SLAB, count), device=out.device)
        out[:, :, start : start + SLAB] = packed.at(*torch.broadcast_tensors(head, unit))
