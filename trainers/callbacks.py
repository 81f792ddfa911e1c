"""What a training run leaves behind: its result, with the resolved config beside it."""

from abc import abstractmethod
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.cli import SaveConfigCallback
from lightning.pytorch.utilities.rank_zero import rank_zero_only

from locret.artifact import written_aside

TRAINING_CONFIG = "training.yaml"


class Export(SaveConfigCallback):
    """Writes what was trained to the config's `output` when training ends.

    LightningCLI hands it the parser and the resolved config, which it also saves in the log folder
    when training starts.
    """

    @property
    def folder(self) -> Path:
        return Path(self.config.output)

    @abstractmethod
    def export(self, trainer: Trainer, pl_module: LightningModule, folder: Path) -> None:
        """Write the result into `folder`."""

    @rank_zero_only
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.export(trainer, pl_module, self.folder)
        text = self.parser.dump(self.config, skip_none=False)
        with written_aside(self.folder) as aside:
            (aside / TRAINING_CONFIG).write_text(text, encoding="utf-8")


class ExportHeads(Export):
    """Writes the heads artifact."""

    def export(self, trainer: Trainer, pl_module: Any, folder: Path) -> None:
        pl_module.trained_heads().save_pretrained(folder)


class ExportAdapter(Export):
    """Writes the adapter in PEFT's format, in bfloat16."""

    def export(self, trainer: Trainer, pl_module: Any, folder: Path) -> None:
        adapted = pl_module.adapted
        state = {
            name: tensor.to(torch.bfloat16)
            for name, tensor in adapted.state_dict().items()
            if "lora_" in name
        }
        with written_aside(folder) as aside:
            adapted.save_pretrained(aside, state_dict=state)
