import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from locret.kernels.splits import share_out


def checked(lengths, at_once, **how):
    """Tiles that cover every sequence once, as lists of (first, one past the last)."""
    shares = share_out(lengths, at_once, "cpu", **how)
    assert shares.tiles.dtype == shares.firsts.dtype == torch.int32
    tiles, firsts = shares.tiles.tolist(), shares.firsts.tolist()
    assert shares.count == len(tiles) == firsts[-1] and len(firsts) == len(lengths) + 1
    assert shares.lengths == tuple(lengths) and shares.units == sum(lengths)
    at = 0
    for sequence, length in enumerate(lengths):
        end = at + length
        for owner, first, stop in tiles[firsts[sequence] : firsts[sequence + 1]]:
            assert owner == sequence and first == at < stop
            at = stop
        assert at == end
    return [(first, stop) for _, first, stop in tiles]


@given(st.lists(st.integers(0, 700), max_size=12), st.integers(1, 40), st.integers(1, 200))
def test_tiles_cover_every_unit_once(lengths, at_once, least):
    tiles = checked(lengths, at_once, least=least)
    filled = sum(length > 0 for length in lengths)
    assert len(tiles) <= max(4, -(-filled // at_once)) * at_once


def test_programs_fill_the_device_in_even_rounds():
    assert len(checked([16384] * 8, 264)) == 264
    assert len(checked([100] * 8, 264)) == 8
    assert len(checked([16384] * 264, 264)) == 264
    for heads in (1, 3, 30, 64, 200, 1000):
        tiles = checked([131072] * heads, 264)
        rounds = -(-len(tiles) // 264)
        assert len(tiles) / (rounds * 264) > 0.93, (heads, len(tiles))


@pytest.mark.parametrize("lengths", [[108000] + [3296] * 7, [0, 1, 50000, 9, 60000, 0, 21000, 61]])
def test_unequal_sequences_take_as_long_as_equal_ones(lengths):
    equal = max(stop - first for first, stop in checked([sum(lengths) // 8] * 8, 264))
    tiles = checked(lengths, 264, start=32)
    assert len(tiles) <= 264
    assert max(stop - first for first, stop in tiles) <= 1.05 * equal


def test_a_slow_start_makes_fewer_tiles():
    assert len(checked([1000] * 200, 264)) > len(checked([1000] * 200, 264, start=500)) == 200


@pytest.mark.parametrize("call", [([-1, 3], 4), ([3], 0)])
def test_misfits_are_refused(call):
    with pytest.raises(ValueError, match="expected no negative length"):
        share_out(*call, "cpu")
