"""Soft gates on units: what eviction does to a trunk, such that gradients reach the scores.

    gate = sigmoid((score - threshold) / temperature)

A score at its threshold has gate 1/2; far above it 1, the unit is kept; far below it 0, the unit is
gone. The colder, the fewer units are in between. Thresholds are such that so many scores are above
them as a cache of that compression would keep.

L layers with heads, H KV heads, P units of a trunk. Scores are [L, H, P]; higher = keep.
"""

from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from locret.heads.quotas import Quotas, unit_counts

Threshold = Literal["global", "quotas"]
"""One for all units of the model, or one a head, such that it keeps its quota."""

FLOOR = -20.0
"""Of a gate's logarithm: 2e-9 of the weight, and no infinity in any dtype."""


def thresholds_for(scores: Tensor, compression: float, quotas: Quotas | None = None) -> Tensor:
    """Between the scores of the units that stay and those of the others.

    Args:
        scores: without gradients.
        compression: 1 / so much of all units stays, at least one; 1 = all.
        quotas: how many units each head keeps; None = the best of all heads and layers.

    Returns:
        [1, 1, 1] or, with quotas, [L, H, 1]; -inf where all units stay.
    """
    if quotas is None:
        best_first = scores.flatten().sort(descending=True).values
        kept = max(1, round(best_first.numel() / compression))
        return _between(best_first, torch.tensor(kept, device=scores.device)).view(1, 1, 1)
    units = scores.shape[-1]
    budget = max(1, round(units / compression))
    counts = unit_counts(quotas.at(compression), budget, units)
    best_first = scores.sort(dim=-1, descending=True).values
    return _between(best_first, torch.tensor(counts, device=scores.device)[..., None])


def log_mask(scores: Tensor, thresholds: Tensor) -> Tensor:
    """Logarithms of gates that are as cold as can be: 0 where a unit stays, `FLOOR` elsewhere.

    Args:
        scores: without gradients.
        thresholds: as of `thresholds_for`.
    """
    return torch.zeros_like(scores).masked_fill(scores <= thresholds, FLOOR)


def _between(best_first: Tensor, kept: Tensor) -> Tensor:
    """The middle of the last score that is kept and the first that is not, along the last axis."""
    kept = kept if kept.dim() == best_first.dim() else kept.view(1)
    last = best_first.shape[-1] - 1
    middle = (best_first.gather(-1, kept - 1) + best_first.gather(-1, kept.clamp(max=last))) / 2
    return middle.masked_fill(kept > last, -torch.inf)


def log_gates(scores: Tensor, thresholds: Tensor, temperature: float) -> Tensor:
    """Logarithms of gates, from `FLOOR` to 0.

    The threshold follows the scores near it: how many units stay is given, so a change that lifts
    all scores of a threshold alike opens no gate, and its gradient is zero. Without this, what all
    heads have in common, to keep more, would hide in what they differ.

    Args:
        scores: with gradients.
        thresholds: as of `thresholds_for`.
        temperature: above 0, in the scores' unit.
    """
    with torch.no_grad():
        gates = ((scores - thresholds) / temperature).sigmoid()
        near = gates * (1 - gates)
        total = near.sum_to_size(thresholds.shape).clamp(min=torch.finfo(near.dtype).tiny)
    mean = (near / total * scores).sum_to_size(thresholds.shape)
    moving = thresholds + (mean - mean.detach())
    return logsigmoid((scores - moving) / temperature).clamp(min=FLOOR)
