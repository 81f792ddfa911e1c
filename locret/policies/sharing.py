"""The highest scores of several heads or layers together, for policies that let them share.

B batch, H KV heads, S units; scores are -inf where a slot is empty.
"""

from collections.abc import Sequence

import torch
from torch import Tensor


def highest(scores: Tensor, count: Tensor) -> Tensor:
    """Which of `scores` [N, S] are among the `count` [N] highest of their row, bool [N, S]."""
    order = scores.argsort(dim=-1, descending=True, stable=True)
    first = torch.arange(scores.shape[-1], device=scores.device) < count[:, None]
    return torch.zeros_like(first).scatter_(-1, order, first)


def raised(scores: Tensor, safe: Tensor) -> Tensor:
    """Scores [B, H, S] that are +inf for each head's `safe` [B, H] highest."""
    among = highest(scores.flatten(0, 1), safe.flatten()).view_as(scores)
    return scores.masked_fill(among & (scores > -torch.inf), torch.inf)


def highest_of_all(scores: Sequence[Tensor], total: Tensor) -> list[Tensor]:
    """Which slots are among the `total` [B] highest of a row's layers, empty ones last: bool
    [B, H, S] for each of the layers' `scores`, which may be on several devices."""
    device = scores[0].device
    flat = torch.cat([layer.flatten(1).to(device) for layer in scores], dim=1)
    chosen = highest(flat, total).split([layer[0].numel() for layer in scores], dim=1)
    return [
        mine.view(layer.shape).to(layer.device) for mine, layer in zip(chosen, scores, strict=True)
    ]
