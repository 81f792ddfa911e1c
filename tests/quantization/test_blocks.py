"""Blocks after an eviction: nothing lost, nothing too long, never more than allowed."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from locret.quantization.blocks import FRESH, REPACKED, arrange


@st.composite
def evictions(draw):
    """Of each sequence: units left of its blocks, fresh units and most blocks; the group."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 10**6)))
    group = draw(st.sampled_from([1, 2, 5, 8, 64]))
    sequences = []
    for _ in range(draw(st.integers(1, 5))):
        survivors = torch.randint(group + 1, (draw(st.integers(0, 30)),), generator=generator)
        if draw(st.booleans()):
            survivors[torch.rand(survivors.shape, generator=generator) < 0.4] = 0
        fresh = draw(st.integers(0, 3 * group))
        fewest = -(-(int(survivors.sum()) + fresh) // group)
        sequences.append((survivors.tolist(), fresh, fewest + draw(st.integers(0, 2 * fewest))))
    return sequences, group


def arranged(sequences, group):
    """Of each sequence: sizes of its blocks, and which former one each keeps, in its own count."""
    survivors, fresh, limits = zip(*sequences, strict=True)
    owner = [i for i, blocks in enumerate(survivors) for _ in blocks]
    flat = [size for blocks in survivors for size in blocks]
    of = [torch.tensor(numbers, dtype=torch.long) for numbers in (flat, owner, fresh, limits)]
    blocks = arrange(*of, group)
    sizes, kept, found, before = blocks.sizes.tolist(), blocks.kept.tolist(), [], 0
    for own, more, _ in sequences:
        of, count = [], sum(own) + more
        while count > 0:
            of.append((sizes.pop(0), kept.pop(0)))
            count -= of[-1][0]
        assert count == 0  # no block crosses the border
        found.append([(size, at - before if at >= 0 else at) for size, at in of])
        before += len(own)
    assert not sizes
    return found


@settings(max_examples=300, deadline=None)
@given(evictions())
def test_blocks_cover_the_units_and_untouched_ones_stay(case):
    sequences, group = case
    for (was, fresh, limit), blocks in zip(sequences, arranged(sequences, group), strict=True):
        assert all(0 < size <= group for size, _ in blocks) and len(blocks) <= limit
        assert sum(size for size, _ in blocks) == sum(was) + fresh
        at = 0
        for size, kept in blocks:
            if kept >= 0:  # the same units as before, in the same place
                assert was[kept] == size and sum(was[:kept]) == at
            assert kept != FRESH or at >= sum(was)
            at += size
        if sum(size > 0 for size in was) + -(-fresh // group) <= limit:
            assert [at for _, at in blocks if at >= 0] == [i for i, left in enumerate(was) if left]
            assert all(at != REPACKED for _, at in blocks)


def test_few_units_are_touched():
    survivors = [64, 64, 64, 64, 3, 2, 4, 1, 64, 60, 64, 64]
    kept = [0, 1, 2, 3, REPACKED, 8, 9, 10, 11]
    sizes = [64, 64, 64, 64, 10, 64, 60, 64, 64]
    assert arranged([(survivors, 0, 11)], 64) == [list(zip(sizes, kept, strict=True))]


def test_sequences_within_the_limit_are_left_alone():
    found = arranged([([1, 1, 1, 1, 1, 1, 2, 0], 0, 3), ([4, 0, 3], 0, 3)], 4)
    assert found == [[(4, REPACKED), (4, REPACKED)], [(4, 0), (3, 2)]]


def test_blocks_of_fresh_units_are_full_but_the_last():
    blocks = arranged([([], units, units) for units in (10, 8, 0, 1)], 4)
    sizes = [[size for size, _ in of_sequence] for of_sequence in blocks]
    assert sizes == [[4, 4, 2], [4, 4], [], [1]]
