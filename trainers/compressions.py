"""How much of a trunk is gone: the compression that each sample of a step draws."""

import math
from collections.abc import Sequence
from random import Random

from lightning.pytorch import Trainer

Range = tuple[float, float]
"""The least and the most."""


def drawn(compressions: Range, trainer: Trainer, batch_idx: int, count: int) -> list[float]:
    """Compressions, log-uniformly, which follow from the step alone: so a training that goes on
    from a checkpoint draws what it would have drawn."""
    where = f"{trainer.global_step} {batch_idx} {trainer.global_rank}"
    rng, (least, most) = Random(f"locret compressions {where}"), compressions
    return [least * (most / least) ** rng.random() for _ in range(count)]


def middle(compressions: Sequence[float], count: int) -> list[float]:
    """What validation takes for every sample."""
    return [math.sqrt(math.prod(compressions))] * count
