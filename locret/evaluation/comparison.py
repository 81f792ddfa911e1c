"""Scores of a slice of a table beside the committed ones: what counts as reproduced."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from locret.evaluation.bootstrap import RESAMPLES, interval

Scores = Mapping[str, Any]
"""`samples`, their ids, and `scores`, one each."""


@dataclass(frozen=True)
class Comparison:
    """A row of a table, again.

    Attributes:
        table, row: which.
        count: samples of the slice.
        committed: their mean in the file; again: their mean now.
        low, high: where the mean of so many samples may lie by the committed figures.
        equal: samples with the very same score.
    """

    table: str
    row: str
    count: int
    committed: float
    again: float
    low: float
    high: float
    equal: int

    @property
    def reproduced(self) -> bool:
        return self.low <= self.again <= self.high


def compare(table: str, row: str, pairs: Sequence[tuple[Scores, Scores]]) -> Comparison:
    """A row of a table, again.

    Args:
        pairs: for every task the committed scores, and those of the slice. Samples that were not
            committed are left out.

    Raises:
        ValueError: no sample of a task was committed.
    """
    same, now, draws = [], [], []
    equal = count = 0
    for seed, (old, new) in enumerate(pairs):
        by_sample = dict(zip(old["samples"], old["scores"], strict=True))
        asked = zip(new["samples"], new["scores"], strict=True)
        known = [(by_sample[sample], score) for sample, score in asked if sample in by_sample]
        if not known:
            raise ValueError(f"{table}, {row}: none of the samples asked is among those committed")
        count += len(known)
        same.append(sum(a for a, _ in known) / len(known))
        now.append(sum(b for _, b in known) / len(known))
        equal += sum(abs(a - b) < 1e-6 for a, b in known)
        draws.append(drawn_means(old["scores"], len(known), seed))
    low, high = interval(torch.stack(draws).mean(0))
    return Comparison(table, row, count, _mean(same), _mean(now), low, high, equal)


def drawn_means(scores: Sequence[float], count: int, seed: int = 0) -> torch.Tensor:
    """Means of `count` draws from the scores, [RESAMPLES] float64."""
    values = torch.tensor(scores, dtype=torch.float64)
    generator = torch.Generator().manual_seed(seed)
    return values[torch.randint(len(values), (RESAMPLES, count), generator=generator)].mean(1)


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def as_table(compared: Sequence[Comparison]) -> str:
    """A line a row, in per cent."""
    head = f"{'table':<24}{'row':<36}{'samples':>8}{'committed':>11}{'again':>8}{'allowed':>14}  "
    lines = [head.rstrip()]
    for one in compared:
        allowed = f"{100 * one.low:.1f}-{100 * one.high:.1f}"
        lines.append(
            f"{one.table:<24}{one.row:<36}{one.count:>8}{100 * one.committed:>11.1f}"
            f"{100 * one.again:>8.1f}{allowed:>14}  "
            + ("reproduced" if one.reproduced else "NOT reproduced")
            + f", {one.equal} of {one.count} alike"
        )
    return "\n".join(lines)
