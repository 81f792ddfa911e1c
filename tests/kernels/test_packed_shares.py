"""Which tiles packed units are shared out in."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from locret.kernels.decode_general import STEP, PackedShares
from locret.kernels.splits import share_out
from tests.kernels.packed import random_starts


@given(
    st.lists(st.integers(0, 700), min_size=1, max_size=12),
    st.sampled_from([1, 16, 64, 100, 1000]),
    st.integers(1, 40),
)
def test_tiles_begin_where_a_step_does(lengths, group, at_once):
    starts, plain = random_starts(lengths, group), share_out(lengths, at_once, "cpu")
    shares = PackedShares.along(starts, plain)
    assert torch.equal(shares.tiles[:, 0], plain.tiles[:, 0])
    assert torch.equal(shares.firsts, plain.firsts) and shares.lengths == tuple(lengths)
    assert ((shares.tiles[:, 1:] - plain.tiles[:, 1:]).abs() <= STEP // 2).all()
    first, end = shares.tiles[:, 1:].long().unbind(1)
    assert torch.equal(first[1:], end[:-1]) and (first < end).all()
    assert not shares.count or (first[0] == 0 and end[-1] == sum(lengths))
    block = shares.blocks.long()
    assert shares.blocks.dtype == torch.int32
    assert ((starts[block] <= first) & (first < starts[block + 1])).all()
    assert ((first - starts[block]) % STEP == 0).all()


def test_tiles_of_full_blocks_are_whole_blocks():
    starts = torch.arange(0, 16300 * 2, 64).clamp(max=16300).unique().int()
    shares = PackedShares.along(starts, share_out([16300], 1452, "cpu"))
    assert (shares.tiles[:, 1] % 64 == 0).all()
    assert (shares.tiles[:, 2] - shares.tiles[:, 1]).max() == 128
