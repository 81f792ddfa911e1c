"""LightningModule that tunes trained heads through soft gates (`locret.training.gated`).

Like `HeadsModule` it is thin, and the backbone is not registered.
"""

import hashlib
import math
from functools import cached_property
from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor
from transformers import PreTrainedTokenizerBase, get_linear_schedule_with_warmup

from locret.heads.heads import RetainingHeads
from locret.heads.targets import make_loss
from locret.model.backbone import Backbone
from locret.model.loading import Dtype, load_model, load_tokenizer
from locret.quantities import check_bounds
from locret.quantization import scheme_of
from locret.training.divergence import MeanOver
from locret.training.gated import Gated, GatedLoss, Threshold, check_tunable
from trainers.compressions import drawn, middle
from trainers.figures import averaged, looked_at
from trainers.module import SaveDtype, as_exported
from trainers.optimizer import adamw, restart_schedule
from trainers.quotas import check_measuring

STARTED_FROM = "started_from"
"""Where a checkpoint tells which heads its training started from."""


class GatedModule(LightningModule):
    """Tunes heads by KL(full || gated) of the answers' tokens.

    Each sample draws a compression, log-uniformly; gates grow colder from step to step by the same
    factor. Validation takes the middle compression and the last temperature.

    Args:
        model: the backbone that the heads are for: a Hub id, a folder, or `embedded:smollm2`. An
            adapter that their record names is merged into it.
        heads: what `trainers.fit` made, or a Hub id: where the heads start from.
        compressions: the least and the most that a sample draws.
        temperatures: of the gates, at the first step and at the last.
        threshold: "global" or "quotas": which units stay (`locret.training.gated.GatedLoss`).
        mean_over: "tokens", "branches" or "both": what counts alike in the mean.
        quantization: how the trunk's keys and values are stored when branches see them, as of an
            engine: None, a name, or a mapping such as {name: rotated, bits: 3}.
        regression_weight: of the loss on labels; 0 takes none.
        loss: the loss on labels (`locret.heads.targets.LOSSES`).
        boundary_weight: of the boundary term of the loss "smooth_l1_boundary".
        lr: peak learning rate of AdamW.
        betas, weight_decay: of AdamW.
        warmup_steps: steps of linear warm-up; the rate then falls linearly to zero.
        recompute: layers keep their input alone for the backward pass.
        dtype: of the backbone; the heads train in float32.
        save_dtype: of the exported heads; None = as they came.
        attn_implementation: of the backbone: "sdpa" or "eager".
        revision: of the backbone on the Hub.
        quota_contexts: contexts of the training data by which head quotas are measured anew when
            training ends (`trainers.quotas`); 0 leaves those that the heads came with.
        quota_sharpness: power that shares are raised to; above 1 = more unequal than measured.

    Raises:
        ValueError: bounds in the wrong order or out of range.
    """

    shards = None
    """Backbones are whole here."""

    def __init__(
        self,
        model: str,
        heads: str,
        compressions: tuple[float, float] = (4.0, 32.0),
        temperatures: tuple[float, float] = (1.0, 0.2),
        threshold: Threshold = "global",
        mean_over: MeanOver = "tokens",
        quantization: str | dict[str, Any] | None = None,
        regression_weight: float = 0.1,
        loss: str = "smooth_l1",
        boundary_weight: float = 0.2,
        lr: float = 2e-4,
        betas: tuple[float, float] = (0.9, 0.95),
        weight_decay: float = 0.0,
        warmup_steps: int = 10,
        recompute: bool = True,
        dtype: Dtype = "auto",
        save_dtype: SaveDtype | None = None,
        attn_implementation: str = "sdpa",
        revision: str | None = None,
        quota_contexts: int = 60,
        quota_sharpness: float = 1.0,
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        check_bounds("compressions", compressions, 1)
        if not (min(temperatures) > 0 and max(temperatures) < math.inf):
            raise ValueError(f"temperatures is {list(temperatures)}; expected numbers above 0")
        check_measuring(quota_contexts, quota_sharpness)
        scheme_of(quantization)
        self.heads: RetainingHeads | None = None
        self.figures: dict[str, Tensor] = {}  # of the step, by name, if they are looked at
        self.register_buffer("longest_prompt", torch.zeros((), dtype=torch.long))
        self.loss = make_loss(loss, boundary_weight)  # one with a state is in checkpoints
        # DDP would write the first process's values over the others'.
        ours = ["longest_prompt", "loss.thresholds", "loss.rows"]
        self._ddp_params_and_buffers_to_ignore = ours
        self._gated: GatedLoss | None = None
        self._came_in = torch.float32
        self._start = ""
        # Past nn.Module's bookkeeping, so that the backbone is no submodule.
        object.__setattr__(self, "backbone_model", None)

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The backbone's; the data module asks for it before the backbone is loaded."""
        return load_tokenizer(self.hparams["model"], revision=self.hparams["revision"])

    def configure_model(self) -> None:
        """Load the heads and the backbone, once.

        Raises:
            ValueError: heads that cannot be tuned, or a strategy that shards models.
        """
        if self.heads is not None:
            return
        if self.device_mesh is not None:
            raise ValueError("heads are tuned on whole backbones: use --trainer.strategy ddp")
        given = self.hparams
        heads = RetainingHeads.from_pretrained(given["heads"])
        check_tunable(heads, given["threshold"])
        self._start = fingerprint(heads)
        loaded = load_model(
            given["model"],
            dtype=given["dtype"],
            device="cpu",
            revision=given["revision"],
            adapter=heads.config.adapter,
            attn_implementation=given["attn_implementation"],
        )
        object.__setattr__(self, "backbone_model", loaded.model.requires_grad_(False))
        self._came_in = next(heads.parameters()).dtype
        self.longest_prompt.fill_(heads.config.trained_tokens or 0)  # type: ignore[operator]
        self.heads = heads.float().requires_grad_(True)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint[STARTED_FROM] = self._start

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """
        Raises:
            ValueError: the checkpoint is of a training that started from other heads, such as an
                earlier one whose checkpoints went to the same folder.
        """
        if checkpoint.get(STARTED_FROM, self._start) != self._start:
            raise ValueError(
                f"the checkpoint is of a training that started from other heads than those in "
                f"{self.hparams['heads']}; remove it to tune these from their first step"
            )

    def on_fit_start(self) -> None:
        restart_schedule(self)

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        segments = batch["segments"]
        longest = max(segment.last_prompt_end - segment.start for segment in segments)
        self.longest_prompt.clamp_(min=longest)  # type: ignore[operator]
        compressions = drawn(self.hparams["compressions"], self.trainer, batch_idx, len(segments))
        result = self._loss()(batch["input_ids"], segments, compressions, self.temperature)
        figures = {f"train/{name}": value for name, value in _figures(result).items()}
        self.figures = averaged(figures, self.trainer) if looked_at(self.trainer) else {}
        self.log_dict(self.figures, prog_bar=True, batch_size=len(segments))
        return result.loss

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        segments = batch["segments"]
        compressions = middle(self.hparams["compressions"], len(segments))
        temperature = self.hparams["temperatures"][1]
        result = self._loss()(batch["input_ids"], segments, compressions, temperature)
        figures = {f"val/{name}": value for name, value in _figures(result).items()}
        self.log_dict(figures, prog_bar=True, batch_size=len(segments), sync_dist=True)

    def configure_optimizers(self) -> Any:
        assert self.heads is not None
        return adamw(self, self.heads.parameters(), get_linear_schedule_with_warmup)

    def trained_heads(self) -> RetainingHeads:
        """The heads in `save_dtype`, with the run's figures and longest prompt in their record."""
        assert self.heads is not None
        name = self.hparams["save_dtype"]
        dtype = self._came_in if name is None else getattr(torch, name)
        return as_exported(self, self.heads, int(self.longest_prompt), dtype)  # type: ignore[arg-type]

    @property
    def backbone(self) -> Backbone:
        """The frozen backbone, where this process trains."""
        return self._loss().backbone

    @property
    def temperature(self) -> float:
        """Of the gates at this step."""
        first, last = self.hparams["temperatures"]
        steps = self.trainer.estimated_stepping_batches
        # A training without an end does not grow colder.
        share = self.trainer.global_step / max(steps - 1, 1)
        return float(first * (last / first) ** min(share, 1.0))

    def _loss(self) -> GatedLoss:
        """Made at the first step, when the strategy has decided on which device we are."""
        if self._gated is None:
            self.backbone_model.to(self.device)
            assert self.heads is not None
            given = self.hparams
            names = ("threshold", "mean_over", "regression_weight", "quantization", "recompute")
            self._gated = GatedLoss(
                Backbone(self.backbone_model, self.heads.config.longrope),  # type: ignore[arg-type]
                self.heads,
                loss=self.loss,
                **{name: given[name] for name in names},
            )
        return self._gated


def fingerprint(heads: RetainingHeads) -> str:
    """Recognises heads by their weights."""
    digest = hashlib.sha256()
    for name, tensor in sorted(heads.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _figures(result: Gated) -> dict[str, Tensor]:
    return {
        "loss": result.loss.detach(),
        "divergence": result.divergence,
        "agreement": result.agreement,
        "regression": result.regression,
        "opened": result.opened,
    }
