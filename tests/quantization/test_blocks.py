"""Blocks after an eviction: nothing lost, nothing too long, never more than allowed."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from locret.kernels.packed import owners
from locret.quantization.blocks import aligned, arrange


@st.composite
def evictions(draw):
    generator = torch.Generator().manual_seed(draw(st.integers(0, 10**6)))
    group = draw(st.sampled_from([1, 2, 5, 8, 64]))
    batch, heads, blocks = (
        draw(st.integers(1, 2)),
        draw(st.integers(1, 3)),
        draw(st.integers(0, 30)),
    )
    survivors = torch.randint(0, group + 1, (batch, heads, blocks), generator=generator)
    if draw(st.booleans()):
        survivors[torch.rand(survivors.shape, generator=generator) < 0.4] = 0
    total = int(survivors.sum(-1).max()) + draw(st.integers(1, 3 * group))
    fresh = total - survivors.sum(-1)  # every head keeps as many
    fewest = -(-total // group)
    most = int(fresh.max()) + draw(st.integers(0, 2 * group))
    return survivors, fresh, most, group, fewest + draw(st.integers(0, 2 * fewest))


@settings(max_examples=300)
@given(evictions())
def test_blocks_cover_the_units_and_untouched_ones_stay(case):
    survivors, fresh, most, group, limit = case
    blocks = arrange(survivors, fresh, most, group, limit)
    assert torch.equal(blocks.sizes.sum(-1), survivors.sum(-1) + fresh)
    assert ((blocks.sizes >= 0) & (blocks.sizes <= group)).all()
    assert ((blocks.sizes > 0).sum(-1) <= limit).all()
    for head in torch.cartesian_prod(*map(torch.arange, survivors.shape[:2])).view(-1, 2).tolist():
        was, sizes, kept = (x[tuple(head)] for x in (survivors, blocks.sizes, blocks.kept))
        filled = int((sizes > 0).sum())
        assert (sizes[filled:] == 0).all()  # empty blocks come last
        was_at = was.cumsum(0) - was
        at = sizes.cumsum(0) - sizes
        for block in range(filled):
            if (row := int(kept[block])) >= 0:  # the same units as before, in the same place
                assert int(was[row]) == int(sizes[block]) and int(was_at[row]) == int(at[block])
        if int((was > 0).sum()) + -(-int(fresh[tuple(head)]) // group) <= limit:
            survived = kept[:filled][kept[:filled] >= 0]
            assert survived.tolist() == was.nonzero()[:, 0].tolist()


def test_few_units_are_touched():
    survivors = torch.tensor([[[64, 64, 64, 64, 3, 2, 4, 1, 64, 60, 64, 64]]])
    blocks = arrange(survivors, torch.tensor([[0]]), 0, 64, 11)
    assert blocks.sizes.tolist() == [[[64, 64, 64, 64, 10, 64, 60, 64, 64]]]
    assert blocks.kept.tolist() == [[[0, 1, 2, 3, -1, 8, 9, 10, 11]]]


def test_heads_within_the_limit_are_left_alone():
    survivors = torch.tensor([[[1, 1, 1, 1, 1, 1, 2, 0], [4, 4, 0, 0, 0, 0, 0, 0]]])
    blocks = arrange(survivors, torch.tensor([[0, 0]]), 9, 4, 3)
    assert blocks.kept[0, 1].tolist() == [0, 1] and (blocks.kept[0, 0] == -1).all()
    assert blocks.sizes.tolist() == [[[4, 4], [4, 4]]]


def test_aligned_blocks_are_full_but_the_last():
    assert aligned(torch.tensor([10, 8, 0]), 4, 3).tolist() == [[4, 4, 2], [4, 4, 0], [0, 0, 0]]


def test_owners_skip_empty_runs():
    starts = torch.tensor([[[0, 0, 2, 2, 5, 5]]], dtype=torch.int32)
    assert owners(starts, 5).tolist() == [[[1, 1, 3, 3, 3]]]
