"""The part of an epoch that one process takes, from a position on."""

from collections.abc import Iterator, Sized

from torch.utils.data import DistributedSampler

from datamodules.epochs import Epochs, Shuffled


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
