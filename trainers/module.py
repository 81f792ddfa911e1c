"""LightningModule that trains retaining heads on a frozen backbone (paper section 3.2).

Thin: the loss, its gradients and the labels are `locret.distillation`'s. The backbone is held, not
registered: Lightning neither flips its mode nor moves, optimizes or saves it.
"""

import dataclasses
from functools import cached_property
from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor
from transformers import PreTrainedTokenizerBase, get_linear_schedule_with_warmup

from locret.backbone import Backbone
from locret.cache import Positions
from locret.distillation import Distillation, Distilled
from locret.heads import HeadsConfig, RetainingHeads
from locret.models import Dtype, load_model, load_tokenizer
from locret.rotary import LongRopeRule
from trainers.metrics import TopOverlap


class HeadsModule(LightningModule):
    """Trains retaining heads.

    Args:
        model: the backbone: a Hub id, a folder, or `embedded:smollm2`.
        width: hidden width of a head (the paper's d_R).
        label: label definition (`locret.targets.LABELS`).
        alpha: weight of the smoothness loss.
        lr: peak learning rate of AdamW.
        betas: of AdamW.
        weight_decay: of AdamW.
        warmup_steps: steps of linear warm-up; the rate then falls linearly to zero.
        positions: cache positions that the artifact recommends.
        longrope: LongRoPE rule in training and, recorded, in inference.
        dtype: of the backbone; the heads train in float32.
        attn_implementation: of the backbone: "sdpa" or "eager".
        revision: of the backbone on the Hub.
        budget, chunk_size, stabilizers, local_tokens: engine settings that the artifact recommends.
    """

    def __init__(
        self,
        model: str,
        width: int = 1024,
        label: str = "max_logit",
        alpha: float = 0.0025,
        lr: float = 5e-4,
        betas: tuple[float, float] = (0.9, 0.95),
        weight_decay: float = 0.01,
        warmup_steps: int = 2000,
        positions: Positions = "compact",
        longrope: LongRopeRule = "long",
        dtype: Dtype = "auto",
        attn_implementation: str = "sdpa",
        revision: str | None = None,
        budget: int = 16384,
        chunk_size: int = 3072,
        stabilizers: int = 2500,
        local_tokens: int = 100,
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.heads: RetainingHeads | None = None
        self.overlap = TopOverlap()
        self.register_buffer("longest_prompt", torch.zeros((), dtype=torch.long))
        self._distillation: Distillation | None = None
        # Past nn.Module's bookkeeping, so that the backbone is no submodule.
        object.__setattr__(self, "backbone_model", None)

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The backbone's; the data module asks for it before the backbone is loaded."""
        return load_tokenizer(self.hparams["model"], revision=self.hparams["revision"])

    def configure_model(self) -> None:
        """Load the backbone and make the heads, once."""
        if self.heads is not None:
            return
        given = self.hparams
        loaded = load_model(
            given["model"],
            dtype=given["dtype"],
            device="cpu",
            revision=given["revision"],
            attn_implementation=given["attn_implementation"],
        )
        model = loaded.model.requires_grad_(False)
        object.__setattr__(self, "backbone_model", model)
        config = HeadsConfig.for_geometry(
            Backbone(model).geometry,
            given["width"],
            backbone=loaded.name,
            backbone_revision=loaded.revision,
            model_type=model.config.model_type,
            label=given["label"],
            positions=given["positions"],
            longrope=given["longrope"],
            defaults={
                name: given[name]
                for name in ("budget", "chunk_size", "stabilizers", "local_tokens")
            },
        )
        self.heads = RetainingHeads(config)

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        result = self._step(batch)
        self._log(result, "train")
        return result.loss

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        self._log(self._step(batch), "val")

    def configure_optimizers(self) -> Any:
        given = self.hparams
        assert self.heads is not None
        optimizer = torch.optim.AdamW(
            self.heads.parameters(),
            lr=given["lr"],
            betas=tuple(given["betas"]),
            weight_decay=given["weight_decay"],
        )
        schedule = get_linear_schedule_with_warmup(
            optimizer, given["warmup_steps"], int(self.trainer.estimated_stepping_batches)
        )
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": schedule, "interval": "step"},
        }

    def trained_heads(self) -> RetainingHeads:
        """The heads with what this run adds to their record: figures and the longest prompt."""
        assert self.heads is not None
        metrics = {name: float(value) for name, value in self.trainer.callback_metrics.items()}
        self.heads.config = dataclasses.replace(
            self.heads.config,
            trained_tokens=int(self.longest_prompt),  # type: ignore[arg-type]
            metrics=metrics,
        )
        return self.heads

    def _step(self, batch: dict[str, Tensor]) -> Distilled:
        prompt_length = int(batch["prompt_length"][0])
        if self.training:
            self.longest_prompt.clamp_(min=prompt_length)  # type: ignore[operator]
        return self._distill()(batch["input_ids"], prompt_length)

    def _distill(self) -> Distillation:
        """Made at the first step, when the strategy has settled on which device we are."""
        if self._distillation is None:
            model = self.backbone_model.to(self.device)
            backbone = Backbone(model, self.hparams["longrope"])
            assert self.heads is not None
            self._distillation = Distillation(
                backbone, self.heads, self.hparams["label"], self.hparams["alpha"], keep_scores=True
            )
        return self._distillation

    def _log(self, result: Distilled, stage: str) -> None:
        metric = TopOverlap().to(self.device) if stage == "train" else self.overlap
        for predictions, targets in zip(result.predictions, result.targets, strict=True):
            metric.update(predictions.to(self.device), targets.to(self.device))
        parts = {
            f"{stage}/loss": result.loss.detach(),
            f"{stage}/regression": result.regression,
            f"{stage}/smoothness": result.smoothness,
        }
        self.log_dict(parts, prog_bar=True, batch_size=1)
        overlap = metric.compute() if stage == "train" else metric
        self.log(f"{stage}/top10_overlap", overlap, prog_bar=True, batch_size=1)
