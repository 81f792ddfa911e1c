import pytest
import torch

from locret.kernels.dispatch import INTERPRETED
from locret.kernels.packed import expand_units, expand_units_reference
from tests.kernels.packed import random_units


def assert_same(packed, size, dtype, device):
    """Keys and values come out bit for bit as the twin's, and nothing else is written."""
    how = (packed.bits, packed.group)
    count = packed.count
    at = torch.randperm(count + 5, device=device)[:count]
    for side, starts in ((packed.keys, packed.starts), (packed.values, None)):
        expected = expand_units_reference(side, *how, size, starts)
        for rows in (None, at):
            storage = torch.full((count + 5, size + 3), torch.nan, device=device).to(dtype)
            out = storage[2 : count + 2, :size] if rows is None else storage[:, 1:-2]
            whole = storage.clone()
            expand_units(side, *how, out, starts, rows)
            if rows is None:
                whole[2 : count + 2, :size] = expected
            else:
                whole[rows, 1:-2] = expected.to(dtype)
            assert_equal(storage, whole)


def assert_equal(actual, expected):
    if INTERPRETED and actual.dtype == torch.bfloat16:  # which the interpreter does not round
        torch.testing.assert_close(actual, expected, rtol=8e-3, atol=0, equal_nan=True)
    else:
        assert torch.equal(actual.isnan(), expected.isnan())
        assert torch.equal(actual.nan_to_num(), expected.nan_to_num())


@pytest.mark.parametrize(
    ("lengths", "size", "group"),
    [
        ([139, 0, 90], 64, 64),
        ([70, 1], 128, 32),
        ([65], 80, 64),
        ([0, 130, 2, 40], 96, 128),
        ([9, 11], 17, 16),
        ([30], 256, 8),
        ([200], 2, 1),
    ],
)
@pytest.mark.parametrize("bits", [8, 4, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_kernel_gives_the_twins_bits(lengths, size, group, bits, dtype, device):
    assert_same(random_units(lengths, size, bits, group, device), size, dtype, device)


@pytest.mark.parametrize("count", [0, 1, 2, 64, 65])
def test_few_units(count, device):
    assert_same(random_units([count], 32, 4, 64, device), 32, torch.float32, device)


@pytest.mark.parametrize("blocks", [256, 257, 2000])
def test_many_blocks(blocks, device):
    packed = random_units([blocks], 4, 8, 1, device)
    assert len(packed.starts) == blocks + 1
    assert_same(packed, 4, torch.float32, device)


def test_more_blocks_than_two_loads_hold(device):
    """The range of blocks shrinks 256-fold with each load."""
    packed = random_units([70_000], 1, 8, 1, device)
    assert_same(packed, 1, torch.float32, device)
