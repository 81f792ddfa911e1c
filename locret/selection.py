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
        scores = scores.clone()
        scores[..., size - protected_tail :] = torch.inf
        scores[..., :protected_head] = torch.inf
    return scores.topk(budget, dim=-1, sorted=False).indices.sort(dim=-1).values
