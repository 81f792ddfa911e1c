from collections import Counter

import pytest
import torch
from lightning import Trainer
from torch.utils.data import DataLoader, SequentialSampler

from datamodules.epochs import InOrder, Mixed, ResumableLoader, ResumableSampler, Shuffled


def test_shuffled_is_a_permutation_by_seed_and_number():
    epochs = Shuffled(50, seed=1)
    assert sorted(epochs.indices(0).tolist()) == list(range(50))
    assert torch.equal(epochs.indices(3), Shuffled(50, seed=1).indices(3))
    assert not torch.equal(epochs.indices(0), epochs.indices(1))
    assert not torch.equal(Shuffled(50, seed=0).indices(1), Shuffled(50, seed=1).indices(0))


def source_of(index: int) -> str:
    return "a" if index < 10 else "b" if index < 40 else "c"


def test_mixed_keeps_the_proportions_in_every_epoch():
    epochs = Mixed([10, 30, 5], [1.0, 2.0, 1.0], seed=0)
    assert (len(epochs), epochs.counts) == (60, [15, 30, 15])  # the second source is seen once
    for number in range(4):
        indices = epochs.indices(number).tolist()
        assert Counter(map(source_of, indices)) == {"a": 15, "b": 30, "c": 15}
        assert sorted(i for i in indices if 10 <= i < 40) == list(range(10, 40))
        assert max(Counter(indices).values()) == 3  # 15 draws from 5
    assert len({tuple(epochs.indices(number).tolist()) for number in range(4)}) == 4


def test_mixed_goes_on_through_a_source_in_the_next_epoch():
    epochs = Mixed([10, 30, 5], [1.0, 1.0, 1.0], seed=3, size=12)
    assert epochs.counts == [4, 4, 4]
    drawn = [i for number in range(15) for i in epochs.indices(number).tolist()]
    times = Counter(drawn)
    assert {times[i] for i in range(10)} == {6}  # 60 draws from 10
    assert {times[i] for i in range(10, 40)} == {2}
    assert {times[i] for i in range(40, 45)} == {12}


def test_mixed_rounds_to_the_size():
    assert Mixed([9, 9, 9], [1.0, 1.0, 1.0], seed=0, size=10).counts == [4, 3, 3]
    assert Mixed([7, 90], [0.7, 0.3], seed=0).counts == [7, 3]
    for weights in ([1.0], [1.0, 0.0], [1.0, float("nan")], [1.0, float("inf")]):
        with pytest.raises(ValueError, match="above 0"):
            Mixed([5, 5], weights, seed=0)
    with pytest.raises(ValueError, match=r"takes \[10, 0\] from the sources"):
        Mixed([10, 10], [1000.0, 1.0], seed=0, size=10)


@pytest.mark.parametrize("replicas", [2, 3])
@pytest.mark.parametrize("size", [12, 13])
def test_replicas_share_an_epoch(replicas, size):
    """Together they take in one step what one process takes in that many."""
    whole = list(ResumableSampler(range(size), seed=5))
    samplers = [ResumableSampler(range(size), replicas, rank, seed=5) for rank in range(replicas)]
    parts = [list(sampler) for sampler in samplers]
    together = [i for step in zip(*parts, strict=True) for i in step]
    repeated = -size % replicas
    assert together == whole + whole[:repeated]
    assert {sampler.repeated for sampler in samplers} == {repeated}
    assert {len(sampler) for sampler in samplers} == {len(parts[0])}


def test_replicas_share_mixed_epochs_and_go_on_from_a_position():
    epochs = Mixed([10, 30], [1.0, 3.0], seed=0)
    samplers = [ResumableSampler(range(40), 2, rank, epochs=epochs) for rank in range(2)]
    parts = [list(sampler) for sampler in samplers]
    assert sorted(parts[0] + parts[1]) == list(range(40))
    samplers[1].start = 7
    assert list(samplers[1]) == parts[1][7:]
    assert list(ResumableSampler(range(5), epochs=InOrder(5))) == list(range(5))


@pytest.mark.filterwarnings("ignore")
def test_lightning_leaves_the_sampler_alone():
    trainer = Trainer(accelerator="cpu", devices=2, strategy="ddp", logger=False)
    loader = ResumableLoader(range(9), sampler=ResumableSampler(range(9), 2, 0))
    replaces = trainer._data_connector._requires_distributed_sampler
    assert not replaces(loader)
    assert replaces(DataLoader(range(9), sampler=SequentialSampler(range(9))))
    assert set(trainer.distributed_sampler_kwargs) == {"num_replicas", "rank"}
