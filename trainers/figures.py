"""The figures of a training: what is measured, at which steps, and the picture of a run."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from lightning.pytorch import Trainer
from torch import Tensor
from torchmetrics import MeanMetric

from trainers.distributed import average


class _MeanOverHeads(MeanMetric):
    """Mean over updates, batch rows and heads, in float64."""

    higher_is_better = True

    def __init__(self) -> None:
        super().__init__(nan_strategy="disable")  # a mean with a NaN is one
        self.set_dtype(torch.float64)


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

    def update(self, predictions: Tensor, targets: Tensor) -> None:
        """Add scores and labels, both [B, H, P]."""
        super().update(top_overlap(predictions, targets, self.fraction))


class RankCorrelation(_MeanOverHeads):
    """Spearman's correlation of predicted and true scores over the units of a head, -1 to 1.

    Equal scores are ranked in the order in which they stand.
    """

    def update(self, predictions: Tensor, targets: Tensor) -> None:
        """Add scores and labels, both [B, H, P]."""
        ranks = [_ranks(x) for x in (predictions, targets)]
        centred = [x - x.mean(dim=-1, keepdim=True) for x in ranks]
        norms = centred[0].norm(dim=-1) * centred[1].norm(dim=-1)
        super().update((centred[0] * centred[1]).sum(dim=-1) / norms.clamp_min(1e-12))


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


def looked_at(trainer: Trainer) -> bool:
    """Whether the trainer logs the step that is being taken, or it is the last one. The figures of
    the others are not worth their time."""
    step = trainer.global_step + 1
    last = trainer.estimated_stepping_batches
    return step % max(1, trainer.log_every_n_steps) == 0 or step == last


def averaged(figures: Mapping[str, Tensor], trainer: Trainer) -> dict[str, Tensor]:
    """The figures' means over all processes: one collective, and no barrier, for all of them."""
    values = torch.stack([value.detach().float() for value in figures.values()])
    if trainer.world_size > 1:
        average([values])
    return dict(zip(figures, values, strict=True))


def draw(path: Path, history: Mapping[str, Sequence[float]], layers: Sequence[float]) -> None:
    """Write a PNG.

    Args:
        path: where to.
        history: `step`, and the values of each metric at these steps.
        layers: the overlap of each layer at the end; empty = no such panel.
    """
    import matplotlib

    matplotlib.use("Agg")  # no display is needed, and none may be there
    from matplotlib import pyplot

    metrics = [name for name in history if name != "step"]
    panels = len(metrics) + bool(layers)
    figure, axes = pyplot.subplots(1, panels, figsize=(4 * panels, 3), squeeze=False)
    for axis, name in zip(axes[0], metrics, strict=False):
        axis.plot(history["step"], history[name], linewidth=0.8, alpha=0.4)
        axis.plot(history["step"], _smooth(history[name]), linewidth=1.5)
        axis.set(title=name, xlabel="step")
    if layers:
        axes[0][-1].bar(range(len(layers)), layers)
        axes[0][-1].set(title="top-10% overlap at the end", xlabel="layer", ylim=(0, 1))
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def _smooth(values: Sequence[float], weight: float = 0.95) -> list[float]:
    """Exponential moving average."""
    smooth: list[float] = []
    for value in values:
        smooth.append(value if not smooth else weight * smooth[-1] + (1 - weight) * value)
    return smooth
