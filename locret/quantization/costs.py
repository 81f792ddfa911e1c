"""Bytes: what a scheme takes a unit, how many blocks a sequence may have, how many units fit.

The published figure of a scheme is the cost of full blocks: 4-bit KIVI at group 64 takes 0.28125 of
16-bit bytes. Residual units and thin blocks cost more; together they get `OVERHEAD` of that figure
while chunks are read, and thin blocks less where what was read is to be `tight`.
Outliers depend on the data and are not counted here; `nbytes` of what is packed counts them.
"""

from bisect import bisect_right
from dataclasses import dataclass
from functools import lru_cache

import torch

from locret.quantization.base import Scheme

OVERHEAD = 1 / 16
"""What residual units and thin blocks may add, next to packed units in full blocks."""

FEWEST_BLOCKS = 1.25
"""Blocks that a sequence may have at least, next to full ones: a margin below that would have units
packed anew at nearly every eviction. A tight one may have no more."""


@dataclass(frozen=True)
class Costs:
    """Bytes, of keys and values of one sequence (the units of a row and KV head).

    Attributes:
        unit: what a packed unit takes by itself.
        entry: a block's entries of the key tables, with its start.
        full: a unit in full precision.
        group: units of a full block.
    """

    unit: int
    entry: int
    full: int
    group: int

    @property
    def packed(self) -> float:
        """A packed unit in a full block."""
        return self.unit + self.entry / self.group


@lru_cache
def costs_of(scheme: Scheme, head_size: int, element_size: int = 2) -> Costs:
    """What `scheme` costs at head size `head_size`; `element_size` bytes in full precision."""
    full = 2 * head_size * element_size
    if not scheme.packs:
        return Costs(full, 0, full, scheme.group)
    x = torch.zeros(scheme.group, head_size)
    keys, tables = scheme.encode_keys(x, None)
    units = (*keys, *scheme.encode_values(x, None))
    entry = sum(tensor.nbytes for tensor in tables) + torch.int32.itemsize
    return Costs(sum(tensor[0].nbytes for tensor in units), entry, full, scheme.group)


def block_limit(costs: Costs, packed: int, residual: int, tight: bool = False) -> int:
    """Most blocks of a sequence of `packed` units in blocks and `residual` in full precision."""
    fewest = -(-packed // costs.group)
    if tight:
        return int(FEWEST_BLOCKS * fewest)
    allowed = (1 + OVERHEAD) * costs.packed * (packed + residual)
    most = (allowed - residual * costs.full - packed * costs.unit) // costs.entry
    return max(int(most) - 1, int(FEWEST_BLOCKS * fewest), fewest)  # one start more than blocks


def most_bytes(
    scheme: Scheme, units: int, head_size: int, element_size: int = 2, tight: bool = False
) -> int:
    """Most bytes of a sequence of `units` units after an eviction, or once its context is `tight`
    (`locret.cache.context`); outliers not counted."""
    costs = costs_of(scheme, head_size, element_size)
    residual = min(scheme.residual, units)
    packed = units - residual
    if not scheme.packs or not packed:
        return units * costs.full
    of_blocks = block_limit(costs, packed, residual, tight) * costs.entry
    one_more = torch.int32.itemsize if tight else costs.entry
    return packed * costs.unit + of_blocks + one_more + residual * costs.full


def most_bytes_shared(
    scheme: Scheme,
    units: int,
    sequences: int,
    head_size: int,
    element_size: int = 2,
    tight: bool = False,
) -> int:
    """As `most_bytes`, of sequences together that have so many units, whichever has how many."""
    costs = costs_of(scheme, head_size, element_size)
    residual = min(scheme.residual * sequences, units) if scheme.packs else units
    packed = units - residual
    if not scheme.packs:
        return units * costs.full
    of_unit = FEWEST_BLOCKS / costs.group
    if not tight:
        of_unit = max(of_unit, ((1 + OVERHEAD) * costs.packed - costs.unit) / costs.entry)
    # A sequence's last block may be of one unit.
    thin = FEWEST_BLOCKS * (costs.group - 1) / costs.group
    blocks = int(of_unit * packed + thin * min(sequences, units))
    one_more = torch.int32.itemsize if tight else costs.entry
    return residual * costs.full + packed * costs.unit + blocks * costs.entry + sequences * one_more


def units_within(scheme: Scheme, nbytes: float, head_size: int, element_size: int = 2) -> int:
    """Most units that a sequence can have in `nbytes` bytes, however they were evicted."""
    costs = costs_of(scheme, head_size, element_size)
    most = int(nbytes // costs.unit) + 1
    return bisect_right(
        range(1, most + 1), nbytes, key=lambda n: most_bytes(scheme, n, head_size, element_size)
    )
