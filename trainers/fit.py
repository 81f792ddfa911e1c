"""Train retaining heads on a frozen backbone (paper section 3.2):

    locret fit --config smollm2.yaml

A config may name others of `trainers.tune`, `then: [qwen25_coder_kl.yaml]`: the heads that were
trained are tuned by them next, in the same command. `--then null` stops after the first stage. See
`trainers.cli` for the options every training shares. The loss, its gradients and the labels are
`locret.training.distill`'s.
"""

import dataclasses
import gc
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from random import Random
from typing import Any, Literal, get_args

from locret.system.interrupts import Stopped, ends_at_once, handled_by

with ends_at_once():
    import torch
    from lightning.pytorch.cli import ArgsType, LightningArgumentParser
    from torch import Tensor
    from torch.distributed.device_mesh import DeviceMesh
    from torchmetrics import MetricCollection

    from locret.cache.cache import Positions
    from locret.engine.config import EngineConfig
    from locret.heads.heads import HeadKind, HeadsConfig, RetainingHeads
    from locret.model.backbone import Backbone
    from locret.model.loading import Dtype, load_model, weights_sha256
    from locret.model.rotary import LongRopeRule
    from locret.model.weights import Quantization
    from locret.training.distill import Distillation, EvictedReading, evicted_features
    from locret.training.row_loss import Distilled, Features, Share
    from locret.training.segments import Segment, with_query_in_front
    from trainers import cli, tune
    from trainers.callbacks import ExportHeads
    from trainers.distributed import (
        average,
        make_equal,
        shard_backbone,
        shards_of,
        start_average,
        takes_over,
    )
    from trainers.module import (
        HeadsTraining,
        RankCorrelation,
        SaveDtype,
        TopOverlap,
        detached,
        looked_at,
        top_overlap,
    )

Seen = Literal["full", "evicted"]
ENGINE_SETTINGS = ("budget", "chunk_size", "stabilizers", "local_tokens")
SHAPE_AND_LABEL = ("adapter", "bias", "kind", "label", "longrope", "query_tokens", "tap")
"""What heads must have been trained with, where a training starts from them; and their width."""
RECALL_AT = (0.05, 0.1, 0.25)  # budgets in validation, as fractions of the prompt


class HeadsModule(HeadsTraining):
    """Trains retaining heads.

    Args:
        model: the backbone: a Hub id, a folder, or `embedded:smollm2`.
        adapter: a PEFT adapter of the backbone, merged into its weights unless they are quantized.
        quantization: of the backbone's weights: "int8", "nf4", "fp8" (`locret.model.weights`).
        width: hidden width of a head (the paper's d_R); linear heads have none.
        kind: what a head computes: "mlp", the paper's, or "linear", one matrix.
        bias: give its matrices biases. Heads that learn a logarithm need them: their scores then
            start at the labels' mean (`locret.heads.heads.LOG_SCORE`), not at 0.
        tap: what a head reads (`locret.heads.heads.FEATURES`).
        label: label definition (`locret.heads.targets.LABELS`).
        loss: main loss (`locret.heads.targets.LOSSES`).
        boundary_weight: of the boundary term of the loss "smooth_l1_boundary".
        alpha: weight of the smoothness loss.
        query_tokens: Locret-Q: repeat so many of the question's tokens in front of the prompt.
        lr: peak learning rate of AdamW.
        betas: of AdamW.
        weight_decay: of AdamW.
        warmup_steps: steps of linear warm-up; the rate then falls linearly to zero.
        positions: cache positions that the artifact recommends.
        longrope: LongRoPE rule in training and, recorded, in inference.
        train_chunk_size: tokens that a layer reads at a time in training, for rows that do not fit
            in memory; None reads a row at once.
        dtype: of the backbone; the heads train in float32.
        save_dtype: of the exported heads.
        attn_implementation: of the backbone: "sdpa" or "eager".
        revision: of the backbone on the Hub.
        budget, chunk_size, stabilizers, local_tokens: engine settings that the artifact recommends.
        quota_contexts: contexts of the training data by which head quotas are measured when
            training ends (`trainers.callbacks`); 0 for none. Only where the label is a logarithm.
        quota_sharpness: power that shares are raised to; above 1 = more unequal than measured.
        heads: where to start from: heads of the same shape and label, as `trainers.fit` makes them,
            a folder or a Hub id; None = random ones.
        features: what heads see in training: "full", a model that reads with its whole context, or
            "evicted", one that reads in chunks and evicts by the heads' own scores
            (`locret.training.distill`). Labels are of the whole context.
        evicted_compressions: the least and the most tokens for a unit kept; a batch draws.
        evicted_chunk: the least and the most tokens read at a time; a batch draws.
        evicted_share: of the batches that are read so; the others are read whole.
        evicted_quantization: how keys and values are stored meanwhile, as of an engine: None, a
            name, or a mapping such as {name: rotated, bits: 3}.

    Raises:
        ValueError: engine settings that no engine would take, bounds in the wrong order or out of
            range, heads that read a question in front of evicted contexts, or contexts below 0.
    """

    def __init__(
        self,
        model: str,
        adapter: str | None = None,
        quantization: Quantization | None = None,
        width: int = 1024,
        kind: HeadKind = "mlp",
        bias: bool = False,
        tap: str = "qkv",
        label: str = "max_logit",
        loss: str = "smooth_l1",
        boundary_weight: float = 0.2,
        alpha: float = 0.0025,
        query_tokens: int = 0,
        lr: float = 5e-4,
        betas: tuple[float, float] = (0.9, 0.95),
        weight_decay: float = 0.01,
        warmup_steps: int = 2000,
        positions: Positions = "compact",
        longrope: LongRopeRule = "long",
        train_chunk_size: int | None = None,
        dtype: Dtype = "auto",
        save_dtype: SaveDtype = "float32",
        attn_implementation: str = "sdpa",
        revision: str | None = None,
        budget: int = 16384,
        chunk_size: int = 3072,
        stabilizers: int = 2500,
        local_tokens: int = 100,
        quota_contexts: int = 60,
        quota_sharpness: float = 1.0,
        heads: str | None = None,
        features: Seen = "full",
        evicted_compressions: tuple[float, float] = (2.0, 16.0),
        evicted_chunk: tuple[int, int] = (512, 2048),
        evicted_share: float = 1.0,
        evicted_quantization: str | dict[str, Any] | None = None,
    ) -> None:
        super().__init__(loss, boundary_weight, quota_contexts, quota_sharpness)
        self.save_hyperparameters()
        self._evicted = self._evicted_reading()
        self._check_engine_settings()
        self.layer_overlap: Tensor | None = None  # of each layer, when last looked at
        self.val_scores = MetricCollection(
            {f"recall_at_{fraction:.0%}": TopOverlap(fraction) for fraction in RECALL_AT}
            | {"rank_correlation": RankCorrelation()},
            prefix="val/",
            compute_groups=False,  # else those that agree on the first batch are taken for one
        )
        self._distillation: Distillation | None = None
        self._averages_gradients = False

    def _evicted_reading(self) -> EvictedReading | None:
        """How contexts are read for what heads see of them; None = whole."""
        given = self.hparams
        if given["features"] not in get_args(Seen):
            raise ValueError(f"features is {given['features']!r}; expected one of {get_args(Seen)}")
        if given["features"] == "full":
            return None
        if given["query_tokens"]:
            raise ValueError(
                f"query_tokens is {given['query_tokens']} with features 'evicted', which are of "
                "contexts without a question; set query_tokens to 0, or features to 'full'"
            )
        names = ("compressions", "chunk", "share", "quantization")
        return EvictedReading(*(given[f"evicted_{name}"] for name in names))

    def _check_engine_settings(self) -> None:
        given, quantization = self.hparams, None
        if self._evicted is not None:
            quantization = self._evicted.quantization
        settings = {name: given[name] for name in (*ENGINE_SETTINGS, "positions", "longrope")}
        EngineConfig.of(None, None, given["query_tokens"], **settings, quantization=quantization)

    @property
    def shards(self) -> DeviceMesh | None:
        return None if self.device_mesh is None else shards_of(self.device_mesh)

    def configure_model(self) -> None:
        """Load the backbone and make the heads, once.

        Raises:
            ValueError: a quantized backbone or one that evicts is to be sharded, a backbone split,
                or heads to start from are not of the shape and label that are trained.
        """
        if self.heads is not None:
            return
        given, shards = self.hparams, self.shards
        if given["quantization"] and shards is not None:
            raise ValueError(
                f"a backbone in {given['quantization']} cannot be sharded: use --trainer.strategy "
                "ddp, or leave model.quantization out"
            )
        if self._evicted is not None and shards is not None:
            raise ValueError(
                "a sharded backbone has features 'full' alone, as its processes read in step: use "
                "--trainer.strategy ddp, or --model.features full"
            )
        loaded = load_model(
            given["model"],
            dtype=given["dtype"],
            device=self.trainer.strategy.root_device if given["quantization"] else "cpu",
            revision=given["revision"],
            adapter=given["adapter"],
            quantization=given["quantization"],
            attn_implementation=given["attn_implementation"],
        )
        model = loaded.model.requires_grad_(False)
        object.__setattr__(self, "backbone_model", model)
        config = HeadsConfig.for_geometry(
            Backbone(model).geometry,
            None if given["kind"] == "linear" else given["width"],
            backbone=loaded.name,
            backbone_revision=loaded.revision,
            backbone_sha256=weights_sha256(given["model"]),
            model_type=model.config.model_type,
            defaults={name: given[name] for name in ENGINE_SETTINGS},
            **{name: given[name] for name in ("positions", *SHAPE_AND_LABEL)},
        )
        with torch.device("cpu"):  # the same heads from a seed, whatever strategy and device
            fresh = given["heads"] is None
            self.heads = RetainingHeads(config) if fresh else self._started(config)
        if shards is not None:  # last: whatever sharding does to the random state
            shard_backbone(model.get_decoder(), shards)

    def _started(self, config: HeadsConfig) -> RetainingHeads:
        """The heads to start from, in float32, with their quotas."""
        source = self.hparams["heads"]
        trained = RetainingHeads.from_pretrained(source)
        pairs = {
            name: (getattr(trained.config, name), getattr(config, name))
            for name in (*SHAPE_AND_LABEL, "width")
        }
        others = [
            f"{name}: heads {theirs!r}, model.{name} {ours!r}"
            for name, (theirs, ours) in pairs.items()
            if theirs != ours
        ]
        if others:
            raise ValueError(
                f"heads of {source} were not trained with the settings given: {'; '.join(others)}"
            )
        self.longest_prompt.fill_(trained.config.trained_tokens or 0)
        config = dataclasses.replace(config, quotas=trained.config.quotas)
        tensors = trained.float().state_dict()
        return RetainingHeads.from_tensors(config, tensors, source).requires_grad_(True)

    def setup(self, stage: str) -> None:
        self._averages_gradients = False

    def on_train_start(self) -> None:
        assert self.heads is not None
        # The search for a learning rate is a training of its own: this may be the second.
        if not self._averages_gradients and takes_over(self.trainer.strategy):
            self._averages_gradients = True
            make_equal(self.heads.parameters())

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        # Where batches are accumulated, their sum is averaged over processes, not each of them.
        at_once = self._averages_gradients and self.trainer.accumulate_grad_batches == 1
        result = self._step(batch, batch_idx, start_average if at_once else None)
        figures = detached(result)
        if looked_at(self.trainer):
            self.layer_overlap = self._overlap_by_layer(result)
            figures["top10_overlap"] = self.layer_overlap.mean()
        self.log_step(figures, batch)
        return result.loss

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        result = self._step(batch, batch_idx)
        self.log_validation(detached(result), batch)
        for predictions, targets in zip(result.predictions, result.targets, strict=True):
            self.val_scores.update(predictions.to(self.device), targets.to(self.device))

    def on_validation_epoch_end(self) -> None:
        self.log_dict(self.val_scores.compute(), prog_bar=True)
        self.val_scores.reset()

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        if self._averages_gradients and self.trainer.accumulate_grad_batches > 1:
            assert self.heads is not None
            average([p.grad for p in self.heads.parameters() if p.grad is not None])

    @property
    def backbone(self) -> Backbone:
        return self._distill().backbone

    def _step(self, batch: dict[str, Any], batch_idx: int, share: Share | None = None) -> Distilled:
        ids, segments = batch["input_ids"], batch["segments"]
        if self.training:
            self.note_prompts(segments)
        if self.hparams["query_tokens"]:
            ids, segments = with_query_in_front(ids, segments, self.hparams["query_tokens"])
        distill = self._distill()
        return distill(ids, segments, share, self._features(ids, segments, batch_idx))

    def _features(self, ids: Tensor, segments: list[Segment], batch_idx: int) -> Features | None:
        """What heads read of a model that evicts; None where they see the whole context. How it
        reads follows from seed and step alone, so that it is the same in all processes and in a
        training that goes on from a checkpoint."""
        reading = self._evicted
        if reading is None:
            return None
        how: tuple[float, int] | None = reading.middle
        if self.training:
            seed = os.environ.get("PL_GLOBAL_SEED", "")
            where = f"{seed} {self.trainer.global_step} {batch_idx}"
            how = reading.drawn(Random(f"locret evicted {where}"))
        if how is None:
            return None
        assert self.heads is not None
        return evicted_features(
            self.backbone, self.heads, ids, segments, *how, reading.quantization
        )

    def _distill(self) -> Distillation:
        """Made at the first step, when the strategy has decided on which device we are."""
        if self._distillation is None:
            if self.shards is None and not self.hparams["quantization"]:
                self.backbone_model.to(self.device)
            backbone = Backbone(self.backbone_model, self.hparams["longrope"])
            assert self.heads is not None
            self._distillation = Distillation(
                backbone,
                self.heads,
                alpha=self.hparams["alpha"],
                loss=self.loss,
                keep_scores=True,
                chunk_size=self.hparams["train_chunk_size"],
            )
        return self._distillation

    def _overlap_by_layer(self, result: Distilled) -> Tensor:
        """Top-10% overlap of each layer [layers], over the row's answers; on our device."""
        assert self.heads is not None
        overlaps = [
            top_overlap(predictions, targets, 0.1).mean().to(self.device)
            for predictions, targets in zip(result.predictions, result.targets, strict=True)
        ]
        return torch.stack(overlaps).view(len(self.heads.layers), -1).mean(dim=1)


# ---- the command ---------------------------------------------------------------------------------


class FitCLI(cli.TrainingCLI):
    """With the names of later stages."""

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        super().add_arguments_to_parser(parser)
        parser.add_argument(
            "--then",
            type=str | list[str] | None,
            default=None,
            help="configs of trainers.tune, one or a list, which go on from these heads in turn; "
            "the last one writes OUTPUT_tuned",
        )

    def parse_arguments(self, parser: LightningArgumentParser, args: ArgsType) -> None:
        """And look at later stages, before anything of the first is made."""
        super().parse_arguments(parser, args)
        if self.config.then is not None:
            tune.check_stages(self.config)


def main(args: list[str] | None = None) -> Path | None:
    """Run a training; returns the folder of the artifact, None after a check (`trainers.cli`)."""
    training: Any = cli.build(HeadsModule, ExportHeads, args, kind=FitCLI)
    output = cli.run(training)
    stages = [] if output is None else _later_stages(training, output)
    for config, arguments in stages:
        print(f"next      these heads are tuned by {config}", flush=True)
        # What was interrupted is the first stage that is not at its end; checkpoints of stages
        # behind it are an earlier training's.
        resumes = training.was_finished and training.config.ckpt_path == "last"
        with _signals_noted():
            training = None  # and its model, before the next one is loaded
            gc.collect()
        training = tune.build([*arguments, *(["--ckpt_path=last"] if resumes else [])])
        output = cli.run(training)
    cli.tell_how_to_use(training, output)
    return output


@contextmanager
def _signals_noted() -> Iterator[None]:
    """Python drops what is raised while objects are collected, so signals are raised behind it."""
    signals: list[int] = []
    with handled_by(lambda number, frame: signals.append(number)):
        yield
    if signals:
        raise Stopped(signals[0], "stopped between the stages; go on with --ckpt_path last")


def _later_stages(training: cli.TrainingCLI, output: Path) -> list[tune.Stage]:
    """Those that go on from the heads in `output`; none where several processes would have to be
    started for them again, which is told then."""
    trainer, stages = training.trainer, tune.stages_of(training.config, output)
    if trainer.world_size > 1:
        if trainer.is_global_zero:
            for _, arguments in stages:
                print("next      python -m trainers.tune " + " ".join(arguments))
        return []
    return stages


if __name__ == "__main__":
    sys.exit(cli.status("trainers.fit", main))
