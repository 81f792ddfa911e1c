"""How far a training is, where there is no terminal for Lightning's bar."""

import math
import sys
from typing import Any

from lightning.pytorch import Callback, Trainer

from locret.commands.progress import Progress


class PlainProgress(Callback):
    """A line every few seconds on stderr, of the first process alone; nothing on a terminal."""

    def __init__(self) -> None:
        self._progress = Progress("training", "steps")

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        steps = trainer.estimated_stepping_batches
        # A training without an end has no share that is done.
        if trainer.is_global_zero and not sys.stderr.isatty() and math.isfinite(steps):
            self._progress(trainer.global_step, int(steps))
