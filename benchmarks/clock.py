"""A Lightning callback that measures a training without holding it up."""

import json
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, distributed

PHASES = ("read", "backward", "average_clip_update", "between_steps")


class StepClock(Callback):
    """One JSON a process, `rank{r}.json`, written when training ends.

    Args:
        folder: where to.
        warmup: optimizer steps before the clock starts.

    The file holds
        losses: of each batch of this process;
        batches, seconds: after the warm-up;
        phases: milliseconds of the device, means over these batches;
        peak_gib: of the device, None on the CPU;
        average_gib_per_second: of the heads' parameters through one all-reduce, None if alone.
    """

    def __init__(self, folder: str, warmup: int) -> None:
        self.folder = Path(folder)
        self.warmup = warmup
        self.losses: list[Tensor] = []
        self.marks: list[list[Any]] = []
        self.batches = 0
        self.started: float | None = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.device = pl_module.device
        self.speed = _all_reduce_speed(pl_module) if trainer.world_size > 1 else None
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)

    def on_train_batch_start(self, *args: Any) -> None:
        self.marks.append([self._mark()])

    def on_before_backward(self, *args: Any) -> None:
        self.marks[-1].append(self._mark())

    def on_after_backward(self, *args: Any) -> None:
        self.marks[-1].append(self._mark())

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self.marks[-1].append(self._mark())
        self.losses.append(outputs["loss"] * trainer.accumulate_grad_batches)  # Lightning divides
        self.batches += self.started is not None
        if self.started is None and trainer.global_step == self.warmup:
            self.started = self._now()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        assert self.started is not None, "no step after the warm-up"
        on_gpu = self.device.type == "cuda"
        seen = {
            "seconds": self._now() - self.started,
            "batches": self.batches,
            "losses": [float(loss) for loss in self.losses],
            "phases": self._phases(),
            "peak_gib": torch.cuda.max_memory_allocated(self.device) / 2**30 if on_gpu else None,
            "average_gib_per_second": self.speed,
        }
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / f"rank{trainer.global_rank}.json"
        path.write_text(json.dumps(seen), encoding="utf-8")

    def _phases(self) -> dict[str, float]:
        marks = self.marks[-self.batches :]
        nexts = [following[0] for following in marks[1:]]
        steps = [[*marked, after] for marked, after in zip(marks, nexts, strict=False)]
        return {
            name: statistics.mean(_milliseconds(step[i], step[i + 1]) for step in steps)
            for i, name in enumerate(PHASES)
        }

    def _mark(self) -> Any:
        """A moment in the device's stream, without waiting for it."""
        if self.device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _now(self) -> float:
        """Seconds, when everything asked of the device is done."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()


def _milliseconds(start: Any, end: Any) -> float:
    return (end - start) * 1e3 if isinstance(start, float) else start.elapsed_time(end)


def _all_reduce_speed(module: LightningModule) -> float:
    """GiB a second."""
    device = module.device
    values = torch.zeros(sum(p.numel() for p in module.parameters()), device=device)
    times = []
    for _ in range(4):
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        started = time.perf_counter()
        distributed.all_reduce(values)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - started)
    return values.numel() * values.element_size() / min(times) / 2**30
