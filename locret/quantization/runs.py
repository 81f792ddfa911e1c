"""Which units of a head share a row of the key tables. Pure functions of counts.

A run is up to `group` units that follow each other. Eviction thins runs out; a unit keeps the row
it was encoded with, so nothing is rounded again, but thin runs cost more bytes a unit. When a head
has more runs than it may have, stretches of `BLOCK` runs are packed anew, those first that save a
row at the fewest units touched. So a unit is packed anew about once each time its run halves, not
at every eviction. All other runs stay as they are.

B batch, H KV heads, G runs (some may be empty), P units.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

BLOCK = 4
"""Runs that are packed anew together. Four thin ones mostly fit in three; more touch more units."""


@dataclass(frozen=True)
class Runs:
    """
    Attributes:
        sizes: long [B, H, G], units of each run; empty runs come last.
        kept: long [B, H, G], the former run whose row a run keeps; -1 = it must be encoded.
    """

    sizes: Tensor
    kept: Tensor

    @property
    def starts(self) -> Tensor:
        """int32 [B, H, G + 1]: run i is the units `starts[i] <= u < starts[i + 1]`."""
        return pad(self.sizes.cumsum(-1), (1, 0)).int()


def aligned(units: Tensor, group: int, runs: int) -> Tensor:
    """Sizes [..., runs] of full runs, then one of what is left, for `units` [...] units."""
    before = torch.arange(runs, device=units.device) * group
    return (units[..., None] - before).clamp(0, group)


def owners(starts: Tensor, units: int) -> Tensor:
    """The run of each unit, long [B, H, units], from int32 starts [B, H, G + 1]."""
    unit = torch.arange(units, dtype=starts.dtype, device=starts.device)
    ends = starts[..., 1:].contiguous()
    return torch.searchsorted(ends, unit.expand(*ends.shape[:-1], -1).contiguous(), right=True)


def owners_at(starts: Tensor, unit: Tensor) -> Tensor:
    """The run of each unit `unit` [...] (long), both counted through all B * H heads."""
    ends = starts[..., 1:].flatten(0, -2)
    before = torch.arange(len(ends), device=ends.device)[:, None] * starts[0, 0, -1]
    return torch.searchsorted((ends + before).flatten(), unit, right=True)


def arrange(survivors: Tensor, fresh: Tensor, most: int, group: int, limit: int) -> Runs:
    """The runs after an eviction.

    Args:
        survivors: long [B, H, G], units left of each former run.
        fresh: long [B, H], units that come after them and are in no run yet.
        most: as many as `fresh` holds at most, known without asking the device.
        group: most units of a run.
        limit: most runs of a head, enough for all its units in full runs.

    Returns:
        Runs over survivors and fresh units together, at most `limit` that are not empty.
    """
    new = aligned(fresh, group, -(-most // group))
    former = torch.arange(survivors.shape[-1], device=fresh.device).expand(survivors.shape)
    runs = _trimmed(
        Runs(torch.cat([survivors, new], -1), pad(former, (0, new.shape[-1]), value=-1))
    )
    return _trimmed(_repacked(runs, group, limit)) if runs.sizes.shape[-1] > limit else runs


def _trimmed(runs: Runs) -> Runs:
    """The same without the empty runs that all heads have."""
    empty = runs.sizes == 0
    order = empty.int().argsort(dim=-1, stable=True)[..., : int((~empty).sum(-1).max())]
    return Runs(runs.sizes.gather(-1, order), runs.kept.gather(-1, order))


def _repacked(runs: Runs, group: int, limit: int) -> Runs:
    """The same with blocks of runs packed anew, in the heads that have more than `limit` runs."""
    short = -runs.sizes.shape[-1] % BLOCK
    sizes = pad(runs.sizes, (0, short)).unflatten(-1, (-1, BLOCK))
    kept = pad(runs.kept, (0, short), value=-1).unflatten(-1, (-1, BLOCK))
    units, filled = sizes.sum(-1), (sizes > 0).sum(-1)
    excess = filled.sum(-1) - limit
    saved = filled - (units + group - 1) // group
    picked = _cheapest(units, saved, excess)
    enough = (saved * picked).sum(-1) >= excess
    sizes = torch.where(picked[..., None], aligned(units, group, BLOCK), sizes)
    kept = kept.masked_fill(picked[..., None], -1)
    whole = aligned(units.sum(-1), group, sizes.shape[-1] * sizes.shape[-2])
    return Runs(
        torch.where(enough[..., None], sizes.flatten(-2), whole),
        kept.flatten(-2).masked_fill(~enough[..., None], -1),
    )


def _cheapest(units: Tensor, saved: Tensor, excess: Tensor) -> Tensor:
    """Which blocks to pack anew, bool [B, H, blocks]: `excess` [B, H] runs fewer, if they can."""
    cost = torch.where(saved > 0, units / saved.clamp(min=1), torch.inf)
    order = cost.argsort(-1)
    ordered = saved.gather(-1, order)
    chosen = (ordered.cumsum(-1) - ordered < excess[..., None]) & (ordered > 0)
    return torch.zeros_like(chosen).scatter(-1, order, chosen)
