"""What a training run leaves behind: the heads artifact, with the resolved config beside it."""

from pathlib import Path

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.cli import SaveConfigCallback
from lightning.pytorch.utilities.rank_zero import rank_zero_only

TRAINING_CONFIG = "training.yaml"


class ExportHeads(SaveConfigCallback):
    """Writes the artifact to the config's `output` when training ends.

    LightningCLI hands it the parser and the resolved config, which it also saves in the log folder
    when training starts.
    """

    @property
    def folder(self) -> Path:
        return Path(self.config.output)

    @rank_zero_only
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        pl_module.trained_heads().save_pretrained(self.folder)
        text = self.parser.dump(self.config, skip_none=False)
        (self.folder / TRAINING_CONFIG).write_text(text, encoding="utf-8")
