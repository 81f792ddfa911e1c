"""A Lightning callback that writes when each batch of a training was done, its loss, and memory."""

import json
import time
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer


class StepClock(Callback):
    """One JSON a process, `rank{r}.json`, written when training ends.

    Args:
        folder: where to.

    The file holds, with one value a batch: `step`, optimizer steps done; `seconds`, the device's
    work included; `loss`, mean over processes. And `peak_gib` of the device, None on the CPU.
    """

    def __init__(self, folder: str) -> None:
        self.folder = Path(folder)
        self.seen: dict[str, list[float]] = {"step": [], "seconds": [], "loss": []}

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if pl_module.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(pl_module.device)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if pl_module.device.type == "cuda":
            torch.cuda.synchronize(pl_module.device)
        self.seen["step"].append(trainer.global_step)
        self.seen["seconds"].append(time.perf_counter())
        self.seen["loss"].append(float(trainer.callback_metrics["train/loss"]))

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        device = pl_module.device
        on_gpu = device.type == "cuda"
        peak = torch.cuda.max_memory_allocated(device) / 2**30 if on_gpu else None
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / f"rank{trainer.global_rank}.json"
        path.write_text(json.dumps({**self.seen, "peak_gib": peak}), encoding="utf-8")
