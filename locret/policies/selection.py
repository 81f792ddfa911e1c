"""Which units a full cache keeps. Pure functions of scores.

Paper section 3.3: after a chunk every KV head keeps its highest scores; the last units, the
stabilizers, are kept whatever they scored; kept units stay in order.
"""

import torch
from torch import Tensor

from locret.kernels import threshold_select


def keep_highest(
    scores: Tensor, budget: int, protected_tail: int = 0, protected_head: int = 0
) -> Tensor:
    """Indices of the units to keep, ascending in each head.

    Args:
        scores: [B, H, S]; higher = keep. Of equal scores, and equal tokens score alike in the first
            layer, those stay that `torch.topk` chooses, as in the released code; on a GPU, where
            its choice changes from call to call, the earliest.
        budget: units a head keeps, at least as many as are protected.
        protected_tail: how many of the last units are kept whatever they scored; they count
            towards the budget.
        protected_head: likewise, of the first units.

    Returns:
        Long [B, H, min(budget, S)].
    """
    assert min(protected_head, protected_tail) >= 0, (protected_head, protected_tail)
    assert protected_head + protected_tail <= budget, (protected_head, protected_tail, budget)
    size = scores.shape[-1]
    if size <= budget:
        return torch.arange(size, device=scores.device).expand(scores.shape)
    if scores.is_cuda:
        return threshold_select(scores, budget, protected_tail, protected_head)
    if protected_head or protected_tail:
        scores = with_protected(scores, protected_tail, protected_head)
    return scores.topk(budget, dim=-1, sorted=False).indices.sort(dim=-1).values


def keep_counts(scores: Tensor, counts: Tensor) -> tuple[Tensor, Tensor]:
    """Indices of each head's `counts` highest scores, where heads keep different numbers.

    Args:
        scores: [B, H, S]; higher = keep.
        counts: long [B, H], at most S.

    Returns:
        Indices, long [B, H, K], K the largest count, ascending and aligned at the end; and how many
        leading ones of each head are mere fillers, long [B, H].
    """
    size, most = scores.shape[-1], int(counts.max())
    order = scores.argsort(dim=-1, descending=True, stable=True)
    kept = torch.zeros_like(order, dtype=torch.bool)
    kept.scatter_(-1, order, torch.arange(size, device=scores.device) < counts[..., None])
    slot = torch.arange(size, device=scores.device).expand(scores.shape)
    aligned = slot.masked_fill(~kept, -1).sort(dim=-1).values[..., size - most :]
    return aligned.clamp(min=0), most - counts


def with_protected(
    scores: Tensor, protected_tail: int, protected_head: int, empty: Tensor | None = None
) -> Tensor:
    """Scores [B, H, S] that are +inf for the last and first units.

    `empty` [B, H] says how many leading slots hold nothing: those are -inf, and the first units
    come behind them; None = none.
    """
    scores = scores.clone()
    size = scores.shape[-1]
    scores[..., size - protected_tail :] = torch.inf
    if empty is None:
        scores[..., :protected_head] = torch.inf
        return scores
    slot = torch.arange(size, device=scores.device)
    scores = scores.masked_fill(slot < (empty + protected_head)[..., None], torch.inf)
    return scores.masked_fill(slot < empty[..., None], -torch.inf)
