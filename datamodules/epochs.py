"""Which samples an epoch takes, in which order, and how a run goes on inside an epoch.

The order is a function of the seed and the epoch's number, without a state, so an epoch can be
begun in its middle, in any process, at any time. A checkpoint holds how many of an epoch's batches
are done; resuming starts the order there, so no sample is repeated, left out or made just to be
thrown away, with any number of workers.
"""

import math
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence, Sized
from dataclasses import dataclass
from random import Random
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, DistributedSampler


@dataclass
class Epochs(ABC):
    """The orders of all epochs, each of `size` samples."""

    size: int

    def __len__(self) -> int:
        return self.size

    @abstractmethod
    def indices(self, number: int) -> Tensor:
        """Indices of epoch `number`, int64 [size]."""


class InOrder(Epochs):
    """Every sample once, from the first to the last."""

    def indices(self, number: int) -> Tensor:
        return torch.arange(self.size)


@dataclass
class Shuffled(Epochs):
    """Every sample once, in another order each epoch, which follows from the seed."""

    seed: int

    def indices(self, number: int) -> Tensor:
        return _permutation(self.size, f"locret order {self.seed} {number}")


class Mixed(Epochs):
    """Samples of several sources in given proportions, shuffled together.

    Each source is gone through in permutations of its own, one after the other and on through the
    epochs: one that is not used up in an epoch goes on in the next where it stopped, and one that
    is small begins anew, so that its samples are drawn equally often, give or take one.

    Args:
        sizes: samples of each source, whose indices follow one another.
        weights: proportion of each; they need not add up to 1.
        seed: of the order.
        size: samples of an epoch; None makes it as long as it takes to see the source of the
            largest weight once.

    Attributes:
        counts: samples of each source in an epoch: size times its share, rounded so that they add
            up to size.

    Raises:
        ValueError: if there is not one weight above 0 for each source, or size leaves a source
            without a sample.
    """

    def __init__(
        self, sizes: Sequence[int], weights: Sequence[float], seed: int, size: int | None = None
    ) -> None:
        if len(weights) != len(sizes) or not all(0 < w < math.inf for w in weights):
            raise ValueError(
                f"weights is {list(weights)} for {len(sizes)} sources; expected a number above 0 "
                "for each"
            )
        self.sizes = list(sizes)
        self.seed = seed
        shares = [w / sum(weights) for w in weights]
        largest = max(range(len(shares)), key=shares.__getitem__)
        self.size = size or round(self.sizes[largest] / shares[largest])
        self.counts = _apportion(self.size, shares)
        if not all(self.counts):
            raise ValueError(
                f"an epoch of {self.size} samples with the weights {list(weights)} takes "
                f"{self.counts} from the sources; raise samples_per_epoch or leave a source out"
            )

    def indices(self, number: int) -> Tensor:
        starts = [sum(self.sizes[:i]) for i in range(len(self.sizes))]
        drawn = torch.cat([starts[i] + self._draw(i, number) for i in range(len(self.sizes))])
        return drawn[_permutation(self.size, f"locret order {self.seed} {number}")]

    def _draw(self, source: int, number: int) -> Tensor:
        """Items number * count ... of the endless row of permutations of one source."""
        size, count = self.sizes[source], self.counts[source]
        first, last = number * count // size, ((number + 1) * count - 1) // size
        passes = [
            _permutation(size, f"locret source {self.seed} {source} {i}")
            for i in range(first, last + 1)
        ]
        start = number * count - first * size
        return torch.cat(passes)[start : start + count]


def _permutation(size: int, name: str) -> Tensor:
    # Seeded by a text, so that (seed 0, epoch 1) is not (seed 1, epoch 0).
    generator = torch.Generator().manual_seed(Random(name).getrandbits(63))
    return torch.randperm(size, generator=generator)


def _apportion(size: int, shares: Sequence[float]) -> list[int]:
    """`size` split by shares; what rounding down leaves goes to the largest remainders."""
    exact = [size * share for share in shares]
    counts = [int(x) for x in exact]
    by_remainder = sorted(range(len(shares)), key=lambda i: counts[i] - exact[i])
    for i in by_remainder[: size - sum(counts)]:
        counts[i] += 1
    return counts


class ResumableSampler(DistributedSampler[int]):
    """The indices of each epoch, shared out among replicas.

    Replica r of R takes items r, R + r, 2R + r, ... of the epoch, so that R replicas together take
    in one step what one takes in R, and each sample is taken once. Replicas get equally many, as
    strategies that work in lockstep need: where R does not divide the epoch, its first
    `repeated` < R samples are taken once more at its end. None is left out.

    It is a DistributedSampler, with one replica for one process, so that Lightning neither replaces
    it in a distributed run, whatever the trainer's use_distributed_sampler, nor forgets to tell it
    the epoch.

    Args:
        dataset: what the indices are of.
        num_replicas: processes that share an epoch.
        rank: number of this one.
        seed: of the order, without `epochs`.
        epochs: the orders; None shuffles.

    Attributes:
        epoch: what the trainer says the epoch is.
        order: number of the order that the next pass takes; set by `ResumableLoader`.
        start: indices of this replica to leave out at the start of the next pass; set likewise.
        repeated: samples that are taken twice in an epoch.
    """

    order: int = 0
    start: int = 0

    def __init__(
        self,
        dataset: Sized,
        num_replicas: int = 1,
        rank: int = 0,
        seed: int = 0,
        epochs: Epochs | None = None,
    ) -> None:
        super().__init__(dataset, num_replicas=num_replicas, rank=rank, seed=seed)  # type: ignore
        self.epochs = epochs or Shuffled(len(dataset), seed)
        self.num_samples = -(-len(self.epochs) // num_replicas)
        self.total_size = self.num_samples * num_replicas
        self.repeated = self.total_size - len(self.epochs)

    def __iter__(self) -> Iterator[int]:
        indices = self.epochs.indices(self.order)
        padded = indices.repeat(-(-self.total_size // len(indices)))[: self.total_size]
        return iter(padded[self.rank :: self.num_replicas][self.start :].tolist())


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
        # be decided, and no worker started, until the first batch is asked for.
        start = self._begin(getattr(self.sampler, "epoch", 0))
        for n, batch in enumerate(super().__iter__(), start=start + 1):
            self._state["batches"] = n
            yield batch

    def _begin(self, epoch: int) -> int:
        """Decide on the permutation of a pass in the trainer's epoch, and where it starts."""
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
