"""Blocks: which units of a sequence share an entry of the key tables, and what all takes in bytes.

A block is up to `group` units that follow each other in one sequence (the units of one row and KV
head). Eviction thins blocks out; a unit keeps the entry it was encoded with, so nothing is rounded
again, but thin blocks cost more bytes a unit. When a sequence has more blocks than it may have,
stretches of `STRETCH` blocks are packed anew, those first that save an entry at the fewest units
touched. So a unit is packed anew about once each time its block halves, not at every eviction. All
other blocks stay as they are.

The published figure of a scheme is the cost of full blocks: 4-bit KIVI at group 64 takes 0.28125 of
16-bit bytes. Residual units and thin blocks cost more; together they get `OVERHEAD` of that figure
while chunks are read, and thin blocks less where what was read is to be `tight`. Outliers depend on
the data and are not counted here; `nbytes` of what is packed counts them.

Blocks are arranged on the host: how many there are depends on the counts, so that a device would be
waited for at every line. A GPU stands still meanwhile, and NumPy takes less than half of torch's
time here. Sequences and blocks are flat, one after the other: Q sequences, M blocks. No block is
empty.
"""

from bisect import bisect_right
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from numpy import ndarray as Array
from torch import Tensor
from torch.nn.functional import pad

from locret.quantization.base import Scheme

STRETCH = 4
"""Blocks that are packed anew together. Four thin ones mostly fit in three; more touch more
units."""

FRESH, REPACKED = -1, -2


@dataclass(frozen=True)
class Blocks:
    """Blocks in the order of their units.

    Attributes:
        sizes: long [M], units of each block.
        kept: long [M], the former block whose entry a block keeps. A block must be encoded where
            this is `FRESH`, its units were in no block before, or `REPACKED`, some were.
    """

    sizes: Tensor
    kept: Tensor

    @property
    def starts(self) -> Tensor:
        """int32 [M + 1]: block i is the units `starts[i] <= u < starts[i + 1]`."""
        return pad(self.sizes.cumsum(0), (1, 0)).int()

    def to(self, device: torch.device) -> "Blocks":
        """The same on `device`, which is not waited for."""
        return Blocks(*(x.to(device, non_blocking=True) for x in (self.sizes, self.kept)))


def arrange(
    survivors: Tensor, sequence: Tensor, fresh: Tensor, limits: Tensor, group: int
) -> Blocks:
    """The blocks after an eviction. All tensors are on the host.

    Args:
        survivors: long [M], units left of each former block.
        sequence: long [M], the sequence of each former block, ascending.
        fresh: long [Q], units of each sequence that come after them and are in no block yet.
        limits: long [Q], most blocks of each sequence, enough for all its units in full blocks.
        group: most units of a block.

    Returns:
        Blocks over survivors and fresh units together, in each sequence at most its limit.
    """
    were, owner, most = survivors.numpy(), sequence.numpy(), limits.numpy()
    left = np.flatnonzero(were)
    sizes, of = _aligned(fresh.numpy(), group)
    sizes, kept, owner = _in_order(
        (were[left], left, owner[left]), (sizes, np.full_like(sizes, FRESH), of)
    )
    counts = np.bincount(owner, minlength=len(most))
    if (counts > most).any():
        sizes, kept, _ = _repacked(sizes, kept, owner, counts, most, group)
    return Blocks(torch.from_numpy(sizes), torch.from_numpy(kept))


def _aligned(units: Array, group: int) -> tuple[Array, Array]:
    """Sizes of full blocks and one of what is left, of each of R stretches of `units` [R]; and the
    stretch of each block."""
    count = (units + group - 1) // group
    stretch = np.repeat(np.arange(len(units)), count)
    place = np.arange(len(stretch)) - _before(count)[stretch]
    return np.minimum(units[stretch] - place * group, group), stretch


def _repacked(
    sizes: Array, kept: Array, sequence: Array, counts: Array, limits: Array, group: int
) -> tuple[Array, Array, Array]:
    """Blocks with stretches packed anew, in the sequences that have more blocks than they may.

    Args:
        sizes, kept: [M], of `Blocks`.
        sequence: [M], the sequence of each block.
        counts, limits: [Q], blocks of each sequence, and most of them.
    """
    stretches = (counts + STRETCH - 1) // STRETCH
    owner, first = np.repeat(np.arange(len(counts)), stretches), _before(stretches)[sequence]
    place = np.arange(len(sequence)) - _before(counts)[sequence]
    stretch = first + place // STRETCH
    units = _sums(sizes, stretch, len(owner))
    saved = np.bincount(stretch, minlength=len(owner)) - (units + group - 1) // group
    picked = _cheapest(units, saved, owner, counts - limits)
    few = _sums(saved * picked, owner, len(limits)) < counts - limits
    # Where stretches of neighbours do not save enough, the whole sequence is one stretch.
    stretch = np.where(few[sequence], first, stretch)
    picked |= few[owner]
    units = _sums(sizes, stretch, len(owner))
    stays = ~picked[stretch]
    new, of = _aligned(units * picked, group)
    return _in_order(
        (sizes[stays], kept[stays], stretch[stays]), (new, np.full_like(new, REPACKED), of)
    )


def _cheapest(units: Array, saved: Array, owner: Array, excess: Array) -> Array:
    """Which stretches to pack anew to save `excess` [Q] blocks, bool like `units`, `saved` and the
    sequence of each, `owner`."""
    cost = np.where(saved > 0, units / np.maximum(saved, 1), np.inf)
    order = np.lexsort((cost, owner))
    saved, owner = saved[order], owner[order]
    before = _before(saved) - _before(_sums(saved, owner, len(excess)))[owner]
    picked = np.zeros(len(units), bool)
    picked[order] = (before < excess[owner]) & (saved > 0)
    return picked


def _in_order(
    one: tuple[Array, Array, Array], other: tuple[Array, Array, Array]
) -> tuple[Array, Array, Array]:
    """Sizes, former blocks, and what both are sorted by, which is ascending in each; `one` first
    where it is equal."""
    joined = [np.concatenate(pair) for pair in zip(one, other, strict=True)]
    order = joined[2].argsort(kind="stable")
    return joined[0][order], joined[1][order], joined[2][order]


def _before(counts: Array) -> Array:
    """The sum of all counts before each."""
    return counts.cumsum() - counts


def _sums(x: Array, at: Array, count: int) -> Array:
    """[count]: sums of the `x` at each index; float64 holds them exactly."""
    return np.bincount(at, x, count).astype(np.int64)


# ---- bytes ---------------------------------------------------------------------------------------

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
