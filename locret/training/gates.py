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
    best_first = _compared(scores, quotas).sort(dim=-1, descending=True).values
    kept = _kept(scores, compression, quotas)
    last = best_first.shape[-1] - 1
    # The middle of the last score that is kept and the first that is not.
    middle = (best_first.gather(-1, kept - 1) + best_first.gather(-1, kept.clamp(max=last))) / 2
    return middle.masked_fill(kept > last, -torch.inf)


def log_mask(scores: Tensor, compression: float, quotas: Quotas | None = None) -> Tensor:
    """Logarithms of gates that are as cold as can be: 0 where a unit stays, `FLOOR` elsewhere, like
    the scores. Of equal scores the first stay: the same tokens have the same in a first layer.

    Args: as of `thresholds_for`.
    """
    compared = _compared(scores, quotas)
    place = compared.argsort(dim=-1, descending=True, stable=True).argsort(dim=-1)
    gone = place >= _kept(scores, compression, quotas)
    return torch.zeros_like(compared).masked_fill(gone, FLOOR).view_as(scores)


def _compared(scores: Tensor, quotas: Quotas | None) -> Tensor:
    """Scores with those of which the best stay along the last axis: a head's, or all, [1, 1, *]."""
    return scores.reshape(1, 1, -1) if quotas is None else scores


def _kept(scores: Tensor, compression: float, quotas: Quotas | None) -> Tensor:
    """How many of them stay, [1, 1, 1] or [L, H, 1]."""
    if quotas is None:
        kept = max(1, round(scores.numel() / compression))
        return torch.tensor([[[kept]]], device=scores.device)
    units = scores.shape[-1]
    budget = max(1, round(units / compression))
    counts = unit_counts(quotas.at(compression), budget, units)
    return torch.tensor(counts, device=scores.device)[..., None]


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
