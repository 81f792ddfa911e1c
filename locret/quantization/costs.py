"""Bytes: what a scheme takes a unit, how many runs a head may have, how many units fit in memory.

The published figure of a scheme is the cost of full runs: 4-bit KIVI at group 64 takes 0.28125 of
16-bit bytes. Residual units and thin runs cost more; together they get `OVERHEAD` of that figure.
Outliers depend on the data and are not counted here; `nbytes` of what is packed counts them.
"""

from bisect import bisect_right
from dataclasses import dataclass
from functools import lru_cache

import torch

from locret.quantization.base import Scheme

OVERHEAD = 1 / 16
"""What residual units and thin runs may add, next to packed units in full runs."""

FEWEST_RUNS = 1.25
"""Runs that a head may have at least, next to full ones: a margin below that would have units
packed anew at nearly every eviction."""


@dataclass(frozen=True)
class Costs:
    """Bytes, of keys and values of one KV head.

    Attributes:
        unit: what a packed unit takes by itself.
        row: a run's row of the key tables, with its start.
        full: a unit in full precision.
        group: units of a full run.
    """

    unit: int
    row: int
    full: int
    group: int

    @property
    def packed(self) -> float:
        """A packed unit in a full run."""
        return self.unit + self.row / self.group


@lru_cache
def costs_of(scheme: Scheme, head_size: int, element_size: int = 2) -> Costs:
    """What `scheme` costs a KV head of size `head_size`; `element_size` bytes in full precision."""
    full = 2 * head_size * element_size
    if not scheme.packs:
        return Costs(full, 0, full, scheme.group)
    x = torch.zeros(scheme.group, head_size)
    units, rows = scheme.encode_keys(x, None)
    each = (*(part[0] for part in units), *(part[0] for part in scheme.encode_values(x, None)))
    start = torch.int32.itemsize
    return Costs(
        sum(part.nbytes for part in each),
        sum(part.nbytes for part in rows) + start,
        full,
        scheme.group,
    )


def run_limit(costs: Costs, packed: int, residual: int) -> int:
    """Most runs of a head with `packed` units in runs and `residual` ones in full precision."""
    fewest = -(-packed // costs.group)
    allowed = (1 + OVERHEAD) * costs.packed * (packed + residual)
    rows = (allowed - residual * costs.full - packed * costs.unit) // costs.row
    return max(int(rows) - 1, int(FEWEST_RUNS * fewest), fewest)  # one start more than runs


def most_bytes(scheme: Scheme, units: int, head_size: int, element_size: int = 2) -> int:
    """Most bytes of a KV head that holds `units` units after an eviction, outliers not counted."""
    costs = costs_of(scheme, head_size, element_size)
    residual = min(scheme.residual, units)
    packed = units - residual
    if not scheme.packs or not packed:
        return units * costs.full
    rows = run_limit(costs, packed, residual) + 1
    return packed * costs.unit + rows * costs.row + residual * costs.full


def units_within(scheme: Scheme, nbytes: float, head_size: int, element_size: int = 2) -> int:
    """Most units that a KV head can hold in `nbytes` bytes, however they were evicted."""
    costs = costs_of(scheme, head_size, element_size)
    most = int(nbytes // costs.unit) + 1
    return bisect_right(
        range(1, most + 1), nbytes, key=lambda n: most_bytes(scheme, n, head_size, element_size)
    )
