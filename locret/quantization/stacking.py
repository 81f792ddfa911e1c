"""Stores of one row each as one batch, aligned at their last unit. No unit is encoded anew.

Slots before a row's first unit are zeros, in runs of their own. As many units of every row as the
longest residual has are in the batch's residual; those that were packed are expanded for it.

B batch, H KV heads, P packed units of the batch, G runs, D head size.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from locret.quantization.base import Parts
from locret.quantization.columns import Columns
from locret.quantization.eviction import fetch
from locret.quantization.outliers import Outliers
from locret.quantization.packed import PackedKeys, PackedValues
from locret.quantization.storage import QuantizedUnits


def stack_stores(rows: Sequence[QuantizedUnits]) -> QuantizedUnits:
    """The rows, stores of one batch row and the same scheme, as one store."""
    stacked = QuantizedUnits(rows[0].scheme)
    rest = max(row.residual.held for row in rows)
    packed = max(row.held for row in rows) - rest
    stacked.residual = Columns.stack([_last_units(row, rest) for row in rows])
    if packed:
        first = [max(row.held - rest, 0) for row in rows]
        stacked.packed_keys = _stack_keys([row.packed_keys for row in rows], first, packed)
        stacked.packed_values = _stack_values([row.packed_values for row in rows], first, packed)
    return stacked


def _last_units(row: QuantizedUnits, count: int) -> Columns:
    """The last `count` units in full precision; all, if there are fewer."""
    if not row.held or row.residual.held == count:
        return row.residual
    keys = row.residual_keys
    index = torch.arange(max(row.held - count, 0), row.held, device=keys.device)
    index = index.expand(*keys.shape[:2], -1)
    return Columns(
        [
            fetch(row.packed_keys, row.residual_keys, index),
            fetch(row.packed_values, row.residual_values, index),
        ]
    )


def _stack_keys(
    rows: Sequence[PackedKeys | None], counts: Sequence[int], packed: int
) -> PackedKeys | None:
    """The first `counts[row]` keys of each row, at the end of `packed` slots."""
    some = next(row for row, count in zip(rows, counts, strict=True) if row and count)
    group = some.scheme.group
    leading = [-(-(packed - count) // group) for count in counts]
    runs = max(
        before + (row.starts.shape[-1] - 1 if row and count else 0)
        for row, count, before in zip(rows, counts, leading, strict=True)
    )
    heads = some.starts.shape[1]
    starts = some.starts.new_full((len(rows), heads, runs + 1), packed)
    tables = tuple(part.new_zeros(len(rows), heads, runs, part.shape[-1]) for part in some.rows)
    for i, (row, count, before) in enumerate(zip(rows, counts, leading, strict=True)):
        starts[i, :, :before] = torch.arange(before, device=starts.device) * group
        if row and count:
            after = before + row.starts.shape[-1] - 1
            starts[i, :, before : after + 1] = row.starts[0].clamp(max=count) + packed - count
            for table, part in zip(tables, row.rows, strict=True):
                table[i, :, before:after] = part[0]
    return PackedKeys(
        some.scheme,
        some.head_size,
        _stack_units([row.units if row else None for row in rows], counts, packed),
        tables,
        starts,
        _stack_outliers([row.outliers if row else None for row in rows], counts, packed),
    )


def _stack_values(
    rows: Sequence[PackedValues | None], counts: Sequence[int], packed: int
) -> PackedValues | None:
    """As `_stack_keys`."""
    some = next(row for row, count in zip(rows, counts, strict=True) if row and count)
    return PackedValues(
        some.scheme,
        some.head_size,
        _stack_units([row.units if row else None for row in rows], counts, packed),
        _stack_outliers([row.outliers if row else None for row in rows], counts, packed),
    )


def _stack_units(rows: Sequence[Parts | None], counts: Sequence[int], packed: int) -> Parts:
    columns = [
        Columns([part[:, :, :count] for part in parts] if parts and count else ())
        for parts, count in zip(rows, counts, strict=True)
    ]
    stacked = Columns.stack(columns)
    assert stacked.held == packed
    return stacked.tensors


def _stack_outliers(
    rows: Sequence[Outliers | None], counts: Sequence[int], packed: int
) -> Outliers | None:
    kept = [
        row.select(_first(row.counts, count)) if row and count else None
        for row, count in zip(rows, counts, strict=True)
    ]
    found = [row for row in kept if row is not None]
    if not found:
        return None
    (of_units,) = _stack_units([(row.counts,) if row else None for row in kept], counts, packed)
    channels = torch.cat([row.channels for row in found])
    return Outliers(of_units, channels, torch.cat([row.values for row in found]))


def _first(counts: Tensor, count: int) -> Tensor:
    """Index [1, H, count] of the first units."""
    return torch.arange(count, device=counts.device).expand(*counts.shape[:2], -1)
