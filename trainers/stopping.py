"""Stop a training on SIGINT or SIGTERM, between two steps, and say how to go on.

While it trains, a signal is noted and obeyed before the next step. An exception at once could be
lost in some `__del__`, such as that of the processes that load data; and of several processes
those would wait for ever that reach a collective which another one never does.
"""

import signal
import subprocess
from types import FrameType
from typing import Any

import torch
from lightning.fabric.utilities.cloud_io import get_filesystem
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import distributed

from locret.system.interrupts import Repeats, Stopped, handlers, stop_behind


class StopBetweenSteps(Callback):
    """Stops a training, all its processes before the same step, if any of them got a signal."""

    def __init__(self) -> None:
        self.number = 0  # of the signal that came
        self._repeats = Repeats()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take over from Lightning's handler, whose broadcast may meet any other collective. When
        training ends, Lightning puts back what was there before."""
        for number in handlers():
            signal.signal(number, self._note)

    on_sanity_check_start = on_train_start

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        number = self._of_all(pl_module) if trainer.world_size > 1 else self.number
        if number:
            raise Stopped(number)

    def on_validation_batch_start(self, trainer: Trainer, *args: Any) -> None:
        if self.number and trainer.world_size == 1:  # several may have unequally many batches
            raise Stopped(self.number)

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        """End the processes that Lightning has started: they would wait for this one for ever."""
        children = getattr(trainer.strategy.launcher, "procs", [])
        started = list(children)
        children.clear()  # those that Lightning watches: it kills this process when one ends
        for child in started:
            child.kill()
        for child in started:  # of subprocess, or of multiprocessing
            child.wait() if isinstance(child, subprocess.Popen) else child.join()

    def _of_all(self, pl_module: LightningModule) -> int:
        number = torch.tensor(self.number, device=pl_module.device)
        distributed.all_reduce(number, op=distributed.ReduceOp.MAX)
        return int(number)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self._repeats():
            return
        if self.number:  # the next step may never come
            raise Stopped(number)
        self.number = number


def signal_behind(error: BaseException, trainer: Trainer) -> int | None:
    """The number of the signal that an exception comes from, if it does. A signal that also ends
    data loaders shows here as their error, before the next step."""
    stop = stop_behind(error)
    if stop is not None:
        return stop.number
    noted = [c.number for c in trainer.callbacks if isinstance(c, StopBetweenSteps)]
    return next(filter(None, noted), None)


def where_it_stopped(trainer: Trainer, ckpt_path: str | None) -> str:
    """What to tell the user: the step, and the checkpoint to go on from; empty in all processes but
    the first.

    Args:
        ckpt_path: that the training itself went on from.
    """
    if not trainer.is_global_zero:
        return ""
    found = _checkpoint(trainer, ckpt_path)
    how = "nothing was saved yet" if found is None else f"go on with --ckpt_path {found}"
    saved = max(
        (getattr(c, "_last_global_step_saved", 0) for c in trainer.checkpoint_callbacks), default=0
    )
    if found is not None and 0 < saved < trainer.global_step:
        how += f", from step {saved}"
    return f"stopped at step {trainer.global_step}; {how}"


def _checkpoint(trainer: Trainer, ckpt_path: str | None) -> str | None:
    """The latest checkpoint of this training, as `--ckpt_path` takes it. Files that an earlier
    training left in the same folder do not count."""
    callbacks = trainer.checkpoint_callbacks
    if any(_exists(getattr(callback, "last_model_path", "")) for callback in callbacks):
        return "last"
    saved = [getattr(callback, "best_model_path", "") for callback in callbacks]
    found = filter(_exists, [*saved, ckpt_path or ""])
    return max(found, key=lambda path: get_filesystem(path).modified(path), default=None)


def _exists(path: str) -> bool:
    return bool(path) and bool(get_filesystem(path).exists(path))
