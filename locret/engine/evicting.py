"""An eviction of one layer: which units stay, and what becomes of the others.

B batch, H KV heads, S units held and new, K units that stay.
"""

from typing import NamedTuple

from torch import Tensor

from locret.cache.cache import Eviction
from locret.cache.layer import RetainedLayer
from locret.cache.merging import merge_evicted
from locret.cache.units import NewUnits, Units
from locret.policies.selection import keep_highest, with_protected


class Kept(NamedTuple):
    """Indices [B, H, K] long, ascending; how many leading ones of a head are fillers, [B, H] long,
    None = those that were empty before, as far as they are still there."""

    units: Tensor
    empty: Tensor | None


def highest(
    scores: Tensor, budget: int, protected: tuple[int, int], empty: Tensor | None
) -> Tensor:
    """Indices [B, H, budget] where every head keeps as many."""
    if empty is None:
        return keep_highest(scores, budget, *protected)
    return keep_highest(with_protected(scores, *protected, empty), budget)


def evict(
    layer: RetainedLayer, kept: Kept, eviction: Eviction, new: NewUnits | None = None
) -> None:
    """Hold what is kept of the units held and the `new` ones."""
    layer.recall_evicted(*kept, new)
    units, merged = layer.units, None
    count = layer.held - kept.units.shape[2] + (new.keys.shape[2] if new else 0)
    if eviction.merging is not None and isinstance(units, Units):
        fillers = kept.empty
        if fillers is None and layer.empty is not None:
            fillers = (layer.empty - count).clamp(min=0)
        merged = merge_evicted(
            units.mergeable(new),
            kept.units,
            eviction.merging,
            empty=layer.empty,
            fillers=fillers,
            query=eviction.query,
        )
    if new is None:
        units.select(kept.units)
    else:
        units.append_selected(new, kept.units)
    if merged is not None:
        units.replace_merged(merged)  # type: ignore[union-attr]
    layer.note_evicted(count, kept.empty)
