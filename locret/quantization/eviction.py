"""Evict first, then quantize: what becomes of packed units when some of all units are kept.

Units that were packed keep their codes. Keys keep the row of their run with them, unless the head
has too many thin runs (`runs.arrange`); only then are some decoded and encoded anew. Units that
were not packed yet are encoded once, in runs of their own.

B batch, H KV heads, P packed units, r others after them, D head size, K units kept.
"""

import torch
from torch import Tensor

from locret.quantization.base import Parts
from locret.quantization.outliers import Outliers
from locret.quantization.packed import (
    PackedKeys,
    PackedValues,
    encode_keys,
    encode_values,
    outliers_of,
)
from locret.quantization.runs import Runs, arrange, owners


def select_keys(packed: PackedKeys, others: Tensor, index: Tensor, limit: int) -> PackedKeys:
    """Pack the keys at `index`, and no others.

    Args:
        packed: P keys.
        others: [B, H, r, D], the keys after them.
        index: long [B, H, K], ascending, below P + r; K >= 1.
        limit: most runs of a head.

    Raises:
        ValueError: a value that is to be encoded cannot be stored.
    """
    there = index.clamp(max=packed.count - 1)
    old = index < packed.count
    survivors = torch.zeros_like(packed.starts[..., 1:], dtype=torch.long)
    survivors.scatter_add_(2, owners(packed.starts, packed.count).gather(2, there), old.long())
    fresh, most = (~old).sum(2), min(others.shape[2], index.shape[2])
    runs = arrange(survivors, fresh, most, packed.scheme.group, limit)
    units = _gathered(packed.units, there)
    rows = _gathered(packed.rows, runs.kept.clamp(min=0))
    outliers = _outliers(packed, others, index)
    kept = PackedKeys(packed.scheme, packed.head_size, units, rows, runs.starts, outliers)
    _encode_runs(kept, runs, packed, others, index)
    return kept


def _encode_runs(
    kept: PackedKeys, runs: Runs, packed: PackedKeys, others: Tensor, index: Tensor
) -> None:
    """Fill in the codes and rows of the runs of `kept` that keep no row."""
    at = ((runs.kept < 0) & (runs.sizes > 0)).nonzero(as_tuple=True)
    if not len(at[0]):
        return
    starts, sizes = runs.starts[..., :-1][at].long(), runs.sizes[at]
    # Short runs are filled up with their last unit: it is encoded, and written, repeatedly.
    step = torch.arange(packed.scheme.group, device=index.device)
    place = starts[:, None] + torch.minimum(step, sizes[:, None] - 1)
    head = (at[0] * index.shape[1] + at[1])[:, None].expand(place.shape)
    slot = index.flatten(0, 1)[head, place]
    units, rows = encode_keys(packed.scheme, _decoded(packed, others, head, slot))
    for part, new in zip(kept.units, units, strict=True):
        part.flatten(0, 1)[head, place] = new
    for part, new in zip(kept.rows, rows, strict=True):
        part[at] = new


def select_values(packed: PackedValues, others: Tensor, index: Tensor) -> PackedValues:
    """Pack the values at `index`, and no others; arguments as for keys."""
    units = _gathered(packed.units, index.clamp(max=packed.count - 1))
    new_at = (index >= packed.count).nonzero(as_tuple=True)
    if len(new_at[0]):
        x = others[new_at[0], new_at[1], index[new_at] - packed.count]
        for part, new in zip(units, encode_values(packed.scheme, x), strict=True):
            part[new_at] = new
    outliers = _outliers(packed, others, index)
    return PackedValues(packed.scheme, packed.head_size, units, outliers)


def fetch(packed: PackedKeys | PackedValues | None, others: Tensor, index: Tensor) -> Tensor:
    """The units at `index` [B, H, K] in full precision, [B, H, K, D] like `others`.

    Args:
        packed: P units, or None for P = 0.
        others: [B, H, r, D], the units after them.
    """
    if packed is None:
        return _gathered((others,), index)[0]
    heads = torch.arange(index.shape[0] * index.shape[1], device=index.device)
    head = heads.view(*index.shape[:2], 1).expand(index.shape)
    return _decoded(packed, others, head, index).to(others.dtype)


def _decoded(
    packed: PackedKeys | PackedValues, others: Tensor, head: Tensor, slot: Tensor
) -> Tensor:
    """float32 [..., D]: the units at `slot` [...] of the flattened B * H heads `head` [...]."""
    # Both for every unit: to ask which ones are packed would be to wait for the device.
    old = packed.at(head, slot.clamp(max=packed.count - 1))
    if not others.shape[2]:
        return old
    new = others.flatten(0, 1)[head, (slot - packed.count).clamp(min=0)].float()
    return torch.where((slot < packed.count)[..., None], old, new)


def _gathered(parts: Parts, index: Tensor) -> Parts:
    return tuple(
        part.gather(2, index[..., None].expand(*index.shape, part.shape[-1])) for part in parts
    )


def _outliers(packed: PackedKeys | PackedValues, others: Tensor, index: Tensor) -> Outliers | None:
    found = outliers_of(packed.scheme, others)
    if packed.outliers is None or found is None:
        return None
    return packed.outliers.join(found).select(index)
