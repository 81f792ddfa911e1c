"""What a cache really holds of one row of a batch."""

from typing import Any

from locret.cache.cache import RetainedCache


def held_of(cache: RetainedCache, row: int, rows: int) -> dict[str, Any]:
    """Units and bytes of one row.

    Returns:
        `units`: (mean, largest) number of units of a head, over layers; `bytes`: the row's share
        of the storage; `full_bytes`: its share of the keys and values of a full cache.
    """
    report = cache.report()
    units = [
        layer.slots - (0.0 if layer.empty is None else float(layer.empty[row].float().mean()))
        for layer in cache.layers
    ]
    return {
        "units": (round(sum(units) / len(units), 1), round(max(units))),
        "bytes": report["total_bytes"] // rows,
        "full_bytes": report["full_cache_bytes"] // rows,
    }


def bytes_without(cache: RetainedCache, rest: int, rows: int) -> int:
    """A row's share of the storage without that of the last `rest` units and without spare room:
    what a context takes, where question and answer are the rest."""
    total = 0.0
    for layer in cache.layers:
        slots = layer.slots + layer.units.spare
        total += layer.nbytes * max(layer.slots - rest, 0) / max(slots, 1)
    return round(total) // rows
