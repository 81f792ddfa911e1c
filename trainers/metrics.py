"""How well predicted scores pick the units that matter."""

import torch
from torch import Tensor
from torchmetrics import Metric


class _MeanOverHeads(Metric):
    """Mean over updates, batch rows and heads of `value(predictions, targets)`, [B, H] each."""

    higher_is_better = True

    def __init__(self) -> None:
        super().__init__()
        self.add_state("total", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("count", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, predictions: Tensor, targets: Tensor) -> None:
        """Add scores and labels, both [B, H, P]."""
        values = self.value(predictions, targets)
        self.total += values.double().sum()
        self.count += values.numel()

    def compute(self) -> Tensor:
        return (self.total / self.count).float()

    def value(self, predictions: Tensor, targets: Tensor) -> Tensor:
        raise NotImplementedError


class TopOverlap(_MeanOverHeads):
    """Share of the truly highest units that are among the predicted highest, 0 to 1.

    Top-k recall at a budget of `fraction` of the units. A random prediction gets `fraction`.

    Args:
        fraction: how many of the units count as highest.
    """

    def __init__(self, fraction: float = 0.1) -> None:
        super().__init__()
        if not 0 < fraction <= 1:
            raise ValueError(f"fraction is {fraction}; expected a number above 0 and at most 1")
        self.fraction = fraction

    def value(self, predictions: Tensor, targets: Tensor) -> Tensor:
        return top_overlap(predictions, targets, self.fraction)


class RankCorrelation(_MeanOverHeads):
    """Spearman's correlation of predicted and true scores over the units of a head, -1 to 1.

    Equal scores are ranked in the order in which they stand.
    """

    def value(self, predictions: Tensor, targets: Tensor) -> Tensor:
        ranks = [_ranks(x) for x in (predictions, targets)]
        centred = [x - x.mean(dim=-1, keepdim=True) for x in ranks]
        norms = centred[0].norm(dim=-1) * centred[1].norm(dim=-1)
        return (centred[0] * centred[1]).sum(dim=-1) / norms.clamp_min(1e-12)


def top_overlap(predictions: Tensor, targets: Tensor, fraction: float) -> Tensor:
    """Share of the truly highest `fraction` of units that are among the predicted highest.

    Scores and labels [..., P] -> [...].
    """
    top = max(1, round(fraction * targets.shape[-1]))
    return (_top_mask(predictions, top) & _top_mask(targets, top)).sum(dim=-1) / top


def _top_mask(scores: Tensor, top: int) -> Tensor:
    indices = scores.topk(top, dim=-1, sorted=False).indices
    return torch.zeros_like(scores, dtype=torch.bool).scatter_(-1, indices, True)


def _ranks(scores: Tensor) -> Tensor:
    order = scores.argsort(dim=-1, stable=True)
    ranks = torch.arange(scores.shape[-1], device=scores.device, dtype=torch.float64)
    return torch.zeros_like(scores, dtype=torch.float64).scatter_(
        -1, order, ranks.expand_as(scores)
    )
