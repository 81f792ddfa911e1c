"""What a training run leaves behind: its result, the resolved config and a picture of the run."""

import importlib.util
import shlex
import sys
from abc import abstractmethod
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.cli import SaveConfigCallback
from lightning.pytorch.utilities.rank_zero import rank_zero_only, rank_zero_warn

from locret.heads.files import write_card, written_aside
from trainers.plot import draw

TRAINING_CONFIG = "training.yaml"
TRAINING_PLOT = "training.png"


class Export(SaveConfigCallback):
    """Writes what was trained to the config's `output` when training ends.

    LightningCLI hands it the parser and the resolved config, which it also saves in the log folder
    when training starts. For the picture it remembers the figures of all steps that were logged,
    over resumes too.
    """

    plotted: tuple[str, ...] = ("train/loss",)

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.history: dict[str, list[float]] = {name: [] for name in ("step", *self.plotted)}
        self.written = False

    @property
    def folder(self) -> Path:
        return Path(self.config.output)

    @abstractmethod
    def export(self, trainer: Trainer, pl_module: LightningModule, folder: Path) -> None:
        """Write the result into `folder`."""

    def state_dict(self) -> dict[str, Any]:
        return {"history": self.history}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.history = state_dict["history"]

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        trainer.datamodule.count(batch)  # type: ignore[attr-defined]
        if pl_module.figures:
            self.history["step"].append(trainer.global_step)
            for name in self.plotted:
                self.history[name].append(float(pl_module.figures[name]))

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.write(trainer, pl_module)

    def write(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write all that is left behind."""
        self._write(trainer, pl_module)
        self.written = True

    @rank_zero_only
    def _write(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.export(trainer, pl_module, self.folder)
        command = f"# command: {shlex.join(['python', *sys.orig_argv[1:]])}\n"
        text = command + self.parser.dump(self.config, skip_none=False)
        with written_aside(self.folder) as aside:
            (aside / TRAINING_CONFIG).write_text(text, encoding="utf-8")
            if importlib.util.find_spec("matplotlib") is None:
                rank_zero_warn("no picture of the run: pip install matplotlib")
            else:
                layers = getattr(pl_module, "layer_overlap", None)
                draw(aside / TRAINING_PLOT, self.history, () if layers is None else layers.tolist())
        self.finish(self.folder)

    def finish(self, folder: Path) -> None:
        """What is left to do when everything lies in the folder."""


class ExportHeads(Export):
    """Writes the heads artifact."""

    plotted = ("train/loss", "train/top10_overlap")

    def on_train_end(self, trainer: Trainer, pl_module: Any) -> None:
        longest = trainer.strategy.reduce(pl_module.longest_prompt, reduce_op="max")
        pl_module.longest_prompt.copy_(longest)
        super().on_train_end(trainer, pl_module)

    def export(self, trainer: Trainer, pl_module: Any, folder: Path) -> None:
        pl_module.trained_heads().save_pretrained(folder)

    def finish(self, folder: Path) -> None:
        write_card(folder)  # once more, now that it can tell of the training


class ExportAdapter(Export):
    """Writes the adapter in PEFT's format, in bfloat16."""

    plotted = ("train/loss", "train/token_accuracy")

    def export(self, trainer: Trainer, pl_module: Any, folder: Path) -> None:
        adapted = pl_module.adapted
        # By name: where the weights lay when they were trained is nobody's business.
        adapted.peft_config["default"].base_model_name_or_path = pl_module.hparams["model"]
        state = {
            name: tensor.to(torch.bfloat16)
            for name, tensor in adapted.state_dict().items()
            if "lora_" in name
        }
        with written_aside(folder) as aside:
            adapted.save_pretrained(aside, state_dict=state)
