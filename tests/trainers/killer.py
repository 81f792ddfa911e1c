"""A callback that ends the process as a preempted job is ended, or asks it to end."""

import os
import signal

from lightning.pytorch import Callback


class SignalAt(Callback):
    """Sends this process a signal once `step` optimizer steps are done, in the hook of this name.

    Args:
        rank: of the only process that gets it; None = each of them.
    """

    def __init__(
        self, step: int, hook: str, number: int = signal.SIGKILL, rank: int | None = None
    ) -> None:
        self.step, self.number, self.rank = step, number, rank
        setattr(self, hook, self._send)

    def _send(self, trainer, *args, **kwargs):
        if trainer.global_step == self.step and self.rank in (None, trainer.global_rank):
            os.kill(os.getpid(), self.number)


def kill_at(step, hook="on_train_batch_start", number=signal.SIGKILL, rank=None):
    """The callback as configs name it."""
    given = {"step": step, "hook": hook, "number": int(number), "rank": rank}
    return {"class_path": "tests.trainers.killer.SignalAt", "init_args": given}
