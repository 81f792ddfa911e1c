"""Which steps' figures are looked at. Those of the others are not worth their time."""

from lightning.pytorch import Trainer


def looked_at(trainer: Trainer) -> bool:
    """Whether the trainer logs the step that is being taken, or it is the last one."""
    step = trainer.global_step + 1
    last = trainer.estimated_stepping_batches
    return step % max(1, trainer.log_every_n_steps) == 0 or step == last
