"""Figures of a training step: which steps' are looked at, and their means over processes."""

from collections.abc import Mapping

import torch
from lightning.pytorch import Trainer
from torch import Tensor

from trainers.averaging import average


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
