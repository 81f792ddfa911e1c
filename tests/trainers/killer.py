"""A callback that ends the process the hard way, as a preempted job does."""

import os
import signal

from lightning.pytorch import Callback


class KillAt(Callback):
    """Kills once `step` optimizer steps are done, in the hook of this name."""

    def __init__(self, step: int, hook: str = "on_train_batch_start") -> None:
        self.step = step
        setattr(self, hook, self._kill)

    def _kill(self, trainer, *args, **kwargs):
        if trainer.global_step == self.step:
            os.kill(os.getpid(), signal.SIGKILL)


def kill_at(step, hook="on_train_batch_start"):
    """The callback as configs name it."""
    given = {"step": step, "hook": hook}
    return {"class_path": "tests.trainers.killer.KillAt", "init_args": given}
