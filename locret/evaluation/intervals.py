"""95 % confidence intervals: by resampling, and of shares. Pure functions, seeded."""

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

RESAMPLES = 2000
LEVEL = 0.95
Z = 1.959964  # standard deviations of a normal distribution that hold 95 %


def resampled_means(
    values: Sequence[float], groups: Sequence[str] | None = None, seed: int = 0
) -> Tensor:
    """Means of resamples, [RESAMPLES] float64.

    Args:
        values: scores of samples.
        groups: samples of one group are drawn together: questions about one text are no
            independent draws. None = each sample is drawn on its own.
        seed: of the draws.
    """
    scores = torch.tensor(values, dtype=torch.float64)
    if groups is None:
        sums, sizes = scores, torch.ones_like(scores)
    else:
        order = {group: i for i, group in enumerate(dict.fromkeys(groups))}
        index = torch.tensor([order[group] for group in groups])
        sums = torch.zeros(len(order), dtype=torch.float64).index_add(0, index, scores)
        sizes = torch.bincount(index, minlength=len(order)).double()
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randint(len(sums), (RESAMPLES, len(sums)), generator=generator)
    return sums[drawn].sum(1) / sizes[drawn].sum(1)


def interval(means: Tensor) -> tuple[float, float]:
    """The middle `LEVEL` of resampled means."""
    tail = (1 - LEVEL) / 2
    low, high = torch.quantile(means, torch.tensor([tail, 1 - tail], dtype=means.dtype))
    return float(low), float(high)


def average_of_tasks(
    scores: Mapping[str, Sequence[float]], groups: Mapping[str, Sequence[str]] | None = None
) -> tuple[float, tuple[float, float]]:
    """Mean over tasks of their mean score, and its interval: samples are drawn within tasks."""
    means = [sum(values) / len(values) for values in scores.values()]
    draws = [
        resampled_means(values, groups[task] if groups else None, seed)
        for seed, (task, values) in enumerate(scores.items())
    ]
    return sum(means) / len(means), interval(torch.stack(draws).mean(0))


def wilson(found: int, count: int) -> tuple[float, float]:
    """95 % interval of a share (Wilson, 1927), which has a width at 0 and 1 too."""
    share, square = found / count, Z * Z
    middle = (share + square / (2 * count)) / (1 + square / count)
    half = math.sqrt(share * (1 - share) / count + square / (4 * count * count))
    half *= Z / (1 + square / count)
    return max(0.0, middle - half), min(1.0, middle + half)
