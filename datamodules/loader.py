"""A DataLoader that can be resumed inside an epoch.

The order of an epoch depends on the seed and the number of the epoch. A checkpoint written in the
middle of an epoch holds how many of its batches are done; resuming starts the order there, so no
sample is repeated, left out or made just to be thrown away, with any number of workers.
"""

import warnings
from collections.abc import Callable, Iterator
from typing import Any

from torch.utils.data import DataLoader, Dataset


class ResumableLoader(DataLoader[Any]):
    """A DataLoader with the state_dict / load_state_dict that Lightning calls for checkpoints.

    The state says which permutation is in use and how many of its batches are done. It is gone on
    with if the trainer goes on with the epoch that it was in; if the trainer begins an epoch, so
    does the loader, with the next permutation: a checkpoint may stem from the end of an epoch, also
    of one that limit_train_batches ended early.

    The loader numbers its permutations itself, as the trainer's epoch number and one `shift`:
    resumed at the end of an epoch with max_steps set, Lightning counts that epoch twice.

    The length stays that of a whole epoch, for Lightning's own count goes on from the checkpoint's.

    Args:
        dataset: map-style.
        in_flight: how many batches were yielded and are not done, asked when the state is taken.
            A checkpoint that is written because a step failed has one.
        **options: of DataLoader; `sampler` is a `ResumableSampler`. Lightning puts another in its
            place to overfit on a few batches, and then nothing is resumed.
    """

    def __init__(
        self,
        dataset: Dataset[Any],
        *,
        in_flight: Callable[[], int] = int,
        **options: Any,
    ) -> None:
        super().__init__(dataset, **options)
        self.in_flight = in_flight
        self._state = {"order": 0, "shift": 0, "batches": 0}
        self._loaded = False

    @property
    def _division(self) -> dict[str, int]:
        """What a number of batches depends on to say how far an epoch is."""
        replicas = getattr(self.sampler, "num_replicas", 1)
        size = len(getattr(self.sampler, "epochs", self.sampler))  # type: ignore[arg-type]
        return {"batch_size": self.batch_size or 1, "replicas": replicas, "samples": size}

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        # A generator, for Lightning calls iter() before it tells the sampler the epoch: nothing may
        # be settled, and no worker started, until the first batch is asked for.
        start = self._begin(getattr(self.sampler, "epoch", 0))
        for n, batch in enumerate(super().__iter__(), start=start + 1):
            self._state["batches"] = n
            yield batch

    def _begin(self, epoch: int) -> int:
        """Settle the permutation of a pass in the trainer's epoch, and where it starts."""
        state, loaded, self._loaded = self._state, self._loaded, False
        start = 0
        if loaded and epoch == state["order"] - state["shift"]:
            start = state["batches"]
        elif loaded:
            state["shift"] = state["order"] + 1 - epoch
        order = epoch + state["shift"]
        self._state = {"order": order, "shift": state["shift"], "batches": start}
        self.sampler.order = order  # type: ignore[attr-defined]
        self.sampler.start = start * (self.batch_size or 1)  # type: ignore[attr-defined]
        return start

    def state_dict(self) -> dict[str, int]:
        """The permutation in use, how it follows from the epoch, and the batches done of it."""
        # Between loading and the first batch nothing is in flight.
        flying = 0 if self._loaded else self.in_flight()
        batches = max(0, self._state["batches"] - flying)
        return {**self._state, "batches": batches, **self._division}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Take over a state; the next pass goes on from it, as the class says.

        Warns if data, batch size or number of processes are not those of the checkpoint: the order
        then is another one.
        """
        changed = {k: v for k, v in self._division.items() if state.get(k, v) != v}
        if changed:
            before = {key: state[key] for key in changed}
            warnings.warn(
                f"the checkpoint stems from a run with {before}, this one has {changed}: what is "
                "left of its epoch may repeat samples or leave some out",
                stacklevel=2,
            )
        self._state = {key: state[key] for key in ("order", "shift", "batches")}
        self._loaded = True
        if hasattr(self.sampler, "set_epoch"):
            self.sampler.set_epoch(state["order"] - state["shift"])
