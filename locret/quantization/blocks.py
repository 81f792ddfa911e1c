"""Which units of a sequence share an entry of the key tables. Pure functions of counts.

A block is up to `group` units that follow each other in one sequence (the units of one row and KV
head). Eviction thins blocks out; a unit keeps the entry it was encoded with, so nothing is rounded
again, but thin blocks cost more bytes a unit. When a sequence has more blocks than it may have,
stretches of `STRETCH` blocks are packed anew, those first that save an entry at the fewest units
touched. So a unit is packed anew about once each time its block halves, not at every eviction. All
other blocks stay as they are.

Sequences and blocks are flat, one after the other: Q sequences, M blocks. No block is empty.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

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


def aligned(units: Tensor, group: int) -> tuple[Tensor, Tensor]:
    """Full blocks and then one of what is left, of each of R stretches of units.

    Args:
        units: long [R], of each stretch.

    Returns:
        Sizes of the blocks, long, and the stretch of each.
    """
    count = (units + group - 1) // group
    stretch = torch.repeat_interleave(count)
    place = torch.arange(len(stretch), device=units.device) - _before(count)[stretch]
    return (units[stretch] - place * group).clamp(max=group), stretch


def arrange(
    survivors: Tensor, sequence: Tensor, fresh: Tensor, limits: Tensor, group: int
) -> Blocks:
    """The blocks after an eviction.

    How many blocks there are depends on what the arguments hold, so a device would be waited for
    at every line: they are best on the host.

    Args:
        survivors: long [M], units left of each former block.
        sequence: long [M], the sequence of each former block, ascending.
        fresh: long [Q], units of each sequence that come after them and are in no block yet.
        limits: long [Q], most blocks of each sequence, enough for all its units in full blocks.
        group: most units of a block.

    Returns:
        Blocks over survivors and fresh units together, in each sequence at most its limit.
    """
    left = survivors.nonzero()[:, 0]
    sizes, of = aligned(fresh, group)
    blocks, sequence = _in_order(
        (Blocks(survivors[left], left), sequence[left]),
        (Blocks(sizes, torch.full_like(sizes, FRESH)), of),
    )
    counts = _sums(torch.ones_like(sequence), sequence, len(limits))
    if not bool((counts > limits).any()):
        return blocks
    return _repacked(blocks, sequence, counts, limits, group)


def _repacked(
    blocks: Blocks, sequence: Tensor, counts: Tensor, limits: Tensor, group: int
) -> Blocks:
    """The same with stretches packed anew, in the sequences that have more blocks than they may.

    Args:
        sequence: long [M], the sequence of each block.
        counts: long [Q], blocks of each sequence.
    """
    stretches = (counts + STRETCH - 1) // STRETCH
    owner, first = torch.repeat_interleave(stretches), _before(stretches)[sequence]
    place = torch.arange(len(sequence), device=sequence.device) - _before(counts)[sequence]
    stretch = first + place // STRETCH
    units = _sums(blocks.sizes, stretch, len(owner))
    saved = _sums(torch.ones_like(stretch), stretch, len(owner)) - (units + group - 1) // group
    picked = _cheapest(units, saved, owner, counts - limits)
    few = _sums(saved * picked, owner, len(limits)) < counts - limits
    # Where stretches of neighbours do not save enough, the whole sequence is one stretch.
    stretch = torch.where(few[sequence], first, stretch)
    picked = picked | few[owner]
    units = _sums(blocks.sizes, stretch, len(owner))
    stays = ~picked[stretch]
    sizes, of = aligned(units * picked, group)
    return _in_order(
        (Blocks(blocks.sizes[stays], blocks.kept[stays]), stretch[stays]),
        (Blocks(sizes, torch.full_like(sizes, REPACKED)), of),
    )[0]


def _cheapest(units: Tensor, saved: Tensor, owner: Tensor, excess: Tensor) -> Tensor:
    """Which stretches to pack anew to save `excess` [Q] blocks, bool like `units`, `saved` and the
    sequence of each, `owner`."""
    cost = torch.where(saved > 0, units / saved.clamp(min=1), torch.inf)
    order = cost.argsort(stable=True)
    order = order[owner[order].argsort(stable=True)]
    saved, owner = saved[order], owner[order]
    before = _before(saved) - _before(_sums(saved, owner, len(excess)))[owner]
    chosen = (before < excess[owner]) & (saved > 0)
    return torch.zeros_like(chosen).scatter(0, order, chosen)


def _in_order(one: tuple[Blocks, Tensor], other: tuple[Blocks, Tensor]) -> tuple[Blocks, Tensor]:
    """Both, sorted by the numbers that each comes with, which are ascending; `one` first where
    numbers are equal."""
    (blocks, at), (more, more_at) = one, other
    at, order = torch.cat([at, more_at]).sort(stable=True)
    sizes, kept = torch.cat([blocks.sizes, more.sizes]), torch.cat([blocks.kept, more.kept])
    return Blocks(sizes[order], kept[order]), at


def _before(counts: Tensor) -> Tensor:
    """The sum of all counts before each."""
    return counts.cumsum(0) - counts


def _sums(x: Tensor, at: Tensor, count: int) -> Tensor:
    """[count]: sums of the `x` at each index."""
    return x.new_zeros(count).index_add_(0, at, x)
