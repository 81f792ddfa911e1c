"""How well predicted scores pick the units that matter."""

import torch
from torch import Tensor
from torchmetrics import Metric


class TopOverlap(Metric):
    """Share of the truly highest units that are among the predicted highest, 0 to 1.

    Per batch row and head the top `fraction` of units by prediction and by label are compared; the
    mean over rows, heads and updates. A random prediction gets `fraction`.

    Args:
        fraction: how many of the units count as highest.
    """

    higher_is_better = True

    def __init__(self, fraction: float = 0.1) -> None:
        super().__init__()
        if not 0 < fraction <= 1:
            raise ValueError(f"fraction is {fraction}; expected a number above 0 and at most 1")
        self.fraction = fraction
        self.add_state("total", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("count", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, predictions: Tensor, targets: Tensor) -> None:
        """Add scores and labels, both [B, H, P]."""
        top = max(1, round(self.fraction * targets.shape[-1]))
        predicted = _top_mask(predictions, top)
        shared = (predicted & _top_mask(targets, top)).sum(dim=-1) / top
        self.total += shared.double().sum()
        self.count += shared.numel()

    def compute(self) -> Tensor:
        return (self.total / self.count).float()


def _top_mask(scores: Tensor, top: int) -> Tensor:
    indices = scores.topk(top, dim=-1, sorted=False).indices
    return torch.zeros_like(scores, dtype=torch.bool).scatter_(-1, indices, True)
