"""LightningModule of the adapter stage: LoRA (arXiv 2106.09685) on answers in long contexts."""

from functools import cached_property
from typing import Any

import torch
from lightning.pytorch import LightningModule
from peft import LoraConfig, get_peft_model
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import PreTrainedTokenizerBase, get_cosine_schedule_with_warmup

from locret.model.adapters import without_old_names
from locret.model.backbone import Backbone
from locret.model.loading import Dtype, load_model, load_tokenizer
from locret.training.row_loss import PackedAttention
from trainers.figures import averaged, looked_at
from trainers.optimizer import adamw, restart_schedule


class AdapterModule(LightningModule):
    """Trains a LoRA adapter with cross entropy on the answers' tokens.

    Args:
        model: the backbone: a Hub id, a folder, or `embedded:smollm2`.
        rank: of the adapter's matrices.
        alpha: LoRA scale; the update is multiplied by alpha / rank.
        dropout: of the adapter's input.
        target_modules: names of the linear layers that get an adapter.
        lr: peak learning rate of AdamW.
        betas, weight_decay: of AdamW.
        warmup_steps: steps of linear warm-up; the rate then falls to zero as a cosine.
        dtype: of the backbone; the adapter trains in float32.
        revision: of the backbone on the Hub.
    """

    def __init__(
        self,
        model: str,
        rank: int = 48,
        alpha: int = 96,
        dropout: float = 0.0,
        target_modules: tuple[str, ...] = ("q_proj", "k_proj", "v_proj", "o_proj"),
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.95),
        weight_decay: float = 0.0,
        warmup_steps: int = 100,
        dtype: Dtype = "auto",
        revision: str | None = None,
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.figures: dict[str, Tensor] = {}  # of the step, by name, if they are looked at
        self._adapted: Any = None
        self._switched: list[torch.nn.Module] = []

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        return load_tokenizer(self.hparams["model"], revision=self.hparams["revision"])

    def configure_model(self) -> None:
        """Load the backbone and put a fresh adapter on it, once.

        Raises:
            ValueError: the strategy shards models, which this stage does not do.
        """
        if self._adapted is not None:
            return
        if self.device_mesh is not None:
            raise ValueError("an adapter is trained on whole backbones: use --trainer.strategy ddp")
        given = self.hparams
        loaded = load_model(
            given["model"], dtype=given["dtype"], device="cpu", revision=given["revision"]
        )
        config = LoraConfig(
            r=given["rank"],
            lora_alpha=given["alpha"],
            lora_dropout=given["dropout"],
            target_modules=list(given["target_modules"]),
            task_type="CAUSAL_LM",
        )
        with without_old_names():
            adapted = get_peft_model(loaded.model, config, autocast_adapter_dtype=True)
        # Past nn.Module's bookkeeping: checkpoints hold the adapter, never the backbone.
        object.__setattr__(self, "_adapted", adapted)
        # What PEFT put there. The frozen backbone was loaded to read as in use, and goes on so.
        self._switched = [module for module in adapted.modules() if module.training]
        self.lora = torch.nn.ParameterDict(
            {_key(name): p for name, p in adapted.named_parameters() if p.requires_grad}
        )

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        loss, correct = self._loss(batch)
        figures = {"train/loss": loss, "train/token_accuracy": correct}
        self.figures = averaged(figures, self.trainer) if looked_at(self.trainer) else {}
        self.log_dict(self.figures, prog_bar=True, batch_size=len(batch["segments"]))
        return loss

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        loss, correct = self._loss(batch)
        figures = {"val/loss": loss, "val/token_accuracy": correct}
        self.log_dict(figures, prog_bar=True, batch_size=len(batch["segments"]), sync_dist=True)

    def configure_optimizers(self) -> Any:
        return adamw(self, self.lora.parameters(), get_cosine_schedule_with_warmup)

    def on_fit_start(self) -> None:
        restart_schedule(self)
        # The adapter's parameters are ours and moved with us; the backbone's are not.
        self._adapted.to(self.device)
        object.__setattr__(self, "backbone", Backbone(self._adapted))

    @property
    def adapted(self) -> Any:
        """The PEFT model that is trained."""
        return self._adapted

    def _loss(self, batch: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """Mean cross entropy of the answers' tokens, and the share of them predicted exactly."""
        self._follow_mode()
        ids, segments = batch["input_ids"], batch["segments"]
        answers = [span for segment in segments for span in segment.answers]
        at = torch.cat([torch.arange(start, end) for start, end in answers]).to(ids.device)
        before = torch.tensor([i for segment in segments for i in segment.before_answers])
        backbone = self.backbone
        with backbone.attached(PackedAttention(segments, backbone.backend)):
            hidden = backbone.decoder(input_ids=ids, use_cache=False).last_hidden_state
        # Only the answers' rows meet the vocabulary.
        logits = backbone.model.get_output_embeddings()(hidden[0, before.to(ids.device)]).float()
        loss = cross_entropy(logits, ids[0, at])
        return loss, (logits.argmax(-1) == ids[0, at]).float().mean()

    def _follow_mode(self) -> None:
        """Drop out in training and not in validation: Lightning sets our mode, and what is not
        registered with us would keep its own."""
        if self._adapted.training != self.training:
            for module in self._switched:
                module.training = self.training


def _key(name: str) -> str:
    """A parameter's name without dots, which ParameterDict does not take."""
    return name.replace(".", "/")
