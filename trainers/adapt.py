"""Teach a small backbone long contexts by LoRA: `locret adapt --config NAME`.

A small model loses needles beyond one or two thousand tokens; no eviction policy can give back what
the full cache does not find. Given heads, the model learns instead to answer from what they keep of
a context: contexts are whole, or what eviction leaves of them (`locret.training.gated`). See
`trainers.cli` for the options every training shares.
"""

import contextlib
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from locret.system.interrupts import ends_at_once

with ends_at_once():
    import torch
    from peft import LoraConfig, PeftModel, get_peft_model
    from torch import Tensor
    from torch.nn.functional import cross_entropy
    from transformers import get_cosine_schedule_with_warmup

    from locret.heads.heads import RetainingHeads
    from locret.model.adapters import Adapter, without_old_names
    from locret.model.backbone import Backbone
    from locret.model.loading import Dtype, load_model
    from locret.model.weights import check_has_gradients
    from locret.quantities import check_bounds
    from locret.training.branches import MeanOver
    from locret.training.gated import EvictedLoss, Threshold, check_tunable
    from locret.training.row_loss import PackedAttention
    from trainers import cli
    from trainers.callbacks import ExportAdapter
    from trainers.module import TrainingModule

TEACHER = "teacher"
"""PEFT's name of the adapter that the student's went on from."""


class AdapterModule(TrainingModule):
    """Trains a LoRA adapter (arXiv 2106.09685) of the backbone.

    By cross entropy on the answers' tokens or, given heads, by KL from what the model without the
    adapter makes of the whole context to what it makes of the units that the heads keep.

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
        heads: what `trainers.fit` or `trainers.tune` made, or a Hub id; they stay as they are. If
            their record names an adapter, the training goes on from it, whatever `rank`, `alpha`,
            `dropout` and `target_modules` say, and the teacher is the model with it.
        compressions: the least and the most that a sample draws, log-uniformly.
        threshold: "global" or "quotas": which units stay (`locret.training.gated.EvictedLoss`).
        mean_over: "tokens", "branches" or "both": what counts alike in the mean of KL.
        recompute: layers keep their input alone for the backward pass, given heads.

    Raises:
        ValueError: compressions in the wrong order or out of range.
    """

    schedule = staticmethod(get_cosine_schedule_with_warmup)

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
        heads: str | None = None,
        compressions: tuple[float, float] = (4.0, 32.0),
        threshold: Threshold = "global",
        mean_over: MeanOver = "tokens",
        recompute: bool = True,
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        check_bounds("compressions", compressions, 1)
        self._adapted: Any = None
        self._evicted: EvictedLoss | None = None
        self._switched: list[torch.nn.Module] = []

    def configure_model(self) -> None:
        """Load the backbone and put a fresh adapter on it, once.

        Raises:
            ValueError: the strategy shards models, which this stage does not do; a backbone in FP8;
                heads that cannot be used here, or dropout in layers that are computed again.
        """
        if self._adapted is not None:
            return
        if self.device_mesh is not None:
            raise ValueError("an adapter is trained on whole backbones: use --trainer.strategy ddp")
        given = self.hparams
        heads = None if given["heads"] is None else RetainingHeads.from_pretrained(given["heads"])
        if heads is not None:
            check_tunable(heads, given["threshold"])
        loaded = load_model(
            given["model"], dtype=given["dtype"], device="cpu", revision=given["revision"]
        )
        check_has_gradients(loaded.model)  # a checkpoint may be stored so
        before = None if heads is None else heads.config.adapter
        with without_old_names():
            adapted = self._fresh(loaded.model) if before is None else _from(before, loaded.model)
        dropout = getattr(adapted.peft_config["default"], "lora_dropout", 0)
        if heads is not None and given["recompute"] and dropout:
            raise ValueError(
                f"dropout is {dropout}, and layers are computed again for their gradients, when "
                "something else would drop out; set dropout to 0, or recompute to false"
            )
        # Past nn.Module's bookkeeping: checkpoints hold the adapter, never the backbone.
        object.__setattr__(self, "_adapted", adapted)
        object.__setattr__(self, "_heads", heads)
        # What PEFT put there. The frozen backbone was loaded to read as in use, and goes on so.
        self._switched = [module for module in adapted.modules() if module.training]
        self.lora = torch.nn.ParameterDict(
            {_key(name): p for name, p in adapted.named_parameters() if p.requires_grad}
        )

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        found = self._found(batch, batch_idx)
        self.log_step(found, batch)
        return found["loss"]

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        self.log_validation(self._found(batch, batch_idx), batch)

    def trained(self) -> Iterable[torch.nn.Parameter]:
        return self.lora.parameters()

    def on_fit_start(self) -> None:
        super().on_fit_start()
        # The adapter's parameters are ours and moved with us; the backbone's are not.
        self._adapted.to(self.device)
        given, heads = self.hparams, self._heads
        longrope = "long" if heads is None else heads.config.longrope
        object.__setattr__(self, "backbone", Backbone(self._adapted, longrope))
        if heads is not None:
            names = ("threshold", "mean_over", "recompute")
            heads = heads.to(self.device, torch.float32)
            options = {name: given[name] for name in names}
            self._evicted = EvictedLoss(self.backbone, heads, self._teaching, **options)

    @property
    def adapted(self) -> Any:
        """The PEFT model that is trained."""
        return self._adapted

    def _fresh(self, model: Any) -> Any:
        """The model with an adapter that does nothing yet."""
        given = self.hparams
        config = LoraConfig(
            r=given["rank"],
            lora_alpha=given["alpha"],
            lora_dropout=given["dropout"],
            target_modules=list(given["target_modules"]),
            task_type="CAUSAL_LM",
        )
        return get_peft_model(model, config, autocast_adapter_dtype=True)

    @contextlib.contextmanager
    def _teaching(self) -> Iterator[None]:
        """Until the block ends, the model is the teacher."""
        if TEACHER not in self._adapted.peft_config:
            with self._adapted.disable_adapter():
                yield
            return
        self._adapted.set_adapter(TEACHER)
        try:
            yield
        finally:
            self._adapted.set_adapter("default")

    def _found(self, batch: dict[str, Any], batch_idx: int) -> dict[str, Tensor]:
        """The loss, and the share of the tokens for which the answer's or the teacher's is found
        the likeliest."""
        self._follow_mode()
        if self._evicted is None:
            loss, correct = self._loss(batch)
            return {"loss": loss, "token_accuracy": correct}
        segments = batch["segments"]
        compressions = self.compressions(len(segments), batch_idx if self.training else None)
        parameters = [*self.lora.parameters()] if self.training else []
        lost = self._evicted(batch["input_ids"], segments, compressions, parameters)
        return {"loss": lost.loss, "agreement": lost.agreement}

    def _loss(self, batch: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """Mean cross entropy of the answers' tokens, and the share of them predicted exactly."""
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


def _from(name: str, model: Any) -> Any:
    """The model with an adapter that goes on from another one, and with that one.

    Raises:
        ValueError: it is not there, or not one of this model.
    """
    found = Adapter.find(name)
    found.check_fit(model.config)
    adapted = PeftModel.from_pretrained(model, found.folder, is_trainable=True)
    adapted.load_adapter(found.folder, TEACHER)
    return adapted


def _key(name: str) -> str:
    """A parameter's name without dots, which ParameterDict does not take."""
    return name.replace(".", "/")


def main(args: list[str] | None = None) -> Path | None:
    """Run a training; returns the folder of the adapter, None after a check (`trainers.cli`)."""
    training = cli.build(AdapterModule, ExportAdapter, args, "locret adapt")
    if training.model.hparams["heads"] is not None:
        cli.check_branches(training)
    return cli.run(training)


if __name__ == "__main__":
    sys.exit(cli.status("trainers.adapt", main))
