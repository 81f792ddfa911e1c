"""What the modules of all trainings share: optimizer, figures, and what trained heads are.

A backbone is never registered with a module: Lightning neither flips its mode nor moves, optimizes
or saves it.
"""

import dataclasses
import math
from abc import abstractmethod
from collections.abc import Callable, Iterable, Mapping
from functools import cached_property
from random import Random
from typing import Any, ClassVar, Literal

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import LearningRateFinder
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.optim.lr_scheduler import LambdaLR
from torchmetrics import MeanMetric
from transformers import PreTrainedTokenizerBase, get_linear_schedule_with_warmup

from locret.heads.heads import RetainingHeads
from locret.heads.quotas import checked_sharpness
from locret.heads.targets import Loss, make_loss
from locret.model.backbone import Backbone
from locret.model.loading import load_tokenizer
from locret.training.segments import Segment
from trainers.distributed import average

SaveDtype = Literal["float32", "bfloat16", "float16"]
Schedule = Callable[[torch.optim.Optimizer, int, int], LambdaLR]
"""(optimizer, warm-up steps, all steps) -> learning rates, one an optimizer step."""


class TrainingModule(LightningModule):
    """Trains with AdamW, and logs figures that are means over processes.

    Of the hyperparameters `model`, `revision`, `lr`, `betas`, `weight_decay` and `warmup_steps` are
    used, and `compressions` where some are drawn.

    Attributes:
        figures: of the step, by name, if they are looked at.
    """

    schedule: ClassVar[Schedule] = staticmethod(get_linear_schedule_with_warmup)

    def __init__(self) -> None:
        super().__init__()
        self.figures: dict[str, Tensor] = {}

    @abstractmethod
    def trained(self) -> Iterable[nn.Parameter]:
        """The parameters that are trained."""

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The backbone's; the data module asks for it before the backbone is loaded."""
        return load_tokenizer(self.hparams["model"], revision=self.hparams["revision"])

    def configure_optimizers(self) -> Any:
        given = self.hparams
        # Not fused: Lightning clips none of those in mixed precision.
        optimizer = torch.optim.AdamW(
            self.trained(),
            lr=given["lr"],
            betas=tuple(given["betas"]),
            weight_decay=given["weight_decay"],
        )
        steps = int(self.trainer.estimated_stepping_batches)
        schedule = self.schedule(optimizer, given["warmup_steps"], steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def on_fit_start(self) -> None:
        """Start the schedule from `lr`, if a LearningRateFinder has changed it since the optimizer
        was made: the finder tells the optimizer, and a schedule would take it back."""
        trainer = self.trainer
        if not any(isinstance(callback, LearningRateFinder) for callback in trainer.callbacks):
            return
        for config in trainer.lr_scheduler_configs:
            schedule, groups = config.scheduler, config.scheduler.optimizer.param_groups
            schedule.base_lrs = [self.hparams["lr"]] * len(groups)
            for group, factor in zip(groups, schedule.lr_lambdas, strict=True):
                group["initial_lr"] = self.hparams["lr"]
                group["lr"] = group["initial_lr"] * factor(schedule.last_epoch)

    def log_step(self, figures: Mapping[str, Tensor], batch: Mapping[str, Any]) -> None:
        """Log a training step, if it is looked at: one collective, and no barrier, for all."""
        self.figures = {}
        if looked_at(self.trainer):
            values = torch.stack([value.detach().float() for value in figures.values()])
            if self.trainer.world_size > 1:
                average([values])
            names = [f"train/{name}" for name in figures]
            self.figures = dict(zip(names, values, strict=True))
        self.log_dict(self.figures, prog_bar=True, batch_size=len(batch["segments"]))

    def log_validation(self, figures: Mapping[str, Tensor], batch: Mapping[str, Any]) -> None:
        named = {f"val/{name}": value for name, value in figures.items()}
        self.log_dict(named, prog_bar=True, batch_size=len(batch["segments"]), sync_dist=True)

    def compressions(self, count: int, batch_idx: int | None) -> list[float]:
        """How much of each trunk is gone in a step, log-uniformly: what is drawn follows from the
        step alone, so that a training that goes on from a checkpoint draws what it would have
        drawn. Without a step, in validation, the middle."""
        least, most = self.hparams["compressions"]
        if batch_idx is None:
            return [math.sqrt(least * most)] * count
        where = f"{self.trainer.global_step} {batch_idx} {self.trainer.global_rank}"
        rng = Random(f"locret compressions {where}")
        return [least * (most / least) ** rng.random() for _ in range(count)]


class HeadsTraining(TrainingModule):
    """Trains heads on a frozen backbone. `save_dtype` is a hyperparameter, too.

    Args:
        loss, boundary_weight: of the loss on labels (`locret.heads.targets.LOSSES`).
        quota_contexts, quota_sharpness: by which quotas are measured at the end.

    Attributes:
        heads: in float32, once `configure_model` has made them.
        came_in: the dtype of heads that training starts from; they leave in it where `save_dtype`
            says none.
        longest_prompt: that heads were trained on, in tokens.

    Raises:
        ValueError: settings by which no quotas can be measured, or an unknown loss.
    """

    longest_prompt: Tensor
    came_in = torch.float32

    def __init__(
        self, loss: str, boundary_weight: float, quota_contexts: int, quota_sharpness: float
    ) -> None:
        super().__init__()
        if quota_contexts < 0:
            raise ValueError(f"quota_contexts is {quota_contexts}; expected 0 (none) or more")
        checked_sharpness(quota_sharpness)
        self.heads: RetainingHeads | None = None
        self.register_buffer("longest_prompt", torch.zeros((), dtype=torch.long))
        # One with a state is ours, so that checkpoints hold it.
        self.loss: Loss = make_loss(loss, boundary_weight)
        # DDP would write the first process's values over the others'; the largest prompt counts,
        # and thresholds are each process's own.
        ours = ["longest_prompt", "loss.thresholds", "loss.rows"]
        self._ddp_params_and_buffers_to_ignore = ours
        # Past nn.Module's bookkeeping, so that the backbone is no submodule.
        object.__setattr__(self, "backbone_model", None)

    @property
    def shards(self) -> DeviceMesh | None:
        """The processes over which the backbone is sharded; None if each has all of it."""
        return None

    @property
    @abstractmethod
    def backbone(self) -> Backbone:
        """The frozen backbone, where this process trains."""

    def trained(self) -> Iterable[nn.Parameter]:
        assert self.heads is not None
        return self.heads.parameters()

    def note_prompts(self, segments: list[Segment]) -> None:
        """Remember the longest prompt that heads were trained on."""
        longest = max(segment.last_prompt_end - segment.start for segment in segments)
        self.longest_prompt.clamp_(min=longest)

    def trained_heads(self) -> RetainingHeads:
        """The heads on the CPU in `save_dtype`, with the run's figures and longest prompt in their
        record."""
        assert self.heads is not None
        metrics = {name: float(value) for name, value in self.trainer.callback_metrics.items()}
        longest, name = int(self.longest_prompt), self.hparams["save_dtype"]
        config = dataclasses.replace(self.heads.config, trained_tokens=longest, metrics=metrics)
        dtype = self.came_in if name is None else getattr(torch, name)
        tensors = {name: t.to("cpu", dtype) for name, t in self.heads.state_dict().items()}
        return RetainingHeads.from_tensors(config, tensors)


def detached(result: object) -> dict[str, Tensor]:
    """The figures of what a step gave, by name."""
    found = vars(result).items()
    return {name: value.detach() for name, value in found if isinstance(value, Tensor)}


def looked_at(trainer: Trainer) -> bool:
    """Whether the trainer logs the step that is being taken, or it is the last one. The figures of
    the others are not worth their time."""
    step = trainer.global_step + 1
    last = trainer.estimated_stepping_batches
    return step % max(1, trainer.log_every_n_steps) == 0 or step == last


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
