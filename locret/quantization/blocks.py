"""Which units of a head share an entry of the key tables. Pure functions of counts.

A block is up to `group` units that follow each other. Eviction thins blocks out; a unit keeps the
entry it was encoded with, so nothing is rounded again, but thin blocks cost more bytes a unit. When
a head has more blocks than it may have, stretches of `STRETCH` blocks are packed anew, those first
that save an entry at the fewest units touched. So a unit is packed anew about once each time its
block halves, not at every eviction. All other blocks stay as they are.

B batch, H KV heads, G blocks (some may be empty), P units.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

STRETCH = 4
"""Blocks that are packed anew together. Four thin ones mostly fit in three; more touch more
units."""


@dataclass(frozen=True)
class Blocks:
    """
    Attributes:
        sizes: long [B, H, G], units of each block; empty blocks come last.
        kept: long [B, H, G], the former block whose entry a block keeps; -1 = it must be encoded.
    """

    sizes: Tensor
    kept: Tensor

    @property
    def starts(self) -> Tensor:
        """int32 [B, H, G + 1]: block i is the units `starts[i] <= u < starts[i + 1]`."""
        return pad(self.sizes.cumsum(-1), (1, 0)).int()


def aligned(units: Tensor, group: int, blocks: int) -> Tensor:
    """Sizes [..., blocks] of full blocks, then one of what is left, for `units` [...] units."""
    before = torch.arange(blocks, device=units.device) * group
    return (units[..., None] - before).clamp(0, group)


def owners_at(starts: Tensor, unit: Tensor) -> Tensor:
    """The block of each unit `unit` [...] (long), both counted through all B * H heads."""
    ends = starts[..., 1:].flatten(0, -2)
    before = torch.arange(len(ends), device=ends.device)[:, None] * starts[0, 0, -1]
    return torch.searchsorted((ends + before).flatten(), unit, right=True)


def arrange(survivors: Tensor, fresh: Tensor, most: int, group: int, limit: int) -> Blocks:
    """The blocks after an eviction.

    Args:
        survivors: long [B, H, G], units left of each former block.
        fresh: long [B, H], units that come after them and are in no block yet.
        most: as many as `fresh` holds at most, known without asking the device.
        group: most units of a block.
        limit: most blocks of a head, enough for all its units in full blocks.

    Returns:
        Blocks over survivors and fresh units together, at most `limit` that are not empty.
    """
    new = aligned(fresh, group, -(-most // group))
    former = torch.arange(survivors.shape[-1], device=fresh.device).expand(survivors.shape)
    blocks = _trimmed(
        Blocks(torch.cat([survivors, new], -1), pad(former, (0, new.shape[-1]), value=-1))
    )
    return _trimmed(_repacked(blocks, group, limit)) if blocks.sizes.shape[-1] > limit else blocks


def _trimmed(blocks: Blocks) -> Blocks:
    """The same without the empty blocks that all heads have."""
    empty = blocks.sizes == 0
    order = empty.int().argsort(dim=-1, stable=True)[..., : int((~empty).sum(-1).max())]
    return Blocks(blocks.sizes.gather(-1, order), blocks.kept.gather(-1, order))


def _repacked(blocks: Blocks, group: int, limit: int) -> Blocks:
    """The same with stretches packed anew, in the heads that have more than `limit` blocks."""
    short = -blocks.sizes.shape[-1] % STRETCH
    sizes = pad(blocks.sizes, (0, short)).unflatten(-1, (-1, STRETCH))
    kept = pad(blocks.kept, (0, short), value=-1).unflatten(-1, (-1, STRETCH))
    units, filled = sizes.sum(-1), (sizes > 0).sum(-1)
    excess = filled.sum(-1) - limit
    saved = filled - (units + group - 1) // group
    picked = _cheapest(units, saved, excess)
    enough = (saved * picked).sum(-1) >= excess
    sizes = torch.where(picked[..., None], aligned(units, group, STRETCH), sizes)
    kept = kept.masked_fill(picked[..., None], -1)
    whole = aligned(units.sum(-1), group, sizes.shape[-1] * sizes.shape[-2])
    return Blocks(
        torch.where(enough[..., None], sizes.flatten(-2), whole),
        kept.flatten(-2).masked_fill(~enough[..., None], -1),
    )


def _cheapest(units: Tensor, saved: Tensor, excess: Tensor) -> Tensor:
    """Which stretches to pack anew, bool [B, H, stretches], to save `excess` [B, H] blocks."""
    cost = torch.where(saved > 0, units / saved.clamp(min=1), torch.inf)
    order = cost.argsort(-1)
    ordered = saved.gather(-1, order)
    chosen = (ordered.cumsum(-1) - ordered < excess[..., None]) & (ordered > 0)
    return torch.zeros_like(chosen).scatter(-1, order, chosen)
