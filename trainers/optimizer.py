"""AdamW with linear warm-up, as every training here uses it."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.callbacks import LearningRateFinder
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

Schedule = Callable[[torch.optim.Optimizer, int, int], LambdaLR]


def adamw(
    module: LightningModule, parameters: Iterable[nn.Parameter], schedule: Schedule
) -> dict[str, Any]:
    """What `configure_optimizers` returns.

    Args:
        module: its hyperparameters `lr`, `betas`, `weight_decay` and `warmup_steps` are used.
        parameters: what is trained.
        schedule: (optimizer, warm-up steps, all steps) -> learning rates, one an optimizer step.
    """
    given = module.hparams
    optimizer = torch.optim.AdamW(  # not fused: Lightning clips none of those in mixed precision
        parameters,
        lr=given["lr"],
        betas=tuple(given["betas"]),
        weight_decay=given["weight_decay"],
    )
    steps = int(module.trainer.estimated_stepping_batches)
    scheduler = schedule(optimizer, given["warmup_steps"], steps)
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


def restart_schedule(module: LightningModule) -> None:
    """Start the schedule from the module's `lr`, if a LearningRateFinder has changed it since the
    optimizer was made: the finder tells the optimizer, and a schedule would take it back."""
    trainer = module.trainer
    if not any(isinstance(callback, LearningRateFinder) for callback in trainer.callbacks):
        return
    for config in trainer.lr_scheduler_configs:
        schedule, groups = config.scheduler, config.scheduler.optimizer.param_groups
        schedule.base_lrs = [module.hparams["lr"]] * len(groups)
        for group, factor in zip(groups, schedule.lr_lambdas, strict=True):
            group["initial_lr"] = module.hparams["lr"]
            group["lr"] = group["initial_lr"] * factor(schedule.last_epoch)
