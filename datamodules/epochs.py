"""Which samples an epoch takes, in which order: a function of the seed and the epoch's number.

Nothing here has a state, so an epoch can be begun in its middle, in any process, at any time.
"""

import math
from collections.abc import Sequence
from random import Random
from typing import Protocol

import torch
from torch import Tensor


class Epochs(Protocol):
    """The orders of all epochs."""

    def __len__(self) -> int:
        """Samples of an epoch, the same for each."""
        ...

    def indices(self, number: int) -> Tensor:
        """Indices of epoch `number`, int64 [len(self)]."""
        ...


class InOrder:
    """Every sample once, from the first to the last.

    Args:
        size: number of samples.
    """

    def __init__(self, size: int) -> None:
        self.size = size

    def __len__(self) -> int:
        return self.size

    def indices(self, number: int) -> Tensor:
        """0 ... size - 1; see `Epochs`."""
        return torch.arange(self.size)


class Shuffled:
    """Every sample once, in another order each epoch.

    Args:
        size: number of samples.
        seed: of the order.
    """

    def __init__(self, size: int, seed: int) -> None:
        self.size = size
        self.seed = seed

    def __len__(self) -> int:
        return self.size

    def indices(self, number: int) -> Tensor:
        """A permutation; see `Epochs`."""
        return _permutation(self.size, f"locret order {self.seed} {number}")


class Mixed:
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

    def __len__(self) -> int:
        return self.size

    def indices(self, number: int) -> Tensor:
        """See `Epochs`."""
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
