"""Tune trained heads by what answers lose: `python -m trainers.tune --config NAME`.

The second stage of heads that learned log p by regression (`trainers.fit`, which may name it as
what comes next): a few hundred steps of KL(full || gated), the backbone frozen
(`locret.training.gated`). See `trainers.cli` for the options every training shares.
"""

import hashlib
import inspect
import math
import sys
from pathlib import Path
from typing import Any

from locret.system.interrupts import ends_at_once

with ends_at_once():
    import torch
    import yaml
    from torch import Tensor

    from locret.heads.heads import RetainingHeads
    from locret.model.backbone import Backbone
    from locret.model.loading import Dtype, load_config, load_model
    from locret.quantities import check_bounds
    from locret.quantization import scheme_of
    from locret.system.files import find_config
    from locret.training.branches import MeanOver
    from locret.training.gated import (
        GatedLoss,
        Threshold,
        check_gates,
        check_tunable,
        check_tunable_as,
    )
    from trainers import cli
    from trainers.callbacks import ExportTunedHeads
    from trainers.module import HeadsTraining, SaveDtype, detached

STARTED_FROM = "started_from"
"""Where a checkpoint tells which heads its training started from."""


class GatedModule(HeadsTraining):
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
            training ends (`trainers.callbacks`); 0 leaves those that the heads came with.
        quota_sharpness: power that shares are raised to; above 1 = more unequal than measured.

    Raises:
        ValueError: bounds in the wrong order or out of range.
    """

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
        super().__init__(loss, boundary_weight, quota_contexts, quota_sharpness)
        self.save_hyperparameters()
        check_bounds("compressions", compressions, 1)
        if not (min(temperatures) > 0 and max(temperatures) < math.inf):
            raise ValueError(f"temperatures is {list(temperatures)}; expected numbers above 0")
        scheme_of(quantization)
        self._gated: GatedLoss | None = None
        self._start = ""

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
        self.came_in = next(heads.parameters()).dtype
        self.longest_prompt.fill_(heads.config.trained_tokens or 0)
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

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        segments = batch["segments"]
        self.note_prompts(segments)
        compressions = self.compressions(len(segments), batch_idx)
        result = self._loss()(batch["input_ids"], segments, compressions, self.temperature)
        self.log_step(detached(result), batch)
        return result.loss

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        segments = batch["segments"]
        compressions = self.compressions(len(segments), None)
        temperature = self.hparams["temperatures"][1]
        result = self._loss()(batch["input_ids"], segments, compressions, temperature)
        self.log_validation(detached(result), batch)

    @property
    def backbone(self) -> Backbone:
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


# ---- the command ---------------------------------------------------------------------------------


def build(args: list[str] | None = None) -> cli.TrainingCLI:
    """The training that a command line means, nothing loaded yet.

    Raises:
        ValueError: samples have no branches.
    """
    training = cli.build(GatedModule, ExportTunedHeads, args)
    cli.check_branches(training)
    return training


def main(args: list[str] | None = None) -> Path | None:
    """Run a training; returns the folder of the artifact, None after a check (`trainers.cli`)."""
    training = build(args)
    output = cli.run(training)
    cli.tell_how_to_use(training, output)
    return output


# ---- as a later stage of a training --------------------------------------------------------------

Stage = tuple[str, list[str]]
"""A config of `trainers.tune`, and all arguments of its run."""


def stages_of(config: Any, output: Path) -> list[Stage]:
    """Each starts from the heads before; the last one makes OUTPUT_tuned."""
    then = config.then or []
    names = [then] if isinstance(then, str) else then
    stages, heads = [], output
    named = output if output.name.strip(".") else output.resolve()  # "." has no name
    for number, name in enumerate(names, 1):
        end = "_tuned" if number == len(names) else f"_tuned_{number}"
        made = named.with_name(named.name + end)
        arguments = [
            f"--config={name}",
            f"--model.model={config.model.model}",
            f"--model.heads={heads}",
            f"--output={made}",
            f"--trainer.accelerator={config.trainer.accelerator}",
            f"--trainer.devices={config.trainer.devices}",
        ]
        stages.append((name, arguments))
        heads = made
    return stages


def check_stages(config: Any) -> None:
    """
    Raises:
        ValueError: a later stage is not there, or cannot go on from what the first will make.
    """
    given = config.model
    folders = _checkpoint_folders(config)
    for name, arguments in stages_of(config, Path(config.output or "heads")):
        try:
            _check_is_of_tune(name)
            check_gates(load_config(given.model, revision=given.revision))
            stage = build(arguments)
            check_tunable_as(
                given.label,
                given.query_tokens,
                bool(given.quota_contexts or given.heads),  # those of others may have been measured
                stage.model.hparams["threshold"],
            )
            own = _checkpoint_folders(stage.config)
            if own & folders:
                raise ValueError(
                    "its checkpoints go where those of a stage before it are, to "
                    f"{min(own & folders)}; give it a dirpath of its own"
                )
            folders |= own
        except ValueError as error:
            raise ValueError(f"the later stage, {name}: {error}") from error


def _check_is_of_tune(name: str) -> None:
    """
    Raises:
        ValueError: a file that says of the model what `trainers.tune` does not know.
    """
    said = yaml.safe_load(find_config(name).read_text(encoding="utf-8"))
    model = said.get("model") if isinstance(said, dict) else None
    unknown = sorted({*(model or {})} - {*inspect.signature(GatedModule).parameters})
    if unknown:
        raise ValueError(
            f"it says {', '.join(f'model.{key}' for key in unknown)}, which trainers.tune does not "
            "know; expected a config of trainers.tune, such as qwen25_coder_kl.yaml"
        )


def _checkpoint_folders(config: Any) -> set[Path]:
    """Where a training's checkpoints go, as far as its configuration says."""
    given = config.trainer.callbacks or []
    callbacks = given if isinstance(given, list) else [given]
    named = [(callback.get("init_args") or {}).get("dirpath") for callback in callbacks]
    return {Path(folder).resolve() for folder in named if folder}


if __name__ == "__main__":
    sys.exit(cli.status("trainers.tune", main))
